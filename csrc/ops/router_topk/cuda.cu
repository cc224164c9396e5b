// router_topk on the GPU: one warp per token, the row in registers, k rounds of a maximum over the warp.
//
// Numbers are compared as order-preserving keys: unsigned integers that order as the floats do, NaN above all. A key
// of 0 is no expert, or one already chosen.
#include <cmath>

#include "common/cuda.cuh"
#include "ops/router_topk/router.cuh"

namespace tk {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMostExperts = 1024;
constexpr int kMostChosen = 64;
constexpr int kPerSlot = kMostChosen / kWarpSize;  // chosen experts that a lane keeps

// Strides in elements; null where absent. Outputs are contiguous.
struct Router : RouterRule {
  int64_t num_tokens, stride_t, stride_e;
  int num_experts;
  const float* bias;  // [E]
  const bool* mask;
  int64_t mask_stride;
  const float* table;    // [E]
  const int64_t* given;  // [T, k], the experts of each token; null: choose them
  void* weights;         // [T, k]
  Element weights_type;
  int64_t* indices;            // [T, k]
  float* chosen;               // [T, k]
  float* stats;                // [T, 2]: maximum m and sum of e^(z - m), for the gradient
  unsigned long long* counts;  // [E], added to
  int64_t counts_stride;
  float* score;  // [T], added to
  int64_t score_stride;
};

struct Bins {
  unsigned counts[kMostExperts];
};

__device__ __forceinline__ unsigned ordered(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);  // -0 becomes 0
  if (x != x) return ~0u;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The float that `ordered` was given.
__device__ __forceinline__ float number_of(unsigned key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ float element_score(float z, Score function) {
  if (function == Score::sigmoid) return 1.0f / (1.0f + expf(-z));
  if (function == Score::sqrtsoftplus) return sqrtf(fmaxf(z, 0.0f) + log1pf(expf(-fabsf(z))));
  return z;
}

// Keys of one row, spread over the warp: lane l holds those of the numbers l, l + 32, ...
template <int N>
struct Keys {
  unsigned keys[N];

  static __device__ __forceinline__ int number(int i) {
    return i * kWarpSize + static_cast<int>(threadIdx.x) % kWarpSize;
  }

  // The largest key of all, the same in every lane.
  __device__ __forceinline__ unsigned largest() const {
    unsigned best = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) best = max(best, keys[i]);
    return __reduce_max_sync(kAllLanes, best);
  }

  // The lowest number that has this key.
  __device__ __forceinline__ int lowest_with(unsigned key) const {
    unsigned lowest = ~0u;
#pragma unroll
    for (int i = N - 1; i >= 0; --i) lowest = keys[i] == key ? number(i) : lowest;
    return static_cast<int>(__reduce_min_sync(kAllLanes, lowest));
  }

  __device__ __forceinline__ void set(int which, unsigned key) {
#pragma unroll
    for (int i = 0; i < N; ++i) keys[i] = number(i) == which ? key : keys[i];
  }
};

// Replaces the choice of experts outside the best groups.
template <int N>
__device__ __forceinline__ void mask_groups(const Router& p, float (&choice)[N]) {
  const int members = p.num_experts / p.num_groups;
  Keys<N> groups{};
  for (int group = 0; group < p.num_groups; ++group) {
    Keys<N> own;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int offset = Keys<N>::number(i) - group * members;
      own.keys[i] = offset >= 0 && offset < members ? ordered(choice[i]) : 0;
    }
    unsigned key = own.largest();
    float sum = number_of(key);
    for (int next = 1; next < p.group_best; ++next) {
      own.set(own.lowest_with(key), 0);
      key = own.largest();
      sum += number_of(key);
    }
    groups.set(group, ordered(sum));
  }
  unsigned kept = 0;  // bit i: whether group number(i) is
  for (int round = 0; round < p.topk_groups; ++round) {
    const int best = groups.lowest_with(groups.largest());
    groups.set(best, 0);
#pragma unroll
    for (int i = 0; i < N; ++i) kept |= Keys<N>::number(i) == best ? 1u << i : 0u;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int group = min(Keys<N>::number(i) / members, p.num_groups - 1);
    const unsigned of_group = __shfl_sync(kAllLanes, kept, group % kWarpSize);
    if (!(of_group >> (group / kWarpSize) & 1u)) choice[i] = p.masked_group_value;
  }
}

// The experts given for token t into the lanes' slots. Wrong is what is no expert, or stands in another slot too: its
// weight is NaN, because the host does not wait for the device to raise an error.
__device__ __forceinline__ void take_given(const Router& p, int64_t t, int (&index)[kPerSlot],
                                           bool (&wrong)[kPerSlot]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int i = 0; i < kPerSlot; ++i) {
    const int slot = i * kWarpSize + lane;
    if (slot >= p.top_k) continue;
    const int64_t expert = p.given[t * p.top_k + slot];
    const bool real = expert >= 0 && expert < p.num_experts;
    wrong[i] = !real;
    index[i] = real ? static_cast<int>(expert) : 0;
  }
  for (int slot = 0; slot < p.top_k; ++slot) {
    const int other = __shfl_sync(kAllLanes, slot < kWarpSize ? index[0] : index[kPerSlot - 1], slot % kWarpSize);
#pragma unroll
    for (int i = 0; i < kPerSlot; ++i) {
      const int mine = i * kWarpSize + lane;
      wrong[i] |= mine != slot && mine < p.top_k && index[i] == other;
    }
  }
}

// Blocks that a processor must hold, by the experts that a lane holds. Left alone, the compiler takes up to 112
// registers for 8 experts where 71 do.
constexpr int blocks_with(int experts) { return experts <= 4 ? 4 : experts <= 8 ? 3 : experts <= 16 ? 2 : 1; }

// N: experts that a lane holds. PACKED: bfloat16 logits are the choice; key and expert fit into one word.
template <typename T, int N, bool PACKED>
__global__ void __launch_bounds__(kThreads, blocks_with(N)) forward_kernel(const T* logits, Router p) {
  TK_SHARED(Bins, bins);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  if (p.counts != nullptr) {
    for (int e = threadIdx.x; e < p.num_experts; e += kThreads) bins.counts[e] = 0;
    __syncthreads();
  }
  for (int64_t t = int64_t{blockIdx.x} * kWarps + warp; t < p.num_tokens; t += int64_t{gridDim.x} * kWarps) {
    const T* row = logits + t * p.stride_t;
    float z[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int e = Keys<N>::number(i);
      z[i] = e < p.num_experts ? to_float(row[e * p.stride_e]) : -INFINITY;
    }
    float largest = 0.0f, total = 1.0f;
    if (p.score_function == Score::softmax) {
      largest = z[0];
#pragma unroll
      for (int i = 1; i < N; ++i) largest = fmaxf(largest, z[i]);
      largest = warp_max(largest);
      total = 0.0f;
#pragma unroll
      for (int i = 0; i < N; ++i) total += Keys<N>::number(i) < p.num_experts ? expf(z[i] - largest) : 0.0f;
      total = warp_sum(total);
      if (p.stats != nullptr && lane == 0) {
        p.stats[2 * t] = largest;
        p.stats[2 * t + 1] = total;
      }
    }

    Keys<N> keys;
    if constexpr (!PACKED) {
      if (p.bias != nullptr || p.num_groups > 1) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const int e = Keys<N>::number(i);
          z[i] =
              p.score_function == Score::softmax ? expf(z[i] - largest) / total : element_score(z[i], p.score_function);
          if (p.bias != nullptr && e < p.num_experts) z[i] += p.bias[e];
        }
        if (p.num_groups > 1) mask_groups<N>(p, z);
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int e = Keys<N>::number(i);
      const unsigned key = PACKED ? (ordered(z[i]) & 0xffff0000u) | (0xffffu - e) : ordered(z[i]);
      keys.keys[i] = e < p.num_experts ? key : 0;
    }

    int index[kPerSlot] = {};   // of the slots lane, lane + 32, ...
    bool wrong[kPerSlot] = {};  // no expert, or another slot's
    if (p.given != nullptr) take_given(p, t, index, wrong);
    for (int slot = 0; p.given == nullptr && slot < p.top_k; ++slot) {
      const unsigned best = keys.largest();
      const int found = PACKED ? static_cast<int>(0xffffu - (best & 0xffffu)) : keys.lowest_with(best);
      keys.set(found, 0);
#pragma unroll
      for (int i = 0; i < kPerSlot; ++i) index[i] = slot == i * kWarpSize + lane ? found : index[i];
    }

    float value[kPerSlot], picked[kPerSlot];
    bool used[kPerSlot];
#pragma unroll
    for (int i = 0; i < kPerSlot; ++i) {
      used[i] = i * kWarpSize + lane < p.top_k;
      picked[i] = used[i] ? to_float(row[index[i] * p.stride_e]) : -INFINITY;
      if (wrong[i]) picked[i] = NAN;
    }
    if (p.score_function == Score::softmax_topk) {
      float top = picked[0];
#pragma unroll
      for (int i = 1; i < kPerSlot; ++i) top = fmaxf(top, picked[i]);
      top = warp_max(top);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kPerSlot; ++i) {
        value[i] = used[i] ? expf(picked[i] - top) : 0.0f;
        sum += value[i];
      }
      sum = warp_sum(sum);
#pragma unroll
      for (int i = 0; i < kPerSlot; ++i) value[i] /= sum;
    } else {
#pragma unroll
      for (int i = 0; i < kPerSlot; ++i) {
        value[i] = p.score_function == Score::softmax ? expf(picked[i] - largest) / total
                                                      : element_score(picked[i], p.score_function);
      }
    }
    float denominator = 1.0f;
    if (p.renormalize) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kPerSlot; ++i) sum += used[i] ? value[i] : 0.0f;
      denominator = warp_sum(sum) + p.eps;
    }
    const bool counted = p.counts != nullptr && (p.mask == nullptr || p.mask[t * p.mask_stride]);
    float score = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerSlot; ++i) {
      if (!used[i]) continue;
      const int64_t at = t * p.top_k + i * kWarpSize + lane;
      p.indices[at] = p.given == nullptr ? index[i] : p.given[at];
      if (p.chosen != nullptr) p.chosen[at] = value[i];
      store_as(p.weights, p.weights_type, at, value[i] / denominator * p.scale);
      if (wrong[i]) continue;
      if (counted) atomicAdd(&bins.counts[index[i]], 1u);
      if (p.table != nullptr) score += p.table[index[i]];
    }
    // A fixed tree of additions and one writer: the same score on every run.
    if (p.table != nullptr) {
      score = warp_sum(score);
      if (lane == 0) p.score[t * p.score_stride] += score;
    }
  }
  if (p.counts == nullptr) return;
  __syncthreads();
  for (int e = threadIdx.x; e < p.num_experts; e += kThreads) {
    if (bins.counts[e] != 0) atomicAdd(&p.counts[e * p.counts_stride], static_cast<unsigned long long>(bins.counts[e]));
  }
}

template <typename T, bool PACKED>
void forward(const T* logits, const Router& p, int num_blocks, uintptr_t stream) {
  const dim3 grid = blocks_of(std::min<int64_t>(ceil_div(p.num_tokens, kWarps), num_blocks));
  const auto run = [&](auto per_lane) {
    launch(forward_kernel<T, per_lane.value, PACKED>, grid, kThreads, stream, logits, p);
  };
  const int per_lane = (p.num_experts + kWarpSize - 1) / kWarpSize;
  if (per_lane <= 1) return run(std::integral_constant<int, 1>{});
  if (per_lane <= 2) return run(std::integral_constant<int, 2>{});
  if (per_lane <= 4) return run(std::integral_constant<int, 4>{});
  if (per_lane <= 8) return run(std::integral_constant<int, 8>{});
  if (per_lane <= 16) return run(std::integral_constant<int, 16>{});
  run(std::integral_constant<int, 32>{});
}

[[maybe_unused]] void router_topk_cuda(const RouterRule::Tuple& rule, uintptr_t logits, int element, int64_t num_tokens,
                                       int num_experts, int64_t stride_t, int64_t stride_e, uintptr_t bias,
                                       uintptr_t mask, int64_t mask_stride, uintptr_t table, uintptr_t given,
                                       uintptr_t weights, int weights_element, uintptr_t indices, uintptr_t chosen,
                                       uintptr_t stats, uintptr_t counts, int64_t counts_stride, uintptr_t score,
                                       int64_t score_stride, int num_blocks, uintptr_t stream) {
  Router p{RouterRule::of(rule),
           num_tokens,
           stride_t,
           stride_e,
           num_experts,
           reinterpret_cast<const float*>(bias),
           reinterpret_cast<const bool*>(mask),
           mask_stride,
           reinterpret_cast<const float*>(table),
           reinterpret_cast<const int64_t*>(given),
           reinterpret_cast<void*>(weights),
           static_cast<Element>(weights_element),
           reinterpret_cast<int64_t*>(indices),
           reinterpret_cast<float*>(chosen),
           reinterpret_cast<float*>(stats),
           reinterpret_cast<unsigned long long*>(counts),
           counts_stride,
           reinterpret_cast<float*>(score),
           score_stride};
  if (num_experts > kMostExperts || p.top_k > kMostChosen) {
    throw std::invalid_argument("router_topk_cuda: more experts, or more chosen, than a warp holds");
  }
  if (num_tokens == 0) return;
  if (p.given != nullptr) p.num_groups = 1;  // nothing is chosen
  with_element(element, [&](auto type) {
    using T = decltype(type);
    const auto* rows = reinterpret_cast<const T*>(logits);
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      if (p.bias == nullptr && p.num_groups == 1) return forward<T, true>(rows, p, num_blocks, stream);
    }
    forward<T, false>(rows, p, num_blocks, stream);
  });
}

#ifdef TK_REGISTER
void bind(pybind11::module_& module) { module.def("router_topk_cuda", &router_topk_cuda); }
TK_REGISTER(bind);
#endif

}  // namespace
}  // namespace tk
