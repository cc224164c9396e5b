// The row kernels of linear_kl on the GPU, between the products of policy and reference.
//
// trace_kernels/ops/linear_kl/chunked.py makes both float32 logits of a chunk of rows in blocks of columns.
#include "common/cuda.cuh"
#include "common/loss.cuh"

namespace tk {
namespace {

// A block [R, width] of both logits.
struct Pair {
  const float *policy, *reference;
  int64_t stride;
  const float* row_weight;  // [R], rows of weight 0 are dropped; null: none
  int width;
  LogitMap map;

  __device__ __forceinline__ float weight(int64_t row) const { return row_weight == nullptr ? 1.0f : row_weight[row]; }
};

// Sums over columns with policy x and reference y: of e^x, of e^y and of e^y (y - x), each relative to a maximum.
struct Sums {
  Softmax policy;
  float maximum = kLowest, sum = 0.0f, gap = 0.0f;

  __device__ __forceinline__ void raise(float to) {
    if (to <= maximum) return;
    const float rescale = __expf(maximum - to);
    sum *= rescale;
    gap = rescale == 0.0f ? 0.0f : gap * rescale;
    maximum = to;
  }
  __device__ __forceinline__ void add(const Sums& other) {
    policy.add(other.policy);
    raise(other.maximum);
    const float rescale = __expf(other.maximum - maximum);
    sum += other.sum * rescale;
    gap += rescale == 0.0f ? 0.0f : other.gap * rescale;
  }
};

struct Step {
  float x[kStep], y[kStep], slope[kStep];
};

// Columns from `column` on; beyond the block both are -inf.
template <bool SOFTCAP>
__device__ __forceinline__ Step load_pair(const Pair& p, int64_t row, int column) {
  Step out;
  load_step(p.policy + row * p.stride, column, p.width, out.x);
  load_step(p.reference + row * p.stride, column, p.width, out.y);
#pragma unroll
  for (int i = 0; i < kStep; ++i) {
    const bool inside = column + i < p.width;
    const Mapped mapped = map_logit<SOFTCAP>(out.x[i], p.map);
    out.x[i] = inside ? mapped.x : -INFINITY;
    out.slope[i] = mapped.slope;
    out.y[i] = inside ? map_logit<SOFTCAP>(out.y[i], p.map).x : -INFINITY;
  }
  return out;
}

// Of each row, kept from one block of columns to the next.
struct State {
  float *maximum, *sum, *ref_maximum, *ref_sum, *gap;
};

struct Outputs {
  float *kl, *lse, *ref_lse;
};

struct BlockShared {
  float values[kRowWarps][5];
};

template <bool SOFTCAP>
__global__ void __launch_bounds__(kRowThreads)
    block_kernel(Pair p, State state, Outputs outputs, bool first, bool last) {
  TK_SHARED(BlockShared, shared);
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize;
  if (p.weight(row) == 0.0f) {
    if (last && thread == 0) outputs.kl[row] = outputs.lse[row] = outputs.ref_lse[row] = 0.0f;
    return;
  }
  Sums sums;
  for (int column = thread * kStep; column < p.width; column += kTile) {
    const Step step = load_pair<SOFTCAP>(p, row, column);
    float top = step.x[0], ref_top = step.y[0];
#pragma unroll
    for (int i = 1; i < kStep; ++i) {
      top = fmaxf(top, step.x[i]);
      ref_top = fmaxf(ref_top, step.y[i]);
    }
    sums.policy.raise(top);
    sums.raise(ref_top);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const float exponential = __expf(step.y[i] - sums.maximum);
      sums.policy.sum += __expf(step.x[i] - sums.policy.maximum);
      sums.sum += exponential;
      // What the reference excludes adds nothing, also where the policy excludes it too.
      sums.gap += exponential == 0.0f ? 0.0f : exponential * (step.y[i] - step.x[i]);
    }
  }
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) {
    Sums other;
    other.policy.maximum = __shfl_xor_sync(kAllLanes, sums.policy.maximum, bits);
    other.policy.sum = __shfl_xor_sync(kAllLanes, sums.policy.sum, bits);
    other.maximum = __shfl_xor_sync(kAllLanes, sums.maximum, bits);
    other.sum = __shfl_xor_sync(kAllLanes, sums.sum, bits);
    other.gap = __shfl_xor_sync(kAllLanes, sums.gap, bits);
    sums.add(other);
  }
  if (thread % kWarpSize == 0) {
    float* values = shared.values[warp];
    values[0] = sums.policy.maximum;
    values[1] = sums.policy.sum;
    values[2] = sums.maximum;
    values[3] = sums.sum;
    values[4] = sums.gap;
  }
  __syncthreads();
  if (thread != 0) return;
  for (int i = 1; i < kRowWarps; ++i) {
    const float* values = shared.values[i];
    Sums other;
    other.policy.maximum = values[0];
    other.policy.sum = values[1];
    other.maximum = values[2];
    other.sum = values[3];
    other.gap = values[4];
    sums.add(other);
  }
  if (!first) {
    Sums before;
    before.policy.maximum = state.maximum[row];
    before.policy.sum = state.sum[row];
    before.maximum = state.ref_maximum[row];
    before.sum = state.ref_sum[row];
    before.gap = state.gap[row];
    sums.add(before);
  }
  if (last) {
    const float shift = (sums.policy.maximum - sums.maximum) + logf(sums.policy.sum / sums.sum);
    outputs.kl[row] = sums.gap / sums.sum + shift;
    outputs.lse[row] = sums.policy.maximum + logf(sums.policy.sum);
    outputs.ref_lse[row] = sums.maximum + logf(sums.sum);
  } else {
    state.maximum[row] = sums.policy.maximum;
    state.sum[row] = sums.policy.sum;
    state.ref_maximum[row] = sums.maximum;
    state.ref_sum[row] = sums.sum;
    state.gap[row] = sums.gap;
  }
}

// dz = d kl / d (W h) of a block from both logsumexps; `factor` becomes the row's weight, 0 if dropped.
// A row of dz may begin where that of the policy's logits does: its elements are no larger than theirs.
template <typename T, bool SOFTCAP>
__global__ void __launch_bounds__(kRowThreads)
    gradient_kernel(Pair p, T* dz, int64_t stride_dz, const float* lse, const float* ref_lse, float* factor) {
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const float weight = p.weight(row);
  dz += row * stride_dz;
  if (thread == 0) factor[row] = weight;
  if (weight == 0.0f) return zero_row(dz, p.width);
  const float normalizer = lse[row], ref_normalizer = ref_lse[row];
  for (int start = 0; start < p.width; start += kTile) {
    const int column = start + thread * kStep;
    const Step step = load_pair<SOFTCAP>(p, row, column);
    float values[kStep];
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const float dx = __expf(step.x[i] - normalizer) - __expf(step.y[i] - ref_normalizer);
      values[i] = dx * step.slope[i] * p.map.scale;
    }
    __syncthreads();  // all have read the tile, which dz may overwrite
    store_step(dz, column, p.width, values);
  }
}

[[maybe_unused]] void linear_kl_block_cuda(uintptr_t policy, uintptr_t reference, int64_t num_rows, int64_t width,
                                           int64_t stride, uintptr_t row_weight, float cap, float scale,
                                           uintptr_t maximum, uintptr_t sum, uintptr_t ref_maximum, uintptr_t ref_sum,
                                           uintptr_t gap, uintptr_t kl, uintptr_t lse, uintptr_t ref_lse, bool first,
                                           bool last, uintptr_t stream) {
  if (num_rows == 0) return;
  const Pair p{pointer<const float>(policy),
               pointer<const float>(reference),
               stride,
               pointer<const float>(row_weight),
               checked_int(width),
               {cap, scale}};
  const State state{pointer<float>(maximum), pointer<float>(sum), pointer<float>(ref_maximum), pointer<float>(ref_sum),
                    pointer<float>(gap)};
  const Outputs outputs{pointer<float>(kl), pointer<float>(lse), pointer<float>(ref_lse)};
  with_flag(cap != 0.0f, [&](auto softcap) {
    launch(block_kernel<softcap.value>, blocks_of(num_rows), kRowThreads, stream, p, state, outputs, first, last);
  });
}

[[maybe_unused]] void linear_kl_gradient_cuda(uintptr_t policy, uintptr_t reference, int64_t num_rows, int64_t width,
                                              int64_t stride, uintptr_t row_weight, float cap, float scale,
                                              uintptr_t dz, int element, int64_t stride_dz, uintptr_t lse,
                                              uintptr_t ref_lse, uintptr_t factor, uintptr_t stream) {
  if (num_rows == 0) return;
  const Pair p{pointer<const float>(policy),
               pointer<const float>(reference),
               stride,
               pointer<const float>(row_weight),
               checked_int(width),
               {cap, scale}};
  with_element(element, [&](auto type) {
    using T = decltype(type);
    with_flag(cap != 0.0f, [&](auto softcap) {
      launch(gradient_kernel<T, softcap.value>, blocks_of(num_rows), kRowThreads, stream, p, pointer<T>(dz), stride_dz,
             pointer<const float>(lse), pointer<const float>(ref_lse), pointer<float>(factor));
    });
  });
}

#ifdef TK_REGISTER
void bind(pybind11::module_& module) {
  module.def("linear_kl_block_cuda", &linear_kl_block_cuda);
  module.def("linear_kl_gradient_cuda", &linear_kl_gradient_cuda);
}
TK_REGISTER(bind);
#endif

}  // namespace
}  // namespace tk
