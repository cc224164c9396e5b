// The row kernels of linear_cross_entropy and linear_log_prob on the GPU, between two library products.
//
// trace_kernels/ops/linear_cross_entropy/chunked.py makes the float32 logits of a chunk of rows in blocks of columns
// that fit the L2 cache. block_kernel adds a block to the rows' softmax and leaves dz, up to a factor per row, in the
// dtype of the hidden states.
#include "common/cuda.cuh"
#include "common/loss.cuh"

namespace tk {
namespace {

// How far the number that exponentials are taken from may lag behind the row's maximum: e^40 is far from overflow.
constexpr float kLag = 40.0f;

// A target that is a class of probability 0: another rank's, where the vocabulary is split (losses.py).
constexpr int64_t kNoLabel = -(int64_t{1} << 62);

// A block [R, width] of the logits, columns first ... first + width of V. Rows of logits start on 16 bytes, those of dz
// on 8, and `first` is a multiple of kStep.
struct Block {
  const float* logits;
  int64_t stride, stride_dz;
  const float* bias;  // [V] or null
  const int64_t* target;
  const float* row_weight;  // rows of weight 0 are dropped; null: none
  int first, width, num_classes;
  int64_t ignore_index;
  LogitMap map;

  __device__ __forceinline__ bool no_label(int64_t row) const { return target[row] == kNoLabel; }
  __device__ __forceinline__ bool kept(int64_t row) const {
    return target[row] != ignore_index && (row_weight == nullptr || row_weight[row] != 0.0f);
  }
  // The label's column in the block, or a number outside it.
  __device__ __forceinline__ int label(int64_t row) const {
    const int64_t label = target[row];
    return label >= 0 && label < num_classes ? static_cast<int>(label) - first : -1;
  }
};

struct State {
  float *reference, *others, *label_logit;  // [R] each
};

// The kStep logits from `column` on, mapped; beyond the block x = -inf.
template <bool SOFTCAP>
__device__ __forceinline__ void load_logits(const Block& p, const float* row, int column, Mapped (&out)[kStep]) {
  float z[kStep];
  load_step(row, column, p.width, z);
#pragma unroll
  for (int i = 0; i < kStep; ++i) {
    const bool inside = column + i < p.width;
    if (p.bias != nullptr && inside) z[i] += p.bias[p.first + column + i];
    out[i] = map_logit<SOFTCAP>(z[i], p.map);
    if (!inside) out[i].x = -INFINITY;
  }
}

struct BlockShared {
  float tops[2][kRowWarps], sums[kRowWarps];
};

// Adds a block of logits to each row's softmax. The label's own term stays out of `others`. With WRITE, dz becomes
// exp(x - reference) * dx/dz; finish_kernel knows its factor. The reference lags the maximum by at most kLag, so that
// it seldom moves and what is written seldom has to be read again.
template <typename T, bool SOFTCAP, bool WRITE>
__global__ void __launch_bounds__(kRowThreads) block_kernel(Block p, T* dz, State state) {
  TK_SHARED(BlockShared, shared);
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
  dz += row * p.stride_dz;
  if (!p.kept(row)) {
    if (WRITE) zero_row(dz + p.first, p.width);
    return;
  }
  const float* logits = p.logits + row * p.stride;
  const int label = p.label(row);
  float reference = kLowest, before = 0.0f, sum = 0.0f;
  if (p.first != 0) {
    reference = state.reference[row];
    before = state.others[row];
  }
  // Every thread has read the state before thread 0 writes it: the loop below has a barrier, and width is above 0.
  int turn = 0;
  for (int start = 0; start < p.width; start += kTile, turn ^= 1) {
    const int column = start + thread * kStep;
    Mapped mapped[kStep];
    load_logits<SOFTCAP>(p, logits, column, mapped);
    float top = mapped[0].x;
#pragma unroll
    for (int i = 1; i < kStep; ++i) top = fmaxf(top, mapped[i].x);
    top = warp_max(top);
    if (lane == 0) shared.tops[turn][warp] = top;
    __syncthreads();
    top = shared.tops[turn][0];
#pragma unroll
    for (int i = 1; i < kRowWarps; ++i) top = fmaxf(top, shared.tops[turn][i]);
    if (top > reference + kLag) {
      const float rescale = __expf(reference - top);
      sum *= rescale;
      before *= rescale;
      // A thread wrote what it reads here, in this launch; other blocks of columns were written by earlier ones.
      if (WRITE) {
        for (int done = thread * kStep; done < p.first + start; done += kTile) {
#pragma unroll
          for (int i = 0; i < kStep; ++i) dz[done + i] = from_float<T>(to_float(dz[done + i]) * rescale);
        }
      }
      reference = top;
    }
    float values[kStep];
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const float exponential = __expf(mapped[i].x - reference);
      sum += column + i == label ? 0.0f : exponential;
      values[i] = exponential * mapped[i].slope;
    }
    if (WRITE) store_step(dz + p.first, column, p.width, values);
  }
  sum = warp_sum(sum);
  if (lane == 0) shared.sums[warp] = sum;
  __syncthreads();
  if (thread != 0) return;
  for (int i = 0; i < kRowWarps; ++i) before += shared.sums[i];
  state.reference[row] = reference;
  state.others[row] = before;
  if (label >= 0 && label < p.width) {
    state.label_logit[row] = logits[label] + (p.bias == nullptr ? 0.0f : p.bias[p.first + label]);
  } else if (p.first == 0) {
    state.label_logit[row] = NAN;  // what a label that is no class keeps
  }
}

// From the rows' states logp and lse, and with `factor` the label's dz and factor * dz = d logp / d (W h).
template <typename T, bool SOFTCAP>
__global__ void __launch_bounds__(kRowThreads)
    finish_kernel(Block p, int64_t num_rows, T* dz, State state, float* logp, float* lse, float* factor) {
  const int64_t row = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  if (row >= num_rows) return;
  if (!p.kept(row)) {
    logp[row] = lse[row] = 0.0f;
    if (factor != nullptr) factor[row] = 0.0f;
    return;
  }
  Mapped label = map_logit<SOFTCAP>(state.label_logit[row], p.map);
  if (p.no_label(row)) label.x = -INFINITY;
  const float reference = state.reference[row], others = state.others[row];
  Softmax rest;
  rest.maximum = reference;
  rest.sum = others;
  const LogProb result = log_prob(label.x, rest);
  logp[row] = result.logp;
  lse[row] = result.lse;
  if (factor == nullptr) return;
  factor[row] = -p.map.scale / (others + __expf(label.x - reference));
  // 1 - p is the others' share: no difference of two roundings.
  const int column = p.label(row);
  if (column >= 0) dz[row * p.stride_dz + column] = from_float<T>(-others * label.slope);
}

// dz = d logp / d (W h) of a block from the known logsumexp. `factor` becomes the row's weight, or 1 without `scale`,
// and 0 where the row is dropped.
template <typename T, bool SOFTCAP>
__global__ void __launch_bounds__(kRowThreads)
    gradient_kernel(Block p, T* dz, const float* lse, float* factor, bool scale) {
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  dz += row * p.stride_dz + p.first;
  if (!p.kept(row)) {
    if (thread == 0) factor[row] = 0.0f;
    return zero_row(dz, p.width);
  }
  const int64_t target = p.target[row];
  const int label = p.label(row);
  const float normalizer = lse[row];
  if (thread == 0) {
    const float weight = scale ? p.row_weight[row] : 1.0f;
    factor[row] = (target >= 0 && target < p.num_classes) || p.no_label(row) ? weight : NAN;
  }
  for (int column = thread * kStep; column < p.width; column += kTile) {
    Mapped mapped[kStep];
    load_logits<SOFTCAP>(p, p.logits + row * p.stride, column, mapped);
    float values[kStep];
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const float dx = (column + i == label ? 1.0f : 0.0f) - __expf(mapped[i].x - normalizer);
      values[i] = dx * mapped[i].slope * p.map.scale;
    }
    store_step(dz, column, p.width, values);
  }
}

Block block_of(uintptr_t logits, int64_t stride, int64_t stride_dz, uintptr_t bias, uintptr_t target,
               uintptr_t row_weight, int64_t first, int64_t width, int64_t num_classes, int64_t ignore_index, float cap,
               float scale) {
  return {reinterpret_cast<const float*>(logits),
          stride,
          stride_dz,
          reinterpret_cast<const float*>(bias),
          reinterpret_cast<const int64_t*>(target),
          reinterpret_cast<const float*>(row_weight),
          checked_int(first),
          checked_int(width),
          checked_int(num_classes),
          ignore_index,
          {cap, scale}};
}

[[maybe_unused]] void linear_block_cuda(uintptr_t logits, int64_t num_rows, int64_t stride, uintptr_t dz, int element,
                                        int64_t stride_dz, bool write, uintptr_t bias, uintptr_t target,
                                        uintptr_t row_weight, int64_t first, int64_t width, int64_t num_classes,
                                        int64_t ignore_index, float cap, float scale, uintptr_t reference,
                                        uintptr_t others, uintptr_t label_logit, uintptr_t stream) {
  const Block p = block_of(logits, stride, stride_dz, bias, target, row_weight, first, width, num_classes, ignore_index,
                           cap, scale);
  const State state{pointer<float>(reference), pointer<float>(others), pointer<float>(label_logit)};
  // What a thread scales again when the reference moves it must have written itself in this launch.
  if (first % kTile != 0) throw std::invalid_argument("linear_block_cuda: a block starts at a multiple of a tile");
  if (num_rows == 0) return;
  with_element(element, [&](auto type) {
    using T = decltype(type);
    with_flag(cap != 0.0f, [&](auto softcap) {
      with_flag(write, [&](auto writes) {
        launch(block_kernel<T, softcap.value, writes.value>, blocks_of(num_rows), kRowThreads, stream, p,
               pointer<T>(dz), state);
      });
    });
  });
}

[[maybe_unused]] void linear_finish_cuda(int64_t num_rows, uintptr_t dz, int element, int64_t stride_dz,
                                         uintptr_t target, uintptr_t row_weight, int64_t num_classes,
                                         int64_t ignore_index, float cap, float scale, uintptr_t reference,
                                         uintptr_t others, uintptr_t label_logit, uintptr_t logp, uintptr_t lse,
                                         uintptr_t factor, uintptr_t stream) {
  const Block p = block_of(0, 0, stride_dz, 0, target, row_weight, 0, 0, num_classes, ignore_index, cap, scale);
  const State state{pointer<float>(reference), pointer<float>(others), pointer<float>(label_logit)};
  with_element(element, [&](auto type) {
    using T = decltype(type);
    with_flag(cap != 0.0f, [&](auto softcap) {
      launch(finish_kernel<T, softcap.value>, blocks_of(ceil_div(num_rows, kRowThreads)), kRowThreads, stream, p,
             num_rows, pointer<T>(dz), state, pointer<float>(logp), pointer<float>(lse), pointer<float>(factor));
    });
  });
}

[[maybe_unused]] void linear_gradient_cuda(uintptr_t logits, int64_t num_rows, int64_t stride, uintptr_t dz,
                                           int element, int64_t stride_dz, uintptr_t bias, uintptr_t target,
                                           uintptr_t row_weight, int64_t first, int64_t width, int64_t num_classes,
                                           int64_t ignore_index, float cap, float scale, uintptr_t lse,
                                           uintptr_t factor, bool scaled, uintptr_t stream) {
  const Block p = block_of(logits, stride, stride_dz, bias, target, row_weight, first, width, num_classes, ignore_index,
                           cap, scale);
  with_element(element, [&](auto type) {
    using T = decltype(type);
    with_flag(cap != 0.0f, [&](auto softcap) {
      launch(gradient_kernel<T, softcap.value>, blocks_of(num_rows), kRowThreads, stream, p, pointer<T>(dz),
             pointer<const float>(lse), pointer<float>(factor), scaled);
    });
  });
}

// out_t = factor_t * rows_t, rounded once, and 0 where the factor is 0: a dropped row may hold what is not finite.
template <typename From, typename To>
__global__ void __launch_bounds__(kRowThreads)
    scaled_rows_kernel(const From* rows, const float* factor, To* out, int width, int64_t stride_row,
                       int64_t stride_column, int64_t stride_out) {
  const int64_t row = blockIdx.x;
  const float scale = factor[row];
  rows += row * stride_row;
  out += row * stride_out;
  for (int column = static_cast<int>(threadIdx.x); column < width; column += kRowThreads) {
    out[column] = from_float<To>(scale == 0.0f ? 0.0f : to_float(rows[column * stride_column]) * scale);
  }
}

// sums += the sum over rows of factor_t * rows_t; a thread owns a column, so the order of additions is fixed.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    column_sums_kernel(const T* rows, const float* factor, float* sums, int num_rows, int width, int64_t stride) {
  const int column = static_cast<int>(blockIdx.x) * kRowThreads + static_cast<int>(threadIdx.x);
  if (column >= width) return;
  float sum = 0.0f;
  for (int row = 0; row < num_rows; ++row) {
    const float scale = factor[row];
    if (scale != 0.0f) sum += to_float(rows[row * stride + column]) * scale;
  }
  sums[column] += sum;
}

[[maybe_unused]] void scaled_rows_cuda(uintptr_t rows, int from, int64_t num_rows, int64_t width, int64_t stride_row,
                                       int64_t stride_column, uintptr_t factor, uintptr_t out, int to,
                                       int64_t stride_out, uintptr_t stream) {
  if (num_rows == 0 || width == 0) return;
  with_element(from, [&](auto from_type) {
    with_element(to, [&](auto to_type) {
      using From = decltype(from_type);
      using To = decltype(to_type);
      if constexpr (std::is_same_v<From, To> || std::is_same_v<From, float>) {
        launch(scaled_rows_kernel<From, To>, blocks_of(num_rows), kRowThreads, stream, pointer<const From>(rows),
               pointer<const float>(factor), pointer<To>(out), checked_int(width), stride_row, stride_column,
               stride_out);
      } else {
        throw std::invalid_argument("scaled_rows_cuda: rows are float32 or have the type of the result");
      }
    });
  });
}

[[maybe_unused]] void column_sums_cuda(uintptr_t rows, int element, int64_t num_rows, int64_t width, int64_t stride,
                                       uintptr_t factor, uintptr_t sums, uintptr_t stream) {
  with_element(element, [&](auto type) {
    using T = decltype(type);
    launch(column_sums_kernel<T>, blocks_of(ceil_div(width, kRowThreads)), kRowThreads, stream, pointer<const T>(rows),
           pointer<const float>(factor), pointer<float>(sums), checked_int(num_rows), checked_int(width), stride);
  });
}

#ifdef TK_REGISTER
void bind(pybind11::module_& module) {
  module.def("linear_block_cuda", &linear_block_cuda);
  module.def("linear_finish_cuda", &linear_finish_cuda);
  module.def("linear_gradient_cuda", &linear_gradient_cuda);
  module.def("scaled_rows_cuda", &scaled_rows_cuda);
  module.def("column_sums_cuda", &column_sums_cuda);
}
TK_REGISTER(bind);
#endif

}  // namespace
}  // namespace tk
