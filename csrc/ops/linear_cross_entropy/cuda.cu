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
  const float* bias;       // [V] or null
  const int64_t* targets;  // [R, num_targets]
  int num_targets;
  const float* row_weight;  // rows of weight 0 are dropped; null: none
  int first, width, num_classes;
  int64_t ignore_index;
  LogitMap map;

  __device__ __forceinline__ int64_t target(int64_t row, int k) const { return targets[row * num_targets + k]; }
  __device__ __forceinline__ bool kept(int64_t row) const {
    bool any = false;
    for (int k = 0; k < num_targets; ++k) any |= target(row, k) != ignore_index;
    return any && (row_weight == nullptr || row_weight[row] != 0.0f);
  }
  __device__ __forceinline__ bool is_class(int64_t label) const { return label >= 0 && label < num_classes; }
  // Whether each target is a class, ignored, or another rank's.
  __device__ __forceinline__ bool known(int64_t row) const {
    bool all = true;
    for (int k = 0; k < num_targets; ++k) {
      const int64_t label = target(row, k);
      all &= is_class(label) || label == ignore_index || label == kNoLabel;
    }
    return all;
  }
  // A class's column in the block, or a number outside it.
  __device__ __forceinline__ int place(int64_t label) const {
    return is_class(label) ? static_cast<int>(label) - first : -1;
  }
};

// [R] each: what exponentials are relative to, their sum without the largest class, that class and its logit, the sum
// of exp(x - reference) (x - reference) over the same classes; and [R, K] the raw logits of the targets.
struct State {
  float *reference, *others, *pivot, *gap;
  int64_t* top;
  float* labels;
};

// What is written of the rows; null: not wanted.
struct Stats {
  float *logp, *lse;
  int64_t* top;
  float *top_logp, *entropy, *slope;
};

// See trace_kernels/shared/linear.py.
struct Gradient {
  const float *lse, *constant, *log, *at_target;
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

// Blocks of block_kernel that a processor must hold. Left alone, the compiler keeps to the registers of one block more
// and puts two of a thread's numbers on the stack.
template <bool WRITE, bool ENTROPY>
constexpr int kBlocks = WRITE || ENTROPY ? 5 : 8;

struct BlockShared {
  float tops[2][kRowWarps], sums[kRowWarps], gaps[kRowWarps];
  int places[kRowWarps];
};

// Adds a block of logits to each row's softmax. The largest class stays out of `others`. With WRITE, dz becomes
// exp(x - reference) * dx/dz; finish_kernel knows its factor. The reference lags the maximum by at most kLag, so that
// it seldom moves and what is written seldom has to be read again.
template <typename T, bool SOFTCAP, bool WRITE, bool ENTROPY>
__global__ void __launch_bounds__(kRowThreads, kBlocks<WRITE, ENTROPY>) block_kernel(Block p, T* dz, State state) {
  TK_SHARED(BlockShared, shared);
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
  dz += row * p.stride_dz;
  if (!p.kept(row)) {
    if (WRITE) zero_row(dz + p.first, p.width);
    return;
  }
  const float* logits = p.logits + row * p.stride;
  float reference = kLowest, pivot = kLowest, before = 0.0f, gap_before = 0.0f, sum = 0.0f, gap = 0.0f;
  int top = -1;
  if (p.first != 0) {
    reference = state.reference[row];
    pivot = state.pivot[row];
    top = static_cast<int>(state.top[row]);
    before = state.others[row];
    if (ENTROPY) gap_before = state.gap[row];
  }
  // Every thread has read the state before thread 0 writes it: the loop below has a barrier, and width is above 0.
  int turn = 0;
#pragma unroll 1
  for (int start = 0; start < p.width; start += kTile, turn ^= 1) {
    const int column = start + thread * kStep;
    Mapped mapped[kStep];
    load_logits<SOFTCAP>(p, logits, column, mapped);
    float best = mapped[0].x;
#pragma unroll
    for (int i = 1; i < kStep; ++i) best = fmaxf(best, mapped[i].x);
    best = warp_max(best);
    if (lane == 0) shared.tops[turn][warp] = best;
    __syncthreads();
    best = shared.tops[turn][0];
#pragma unroll
    for (int i = 1; i < kRowWarps; ++i) best = fmaxf(best, shared.tops[turn][i]);
    if (best > pivot) {  // the same in all threads
      if (best > reference + kLag) {
        const float rescale = __expf(reference - best);
        if (ENTROPY) {
          gap = rescale * (gap + sum * (reference - best));
          gap_before = rescale * (gap_before + before * (reference - best));
        }
        sum *= rescale;
        before *= rescale;
        // A thread wrote what it reads here, in this launch; other blocks of columns were written by earlier ones.
        if (WRITE) {
#pragma unroll 2
          for (int done = thread * kStep; done < p.first + start; done += kTile) {
#pragma unroll
            for (int i = 0; i < kStep; ++i) dz[done + i] = from_float<T>(to_float(dz[done + i]) * rescale);
          }
        }
        reference = best;
      }
      // The pivot so far joins the others.
      const float joining = __expf(pivot - reference);
      before += joining;
      if (ENTROPY) gap_before += joining * (pivot - reference);
      int place = INT32_MAX;
#pragma unroll
      for (int i = kStep - 1; i >= 0; --i) {
        if (mapped[i].x == best) place = column + i;
      }
#pragma unroll
      for (int bits = kWarpSize / 2; bits > 0; bits /= 2) place = min(place, __shfl_xor_sync(kAllLanes, place, bits));
      if (lane == 0) shared.places[warp] = place;
      __syncthreads();
      place = shared.places[0];
      for (int i = 1; i < kRowWarps; ++i) place = min(place, shared.places[i]);
      __syncthreads();  // all have read it before the next tile writes
      pivot = best;
      top = p.first + place;
    }
    float values[kStep];
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const float exponential = __expf(mapped[i].x - reference);
      const float rest = p.first + column + i == top ? 0.0f : exponential;
      sum += rest;
      if (ENTROPY) gap += rest == 0.0f ? 0.0f : rest * (mapped[i].x - reference);
      values[i] = exponential * mapped[i].slope;
    }
    if (WRITE) store_step(dz + p.first, column, p.width, values);
  }
  sum = warp_sum(sum);
  if (ENTROPY) gap = warp_sum(gap);
  if (lane == 0) {
    shared.sums[warp] = sum;
    if (ENTROPY) shared.gaps[warp] = gap;
  }
  __syncthreads();
  for (int k = thread; k < p.num_targets; k += kRowThreads) {
    const int label = p.place(p.target(row, k));
    float* out = state.labels + row * p.num_targets + k;
    if (label >= 0 && label < p.width) {
      *out = logits[label] + (p.bias == nullptr ? 0.0f : p.bias[p.first + label]);
    } else if (p.first == 0) {
      *out = NAN;  // what a label that is no class keeps
    }
  }
  if (thread != 0) return;
  for (int i = 0; i < kRowWarps; ++i) {
    before += shared.sums[i];
    if (ENTROPY) gap_before += shared.gaps[i];
  }
  state.reference[row] = reference;
  state.others[row] = before;
  state.pivot[row] = pivot;
  state.top[row] = top;
  if (ENTROPY) state.gap[row] = gap_before;
}

// The stats of the rows' states; with `factor` dz at the targets, and factor * dz = d logp / d (W h). With `exclude` dz
// is 0 at the targets, and factor * dz the softmax times dz / d (W h) elsewhere.
template <typename T, bool SOFTCAP>
__global__ void __launch_bounds__(kRowThreads)
    finish_kernel(Block p, int64_t num_rows, T* dz, State state, Stats stats, float* factor, bool exclude) {
  const int64_t row = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  if (row >= num_rows) return;
  const bool kept = p.kept(row);
  const float reference = kept ? state.reference[row] : 0.0f, others = kept ? state.others[row] : 0.0f;
  const float pivot = kept ? state.pivot[row] : 0.0f;
  const int64_t top = kept ? state.top[row] : 0;
  // A row of which nothing is above -1e30 has no probabilities.
  const float top_logp = top < 0 ? NAN : largest_logp(pivot, reference, others);
  const float normalizer = others + expf(pivot - reference);
  stats.lse[row] = kept ? pivot - top_logp : 0.0f;
  if (stats.entropy != nullptr) {
    const float back = expf(reference - pivot), share = others * back;
    const float weighted = kept ? back * (state.gap[row] + others * (reference - pivot)) : 0.0f;
    stats.top[row] = top;
    stats.top_logp[row] = kept ? top_logp : 0.0f;
    stats.entropy[row] = kept ? -top_logp - weighted / (1.0f + share) : 0.0f;
  }
  if (factor != nullptr) {
    const float scale = (exclude ? p.map.scale : -p.map.scale) / normalizer;
    factor[row] = !kept ? 0.0f : p.known(row) ? scale : NAN;
  }
  for (int k = 0; k < p.num_targets; ++k) {
    const int64_t label = p.target(row, k), at = row * p.num_targets + k;
    const bool scored = kept && label != p.ignore_index;
    const Mapped mapped = map_logit<SOFTCAP>(scored ? state.labels[at] : 0.0f, p.map);
    const float difference = label == top ? 0.0f : label == kNoLabel ? -INFINITY : mapped.x - pivot;
    stats.logp[at] = scored ? difference + top_logp : 0.0f;
    const bool valid = scored && p.is_class(label);
    if (stats.slope != nullptr) stats.slope[at] = valid ? mapped.slope * p.map.scale : 0.0f;
    if (factor == nullptr || !valid) continue;
    // 1 - p is the others' share: no difference of two roundings.
    const float left = label == top ? others : normalizer - expf(mapped.x - reference);
    dz[row * p.stride_dz + label] = from_float<T>(exclude ? 0.0f : -left * mapped.slope);
  }
}

// dz of a block from the known logsumexp. `factor` becomes the row's weight, or 1 without one, and 0 where the row is
// dropped.
template <typename T, bool SOFTCAP>
__global__ void __launch_bounds__(kRowThreads) gradient_kernel(Block p, T* dz, Gradient gradient, float* factor) {
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  dz += row * p.stride_dz + p.first;
  if (!p.kept(row)) {
    if (thread == 0) factor[row] = 0.0f;
    return zero_row(dz, p.width);
  }
  const float* logits = p.logits + row * p.stride;
  const float normalizer = gradient.lse[row], constant = gradient.constant[row];
  const float log = gradient.log == nullptr ? 0.0f : gradient.log[row];
  if (thread == 0) factor[row] = !p.known(row) ? NAN : p.row_weight == nullptr ? 1.0f : p.row_weight[row];
  for (int column = thread * kStep; column < p.width; column += kTile) {
    Mapped mapped[kStep];
    load_logits<SOFTCAP>(p, logits, column, mapped);
    float values[kStep];
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const float log_p = mapped[i].x - normalizer, probability = __expf(log_p);
      const float weight = probability == 0.0f ? constant : constant + log * log_p;
      values[i] = probability * weight * mapped[i].slope * p.map.scale;
    }
    store_step(dz, column, p.width, values);
  }
  __syncthreads();  // what follows is written by whichever thread
#pragma unroll 1
  for (int k = thread; k < p.num_targets; k += kRowThreads) {
    const int label = p.place(p.target(row, k));
    if (label < 0 || label >= p.width) continue;
    const float z = logits[label] + (p.bias == nullptr ? 0.0f : p.bias[p.first + label]);
    const Mapped mapped = map_logit<SOFTCAP>(z, p.map);
    dz[label] = from_float<T>(gradient.at_target[row * p.num_targets + k] * mapped.slope * p.map.scale);
  }
}

Block block_of(uintptr_t logits, int64_t stride, int64_t stride_dz, uintptr_t bias, uintptr_t targets, int num_targets,
               uintptr_t row_weight, int64_t num_classes, int64_t ignore_index, float cap, float scale, int64_t first,
               int64_t width) {
  return {pointer<const float>(logits),
          stride,
          stride_dz,
          pointer<const float>(bias),
          pointer<const int64_t>(targets),
          num_targets,
          pointer<const float>(row_weight),
          checked_int(first),
          checked_int(width),
          checked_int(num_classes),
          ignore_index,
          {cap, scale}};
}

State state_of(uintptr_t reference, uintptr_t others, uintptr_t pivot, uintptr_t gap, uintptr_t top, uintptr_t labels) {
  return {pointer<float>(reference), pointer<float>(others), pointer<float>(pivot),
          pointer<float>(gap),       pointer<int64_t>(top),  pointer<float>(labels)};
}

[[maybe_unused]] void linear_block_cuda(uintptr_t logits, int64_t num_rows, int64_t stride, uintptr_t dz, int element,
                                        int64_t stride_dz, uintptr_t bias, uintptr_t targets, int num_targets,
                                        uintptr_t row_weight, int64_t num_classes, int64_t ignore_index, float cap,
                                        float scale, int64_t first, int64_t width, uintptr_t reference,
                                        uintptr_t others, uintptr_t pivot, uintptr_t gap, uintptr_t top,
                                        uintptr_t labels, bool write, bool entropy, uintptr_t stream) {
  const Block p = block_of(logits, stride, stride_dz, bias, targets, num_targets, row_weight, num_classes, ignore_index,
                           cap, scale, first, width);
  const State state = state_of(reference, others, pivot, gap, top, labels);
  // What a thread scales again when the reference moves it must have written itself in this launch.
  if (first % kTile != 0) throw std::invalid_argument("linear_block_cuda: a block starts at a multiple of a tile");
  if (num_rows == 0) return;
  with_element(element, [&](auto type) {
    using T = decltype(type);
    with_flag(cap != 0.0f, [&](auto softcap) {
      with_flag(write, [&](auto writes) {
        with_flag(entropy, [&](auto entropies) {
          launch(block_kernel<T, softcap.value, writes.value, entropies.value>, blocks_of(num_rows), kRowThreads,
                 stream, p, pointer<T>(dz), state);
        });
      });
    });
  });
}

[[maybe_unused]] void linear_finish_cuda(int64_t num_rows, uintptr_t dz, int element, int64_t stride_dz, uintptr_t bias,
                                         uintptr_t targets, int num_targets, uintptr_t row_weight, int64_t num_classes,
                                         int64_t ignore_index, float cap, float scale, uintptr_t reference,
                                         uintptr_t others, uintptr_t pivot, uintptr_t gap, uintptr_t top,
                                         uintptr_t labels, uintptr_t logp, uintptr_t lse, uintptr_t top_class,
                                         uintptr_t top_logp, uintptr_t entropy, uintptr_t slope, uintptr_t factor,
                                         bool exclude, uintptr_t stream) {
  const Block p =
      block_of(0, 0, stride_dz, bias, targets, num_targets, row_weight, num_classes, ignore_index, cap, scale, 0, 0);
  const State state = state_of(reference, others, pivot, gap, top, labels);
  const Stats stats{pointer<float>(logp),     pointer<float>(lse),     pointer<int64_t>(top_class),
                    pointer<float>(top_logp), pointer<float>(entropy), pointer<float>(slope)};
  with_element(element, [&](auto type) {
    using T = decltype(type);
    with_flag(cap != 0.0f, [&](auto softcap) {
      launch(finish_kernel<T, softcap.value>, blocks_of(ceil_div(num_rows, kRowThreads)), kRowThreads, stream, p,
             num_rows, pointer<T>(dz), state, stats, pointer<float>(factor), exclude);
    });
  });
}

[[maybe_unused]] void linear_gradient_cuda(uintptr_t logits, int64_t num_rows, int64_t stride, uintptr_t dz,
                                           int element, int64_t stride_dz, uintptr_t bias, uintptr_t targets,
                                           int num_targets, uintptr_t row_weight, int64_t num_classes,
                                           int64_t ignore_index, float cap, float scale, int64_t first, int64_t width,
                                           uintptr_t lse, uintptr_t constant, uintptr_t log, uintptr_t at_target,
                                           uintptr_t factor, uintptr_t stream) {
  const Block p = block_of(logits, stride, stride_dz, bias, targets, num_targets, row_weight, num_classes, ignore_index,
                           cap, scale, first, width);
  const Gradient gradient{pointer<const float>(lse), pointer<const float>(constant), pointer<const float>(log),
                          pointer<const float>(at_target)};
  with_element(element, [&](auto type) {
    using T = decltype(type);
    with_flag(cap != 0.0f, [&](auto softcap) {
      launch(gradient_kernel<T, softcap.value>, blocks_of(num_rows), kRowThreads, stream, p, pointer<T>(dz), gradient,
             pointer<float>(factor));
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
