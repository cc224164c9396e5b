// Softmax of a row of logits in memory: see row_kernels.h.
#pragma once

#include "common/isa/softmax.h"
#include "common/row_kernels.h"

namespace tk {
namespace TK_ISA {

// kLanes logits of a row from column c on; columns beyond V are `fill` before the map.
template <Type T>
TK_INLINE vf load_logits(const void* row, int64_t c, int64_t V) {
  return reinterpret_cast<vf>(load_dwords<T, false>(row, c, V));
}

TK_INLINE vf map_logit(vf x, float scale, float cap, vf* slope) {
  vf z = x * scale;
  *slope = splat(scale);
  if (cap != 0.0f) {
    const Tanh ratio = tanh_vec(z * (1.0f / cap));
    z = ratio.value * cap;
    *slope *= ratio.slope;
  }
  return z;
}

template <Type T, bool Plain>
TK_INLINE RowSum row_sum(const void* row, int64_t V, float scale, float cap, int64_t target) {
  const float infinity = __builtin_inff();
  constexpr int64_t kBlock = 2048;  // columns between two looks at the maximum; they stay in L1
  float reference = -infinity;
  double sum = 0.0;
  float mapped[kBlock];
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int64_t end = begin + kBlock < V ? begin + kBlock : V;
    const bool excludes = target >= begin && target < end;
    vf top = splat(-infinity), second = top;
    for (int64_t c = begin; c < end; c += kLanes) {
      vf slope, z = load_logits<T>(row, c, V);
      if constexpr (!Plain) z = map_logit(z, scale, cap, &slope);
      if (T != Type::f32 || !Plain || excludes) store(mapped + (c - begin), z);
      z = keep_lanes(z, V - c, -infinity);
      second = z > second ? z : second;
      const vf swap = top;
      top = second;
      second = swap;
    }
    const float* from = mapped;
    if constexpr (T == Type::f32 && Plain)
      if (!excludes) from = static_cast<const float*>(row) + begin;
    float best = max_lanes(top > second ? top : second);
    if (excludes) {
      mapped[target - begin] = -infinity;
      best = row_max(mapped, end - begin);
    }
    if (best > reference) {
      if (reference != -infinity) sum *= static_cast<double>(exp_vec(splat(reference - best))[0]);
      reference = best;
    }
    const vf offset = splat(reference == -infinity ? 0.0f : reference);
    vf total[4] = {};
    int64_t c = begin;
    for (; c + 4 * kLanes <= end; c += 4 * kLanes) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t at = c + i * kLanes;
        total[i] += exp_vec(load<vf>(from + (at - begin)) - offset);
        // The next block meanwhile, which the next search for a maximum would wait for.
        __builtin_prefetch(static_cast<const char*>(row) + (at + kBlock) * size_of(T), 0, 3);
      }
    }
    for (; c < end; c += kLanes)
      total[0] += exp_vec(keep_lanes(load_left(from + (c - begin), end - c), end - c, -infinity) - offset);
    sum += static_cast<double>(sum_lanes((total[0] + total[1]) + (total[2] + total[3])));
  }
  return {reference, sum};
}

inline RowSum row_log_sum(Type type, const void* row, int64_t V, float scale, float cap, int64_t target) {
  RowSum out{};
  for_type<false>(type, [&]<Type T>() {
    out = scale == 1.0f && cap == 0.0f ? row_sum<T, true>(row, V, scale, cap, target)
                                       : row_sum<T, false>(row, V, scale, cap, target);
  });
  return out;
}

template <Type T, bool Plain>
TK_INLINE void row_dz(const void* row, void* out, int64_t V, float scale, float cap, float lse,
                      const LogitGradient& gradient) {
  const vf constant = splat(gradient.constant), uniform = splat(gradient.uniform), offset = splat(lse);
  constexpr int64_t kAhead = 4096;  // bytes: the processor's own prefetcher stops at the end of a page
  for (int64_t c = 0; c < V; c += kLanes) {
    __builtin_prefetch(static_cast<const char*>(row) + c * size_of(T) + kAhead, 0, 3);
    vf slope, z = load_logits<T>(row, c, V);
    if constexpr (!Plain) z = map_logit(z, scale, cap, &slope);
    vf value = exp_vec(z - offset) * constant + uniform;
    if constexpr (!Plain) value *= slope;
    store_some<T>(out, c, value, V - c);
  }
}

inline void row_gradient(Type type, const void* row, void* out, int64_t V, float scale, float cap, float lse,
                         const LogitGradient& gradient, int64_t target) {
  for_type<false>(type, [&]<Type T>() {
    vf slope;
    const vf raw =
        reinterpret_cast<vf>(load_dwords<T, false>(static_cast<const char*>(row) + target * size_of(T), 0, 1));
    map_logit(raw, scale, cap, &slope);
    if (scale == 1.0f && cap == 0.0f) {
      row_dz<T, true>(row, out, V, scale, cap, lse, gradient);
    } else {
      row_dz<T, false>(row, out, V, scale, cap, lse, gradient);
    }
    store_some<T>(out, target, splat(gradient.at_target * slope[0]), 1);
  });
}

inline float row_logit(Type type, const void* row, int64_t at, float scale, float cap) {
  float out = 0.0f;
  for_type<false>(type, [&]<Type T>() {
    vf slope;
    const char* p = static_cast<const char*>(row) + at * size_of(T);
    out = map_logit(reinterpret_cast<vf>(load_dwords<T, false>(p, 0, 1)), scale, cap, &slope)[0];
  });
  return out;
}

}  // namespace TK_ISA
}  // namespace tk
