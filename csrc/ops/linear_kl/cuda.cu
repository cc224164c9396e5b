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
  int first, width;         // columns first ... first + width of V
  LogitMap map;

  __device__ __forceinline__ float weight(int64_t row) const { return row_weight == nullptr ? 1.0f : row_weight[row]; }
};

// Sums over columns with policy x and reference y: of e^x, of e^y and of e^y (y - x), each relative to a maximum. The
// column with the largest y, the first of several, stays out of them: where both models are sure of it, the others'
// sums are what it leaves, which no difference would tell.
struct Sums {
  Softmax policy;
  float maximum = kLowest, sum = 0.0f, gap = 0.0f;
  float x = 0.0f, y = kLowest;
  int top = INT32_MAX;

  __device__ __forceinline__ void raise(float to) {
    if (to <= maximum) return;
    const float rescale = __expf(maximum - to);
    sum *= rescale;
    gap = rescale == 0.0f ? 0.0f : gap * rescale;
    maximum = to;
  }
  // One column. A NaN becomes no maximum and makes the sums NaN.
  __device__ __forceinline__ void join(float at_x, float at_y) {
    policy.add(at_x);
    raise(at_y);
    const float exponential = __expf(at_y - maximum);
    sum += exponential;
    // What the reference excludes adds nothing, also where the policy excludes it too.
    gap += exponential == 0.0f ? 0.0f : exponential * (at_y - at_x);
  }
  // Of the column and the largest so far, the smaller one joins the others.
  __device__ __forceinline__ void add(float at_x, float at_y, int column) {
    if (!(at_y > y || (at_y == y && column < top))) return join(at_x, at_y);
    if (top != INT32_MAX) join(x, y);
    x = at_x;
    y = at_y;
    top = column;
  }
  __device__ __forceinline__ void add(const Sums& other) {
    policy.add(other.policy);
    raise(other.maximum);
    const float rescale = __expf(other.maximum - maximum);
    sum += other.sum * rescale;
    gap += rescale == 0.0f ? 0.0f : other.gap * rescale;
    if (other.top != INT32_MAX) add(other.x, other.y, other.top);
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
  float *maximum, *sum, *ref_maximum, *ref_sum, *gap, *pivot, *ref_pivot;
  int64_t* top;
};

struct Outputs {
  float *kl, *lse, *ref_lse, *logp, *ref_logp;
};

struct BlockShared {
  float values[kRowWarps][7];
  int tops[kRowWarps];
};

template <bool SOFTCAP>
__global__ void __launch_bounds__(kRowThreads) block_kernel(Pair p, State state, Outputs outputs, bool last) {
  TK_SHARED(BlockShared, shared);
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize;
  if (p.weight(row) == 0.0f) {
    if (last && thread == 0) {
      outputs.kl[row] = outputs.lse[row] = outputs.ref_lse[row] = outputs.logp[row] = outputs.ref_logp[row] = 0.0f;
      state.top[row] = 0;
    }
    return;
  }
  Sums sums;
  for (int column = thread * kStep; column < p.width; column += kTile) {
    const Step step = load_pair<SOFTCAP>(p, row, column);
    float best = step.x[0], ref_best = step.y[0];
#pragma unroll
    for (int i = 1; i < kStep; ++i) {
      best = fmaxf(best, step.x[i]);
      ref_best = fmaxf(ref_best, step.y[i]);
    }
    sums.policy.raise(best);
    sums.raise(ref_best);
    if (ref_best > sums.y) {  // seldom, after the first few
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        if (column + i < p.width) sums.add(step.x[i], step.y[i], p.first + column + i);
      }
      continue;
    }
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const float exponential = __expf(step.y[i] - sums.maximum);
      sums.policy.sum += __expf(step.x[i] - sums.policy.maximum);
      sums.sum += exponential;
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
    other.x = __shfl_xor_sync(kAllLanes, sums.x, bits);
    other.y = __shfl_xor_sync(kAllLanes, sums.y, bits);
    other.top = __shfl_xor_sync(kAllLanes, sums.top, bits);
    sums.add(other);
  }
  if (thread % kWarpSize == 0) {
    float* values = shared.values[warp];
    values[0] = sums.policy.maximum;
    values[1] = sums.policy.sum;
    values[2] = sums.maximum;
    values[3] = sums.sum;
    values[4] = sums.gap;
    values[5] = sums.x;
    values[6] = sums.y;
    shared.tops[warp] = sums.top;
  }
  __syncthreads();
  if (thread != 0) return;
  for (int i = 1; i < kRowWarps; ++i) {
    const float* values = shared.values[i];
    sums.add({{values[0], values[1]}, values[2], values[3], values[4], values[5], values[6], shared.tops[i]});
  }
  if (p.first != 0)
    sums.add({{state.maximum[row], state.sum[row]},
              state.ref_maximum[row],
              state.ref_sum[row],
              state.gap[row],
              state.pivot[row],
              state.ref_pivot[row],
              static_cast<int>(state.top[row])});
  state.top[row] = sums.top;
  if (last) {
    Softmax ref_others;
    ref_others.maximum = sums.maximum;
    ref_others.sum = sums.sum;
    const LogProb at = log_prob(sums.x, sums.policy), ref_at = log_prob(sums.y, ref_others);
    if (sums.top == INT32_MAX) state.top[row] = 0;  // nothing but NaN, which the sums hold
    // lse - ref_lse: from the pivot's logits where it has most of the probability, else without either's size.
    const float totals =
        (sums.policy.sum + expf(sums.x - sums.policy.maximum)) / (sums.sum + expf(sums.y - sums.maximum));
    float shift = (sums.policy.maximum - sums.maximum) + logf(totals);
    if (at.logp > -1.0f) shift = (sums.x - sums.y) - at.logp + ref_at.logp;
    if (sums.y - sums.maximum > 80.0f && !(at.logp > -1.0f)) shift = at.lse - ref_at.lse;
    const float others = expf(sums.maximum - ref_at.lse) * (sums.gap + (sums.sum == 0.0f ? 0.0f : sums.sum * shift));
    outputs.kl[row] = others + expf(ref_at.logp) * (ref_at.logp - at.logp);
    if (ref_at.logp < -0.7f) {  // the reference is sure of nothing: the same with less rounding
      const float own = expf(sums.y - sums.maximum);
      outputs.kl[row] = (sums.gap + own * (sums.y - sums.x)) / (sums.sum + own) + shift;
    }
    outputs.lse[row] = at.lse;
    outputs.ref_lse[row] = ref_at.lse;
    outputs.logp[row] = at.logp;
    outputs.ref_logp[row] = ref_at.logp;
  } else {
    state.maximum[row] = sums.policy.maximum;
    state.sum[row] = sums.policy.sum;
    state.ref_maximum[row] = sums.maximum;
    state.ref_sum[row] = sums.sum;
    state.gap[row] = sums.gap;
    state.pivot[row] = sums.x;
    state.ref_pivot[row] = sums.y;
  }
}

// What is known of the rows, [R] each: logsumexps, and p - q of one class.
struct Known {
  const float *lse, *ref_lse;
  const int64_t* pivot;
  const float* difference;
};

// dz = d kl / d (W h) of a block from both logsumexps; `factor` becomes the row's weight, 0 if dropped.
// A row of dz may begin where that of the policy's logits does: its elements are no larger than theirs.
template <typename T, bool SOFTCAP>
__global__ void __launch_bounds__(kRowThreads)
    gradient_kernel(Pair p, T* dz, int64_t stride_dz, Known known, float* factor) {
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const float weight = p.weight(row);
  dz += row * stride_dz;
  if (thread == 0) factor[row] = weight;
  if (weight == 0.0f) return zero_row(dz, p.width);
  const float normalizer = known.lse[row], ref_normalizer = known.ref_lse[row];
  const int64_t pivot = known.pivot[row] - p.first;
  for (int start = 0; start < p.width; start += kTile) {
    const int column = start + thread * kStep;
    const Step step = load_pair<SOFTCAP>(p, row, column);
    float values[kStep];
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const float dx = column + i == pivot ? known.difference[row]
                                           : __expf(step.x[i] - normalizer) - __expf(step.y[i] - ref_normalizer);
      values[i] = dx * step.slope[i] * p.map.scale;
    }
    __syncthreads();  // all have read the tile, which dz may overwrite
    store_step(dz, column, p.width, values);
  }
}

Pair pair_of(uintptr_t policy, uintptr_t reference, int64_t stride, int64_t first, int64_t width, uintptr_t row_weight,
             float cap, float scale) {
  return {pointer<const float>(policy),
          pointer<const float>(reference),
          stride,
          pointer<const float>(row_weight),
          checked_int(first),
          checked_int(width),
          {cap, scale}};
}

[[maybe_unused]] void linear_kl_block_cuda(uintptr_t policy, uintptr_t reference, int64_t num_rows, int64_t width,
                                           int64_t stride, int64_t first, uintptr_t row_weight, float cap, float scale,
                                           uintptr_t maximum, uintptr_t sum, uintptr_t ref_maximum, uintptr_t ref_sum,
                                           uintptr_t gap, uintptr_t pivot, uintptr_t ref_pivot, uintptr_t top,
                                           uintptr_t kl, uintptr_t lse, uintptr_t ref_lse, uintptr_t logp,
                                           uintptr_t ref_logp, bool last, uintptr_t stream) {
  if (num_rows == 0) return;
  const Pair p = pair_of(policy, reference, stride, first, width, row_weight, cap, scale);
  const State state{pointer<float>(maximum),   pointer<float>(sum),  pointer<float>(ref_maximum),
                    pointer<float>(ref_sum),   pointer<float>(gap),  pointer<float>(pivot),
                    pointer<float>(ref_pivot), pointer<int64_t>(top)};
  const Outputs outputs{pointer<float>(kl), pointer<float>(lse), pointer<float>(ref_lse), pointer<float>(logp),
                        pointer<float>(ref_logp)};
  with_flag(cap != 0.0f, [&](auto softcap) {
    launch(block_kernel<softcap.value>, blocks_of(num_rows), kRowThreads, stream, p, state, outputs, last);
  });
}

[[maybe_unused]] void linear_kl_gradient_cuda(uintptr_t policy, uintptr_t reference, int64_t num_rows, int64_t width,
                                              int64_t stride, int64_t first, uintptr_t row_weight, float cap,
                                              float scale, uintptr_t dz, int element, int64_t stride_dz, uintptr_t lse,
                                              uintptr_t ref_lse, uintptr_t pivot, uintptr_t difference,
                                              uintptr_t factor, uintptr_t stream) {
  if (num_rows == 0) return;
  const Pair p = pair_of(policy, reference, stride, first, width, row_weight, cap, scale);
  const Known known{pointer<const float>(lse), pointer<const float>(ref_lse), pointer<const int64_t>(pivot),
                    pointer<const float>(difference)};
  with_element(element, [&](auto type) {
    using T = decltype(type);
    with_flag(cap != 0.0f, [&](auto softcap) {
      launch(gradient_kernel<T, softcap.value>, blocks_of(num_rows), kRowThreads, stream, p, pointer<T>(dz), stride_dz,
             known, pointer<float>(factor));
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
