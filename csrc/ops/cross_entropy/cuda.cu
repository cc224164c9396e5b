// cross_entropy from logits on the GPU: one read of the logits forward; one read and one write backward, which may
// be the same memory.
#include "common/cuda.cuh"
#include "common/loss.cuh"

namespace tk {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
// Vectors that a thread has under way at a time: what keeps the memory busy.
constexpr int kInFlight = 4;

struct Rows {
  int num_classes;
  int64_t stride;         // in elements
  const int64_t* target;  // [T]
  int64_t ignore_index;
  LogitMap map;

  // -1 where the target is no class.
  __device__ __forceinline__ int label(int64_t target) const {
    return target >= 0 && target < num_classes ? static_cast<int>(target) : -1;
  }
};

struct ForwardShared {
  float maximum[kWarps], sum[kWarps];
};

// One block a row. The label's own term stays out of the sum, so that a small loss keeps its digits.
template <typename T, bool SOFTCAP>
__global__ void __launch_bounds__(kThreads) forward_kernel(const T* logits, Rows p, float* logp, float* lse) {
  TK_SHARED(ForwardShared, shared);
  const int64_t row = blockIdx.x;
  const int64_t target = p.target[row];
  if (target == p.ignore_index) {
    if (threadIdx.x == 0) logp[row] = lse[row] = 0.0f;
    return;
  }
  const int label = p.label(target), thread = static_cast<int>(threadIdx.x);
  logits += row * p.stride;
  Softmax others;
  const auto add = [&](int column) {
    if (column != label) others.add(map_logit<SOFTCAP>(to_float(logits[column]), p.map).x);
  };
  const auto add_vector = [&](int first, const uint4& words) {
    float x[kVector<T>];
    unpack<T>(words, x);
    float top = kLowest;
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      x[i] = map_logit<SOFTCAP>(x[i], p.map).x;
      top = fmaxf(top, x[i]);
    }
    others.raise(top);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) sum += first + i == label ? 0.0f : __expf(x[i] - others.maximum);
    others.sum += sum;
  };

  const VectorRow<T> vectors(logits, p.num_classes);
  int v = vectors.begin + thread;
  for (; v + (kInFlight - 1) * kThreads < vectors.end; v += kInFlight * kThreads) {
    uint4 loaded[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) loaded[i] = load_words(logits + vectors.first(v + i * kThreads));
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) add_vector(vectors.first(v + i * kThreads), loaded[i]);
  }
  for (; v < vectors.end; v += kThreads) add_vector(vectors.first(v), load_words(logits + vectors.first(v)));
  if (thread < vectors.head) add(thread);
  if (vectors.tail + thread < p.num_classes) add(vectors.tail + thread);

  others = warp_softmax(others);
  if (thread % kWarpSize == 0) {
    shared.maximum[thread / kWarpSize] = others.maximum;
    shared.sum[thread / kWarpSize] = others.sum;
  }
  __syncthreads();
  if (thread != 0) return;
  for (int i = 1; i < kWarps; ++i) others.add({shared.maximum[i], shared.sum[i]});
  const float x = label >= 0 ? map_logit<SOFTCAP>(to_float(logits[label]), p.map).x : NAN;
  const LogProb result = log_prob(x, others);
  logp[row] = result.logp;
  lse[row] = result.lse;
}

// Of rows [T]: d loss / d x is constant * p + uniform, at the label at_label; uniform may be null, for 0.
struct Gradient {
  const float *lse, *constant, *uniform, *at_label;
};

// A block takes a piece of a row, kInFlight vectors a thread. `dlogits` may be `logits`.
template <typename T, bool SOFTCAP>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const T* logits, Rows p, Gradient gradient, T* dlogits, int64_t out_stride, int pieces) {
  const int64_t row = blockIdx.x / pieces;
  const int piece = static_cast<int>(blockIdx.x) % pieces, thread = static_cast<int>(threadIdx.x);
  const int64_t target = p.target[row];
  const int label = p.label(target);
  float constant = gradient.constant[row], at_label = gradient.at_label[row];
  float uniform = gradient.uniform == nullptr ? 0.0f : gradient.uniform[row];
  // Rows without a gradient get exact zeros, whatever their logits hold, which are not even read.
  const bool zero = target == p.ignore_index || (constant == 0.0f && uniform == 0.0f && at_label == 0.0f);
  if (label < 0) constant = NAN;
  const float normalizer = gradient.lse[row];
  logits += row * p.stride;
  dlogits += row * out_stride;
  const auto derivative = [&](int column, float logit) {
    const Mapped mapped = map_logit<SOFTCAP>(logit, p.map);
    const float dx = column == label ? at_label : __expf(mapped.x - normalizer) * constant + uniform;
    return zero ? 0.0f : dx * mapped.slope * p.map.scale;
  };

  VectorRow<T> vectors(logits, p.num_classes);
  // Where the two rows lie differently to 16 bytes, all elements count as after the last vector.
  if (VectorRow<T>(dlogits, p.num_classes).shift != vectors.shift)
    vectors.begin = vectors.end = vectors.head = vectors.tail = 0;
  const int v = vectors.begin + piece * (kThreads * kInFlight) + thread;
  uint4 loaded[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    loaded[i] = uint4{};
    if (!zero && v + i * kThreads < vectors.end) loaded[i] = load_words(logits + vectors.first(v + i * kThreads));
  }
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (v + i * kThreads >= vectors.end) break;
    const int first = vectors.first(v + i * kThreads);
    float values[kVector<T>];
    unpack<T>(loaded[i], values);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) values[j] = derivative(first + j, values[j]);
    store_vector(dlogits + first, values);
  }
  const auto edge = [&](int column) { dlogits[column] = from_float<T>(derivative(column, to_float(logits[column]))); };
  if (piece == 0 && thread < vectors.head) edge(thread);
  for (int c = vectors.tail + piece * kThreads + thread; c < p.num_classes; c += pieces * kThreads) edge(c);
}

[[maybe_unused]] void cross_entropy_cuda(uintptr_t logits, int element, int64_t num_rows, int64_t num_classes,
                                         int64_t stride, uintptr_t target, int64_t ignore_index, float cap, float scale,
                                         uintptr_t logp, uintptr_t lse, uintptr_t stream) {
  if (num_rows == 0) return;
  const Rows p{checked_int(num_classes), stride, reinterpret_cast<const int64_t*>(target), ignore_index, {cap, scale}};
  with_element(element, [&](auto type) {
    using T = decltype(type);
    with_flag(cap != 0.0f, [&](auto softcap) {
      launch(forward_kernel<T, softcap.value>, blocks_of(num_rows), kThreads, stream,
             reinterpret_cast<const T*>(logits), p, reinterpret_cast<float*>(logp), reinterpret_cast<float*>(lse));
    });
  });
}

[[maybe_unused]] void cross_entropy_backward_cuda(uintptr_t logits, int element, int64_t num_rows, int64_t num_classes,
                                                  int64_t stride, uintptr_t target, int64_t ignore_index, float cap,
                                                  float scale, uintptr_t lse, uintptr_t constant, uintptr_t uniform,
                                                  uintptr_t at_label, uintptr_t dlogits, int64_t out_stride,
                                                  uintptr_t stream) {
  if (num_rows == 0) return;
  const Rows p{checked_int(num_classes), stride, pointer<const int64_t>(target), ignore_index, {cap, scale}};
  const Gradient gradient{pointer<const float>(lse), pointer<const float>(constant), pointer<const float>(uniform),
                          pointer<const float>(at_label)};
  with_element(element, [&](auto type) {
    using T = decltype(type);
    const int pieces = static_cast<int>(ceil_div(num_classes, kVector<T> * kThreads * kInFlight));
    with_flag(cap != 0.0f, [&](auto softcap) {
      launch(backward_kernel<T, softcap.value>, blocks_of(num_rows * pieces), kThreads, stream,
             pointer<const T>(logits), p, gradient, pointer<T>(dlogits), out_stride, pieces);
    });
  });
}

#ifdef TK_REGISTER
void bind(pybind11::module_& module) {
  module.def("cross_entropy_cuda", &cross_entropy_cuda);
  module.def("cross_entropy_backward_cuda", &cross_entropy_backward_cuda);
}
TK_REGISTER(bind);
#endif

}  // namespace
}  // namespace tk
