// The online softmax of one column tile and the transposed gradient tile: see tile_kernels.h.
#pragma once

#include "common/isa/pack.h"

namespace tk {
namespace TK_ISA {

// The first `left` lanes of v, `fill` in the others.
TK_INLINE vf keep_lanes(vf v, int64_t left, float fill) {
  if (left >= kLanes) return v;
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(left) ? v : splat(fill);
}

// kLanes numbers, of which memory holds only `left`.
TK_INLINE vf load_left(const float* p, int64_t left) {
  if (left >= kLanes) return load<vf>(p);
  vf v = {};
  memcpy(&v, p, static_cast<size_t>(left) * 4);
  return v;
}

// Writes kLanes values of one row at element k of a packed A buffer.
template <bool Pairs>
TK_INLINE void store_packed(uint32_t* a, int64_t rows_a, int64_t r, int64_t k, vf v) {
  const int64_t k2 = Pairs ? k / 2 : k;
  uint32_t* to = a + (k2 / kKC * rows_a + r) * kKS + k2 % kKC;
  if constexpr (Pairs) {
    store(to, to_bf16(v));
  } else {
    store(to, v);
  }
}

TK_INLINE vf load_stash(const Stash& stash, int64_t r, int64_t v) {
  const char* from = stash.at(r, v);
  return stash.type == Type::f32 ? load<vf>(from) : from_bf16(load<vh>(from));
}
TK_INLINE void store_stash(const Stash& stash, int64_t r, int64_t v, vf value) {
  char* to = stash.at(r, v);
  if (stash.type == Type::f32) {
    store(to, value);
  } else {
    store(to, to_bf16(value));
  }
}

TK_INLINE float exp_scalar(float x) { return exp_vec(splat(x))[0]; }

// One value.
template <bool Pairs>
TK_INLINE void store_one(uint32_t* a, int64_t rows_a, int64_t r, int64_t k, float value) {
  const int64_t k2 = Pairs ? k / 2 : k;
  uint32_t* to = a + (k2 / kKC * rows_a + r) * kKS + k2 % kKC;
  if constexpr (Pairs) {
    const vh rounded = to_bf16(splat(value));
    memcpy(reinterpret_cast<uint16_t*>(to) + k % 2, &rounded, 2);
  } else {
    memcpy(to, &value, 4);
  }
}

template <bool Pairs>
TK_INLINE vf load_packed(const uint32_t* a, int64_t rows_a, int64_t r, int64_t k) {
  const int64_t k2 = Pairs ? k / 2 : k;
  const uint32_t* from = a + (k2 / kKC * rows_a + r) * kKS + k2 % kKC;
  if constexpr (Pairs) return from_bf16(load<vh>(from));
  return load<vf>(from);
}

// Raw dot products of one row to logits, in place; slopes gets softcap' when there is a cap. Rows of s are padded, so
// whole vectors are read and written.
TK_INLINE void map_row(float* row, int64_t cols, int64_t v0, const LogitMap& map, float* slopes) {
  for (int64_t c = 0; c < cols; c += kLanes) {
    vf z = load<vf>(row + c);
    if (map.bias != nullptr) z += load_left(map.bias + v0 + c, cols - c);
    z *= map.scale;
    if (map.cap != 0.0f) {
      const Tanh ratio = tanh_vec(z * (1.0f / map.cap));
      z = ratio.value * map.cap;
      store(slopes + c, ratio.slope);
    }
    store(row + c, z);
  }
}

// How far a logit may exceed the reference maximum: p up to e^8 costs no accuracy, and saves nearly every rescaling.
constexpr float kLogLimit = 8.0f;

TK_INLINE float row_max(const float* row, int64_t cols) {
  const float infinity = __builtin_inff();
  vf top[2] = {splat(-infinity), splat(-infinity)};
  for (int64_t c = 0; c < cols; c += 2 * kLanes) {
    const vf x = keep_lanes(load<vf>(row + c), cols - c, -infinity);
    const vf y = c + kLanes < cols ? keep_lanes(load<vf>(row + c + kLanes), cols - c - kLanes, -infinity) : x;
    top[0] = x > top[0] ? x : top[0];  // a NaN never wins here; it reaches the sum
    top[1] = y > top[1] ? y : top[1];
  }
  return max_lanes(top[0] > top[1] ? top[0] : top[1]);
}

// What one row accumulated with a smaller maximum: its gradient d and the first k elements of its packed row.
template <bool Pairs>
TK_INLINE void rescale(float factor, float* d, int64_t n, uint32_t* p, int64_t rows_p, int64_t r, int64_t k) {
  if (d != nullptr)
    for (int64_t i = 0; i < n; i += kLanes) store(d + i, load<vf>(d + i) * factor);
  if (p != nullptr)
    for (int64_t i = 0; i < k; i += kLanes)
      store_packed<Pairs>(p, rows_p, r, i, load_packed<Pairs>(p, rows_p, r, i) * factor);
}

template <bool Pairs>
void softmax_tile(float* s, int64_t lds, int64_t rows, int64_t cols, int64_t v0, const int64_t* target,
                  const LogitMap& map, const SoftmaxState& state, uint32_t* p, int64_t rows_p, int64_t p_offset,
                  float* d, int64_t ldd, const Stash* stash, int64_t stash_row) {
  const float infinity = __builtin_inff();
  const int64_t padded = round_up(cols, Pairs ? 2 * kKPad : kKPad);
  const bool plain = map.bias == nullptr && map.cap == 0.0f && map.scale == 1.0f;
  float slopes[kMaxTileCols];
  for (int64_t r = 0; r < rows; ++r) {
    float* row = s + r * lds;
    if (!plain) map_row(row, cols, v0, map, slopes);
    const int64_t mine = target[r] - v0;
    if (mine >= 0 && mine < cols) {
      state.target_logit[r] = row[mine];
      state.target_slope[r] = map.cap != 0.0f ? slopes[mine] : 1.0f;
      row[mine] = -infinity;
    }
    const float best = row_max(row, cols);
    float reference = state.max[r];
    if (best > reference + kLogLimit || (reference == -infinity && best > -infinity)) {
      const float factor = reference == -infinity ? 0.0f : exp_scalar(reference - best);
      state.sum[r] *= factor;
      if (reference != -infinity) {
        rescale<Pairs>(factor, d == nullptr ? nullptr : d + r * ldd, ldd, p, rows_p, r, p_offset);
        if (stash != nullptr)
          for (int64_t v = stash->begin; v < v0; v += kLanes)
            store_stash(*stash, stash_row + r, v, load_stash(*stash, stash_row + r, v) * factor);
      }
      state.max[r] = reference = best;
    }
    const float offset = reference == -infinity ? 0.0f : reference;
    vf total[2] = {};
    for (int64_t c = 0; c < padded; c += kLanes) {
      vf e = {};
      if (c < cols) {
        const vf z = keep_lanes(load<vf>(row + c), cols - c, -infinity);
        e = exp_vec(z - offset);
        total[c / kLanes % 2] += e;
        if (map.cap != 0.0f) e *= keep_lanes(load<vf>(slopes + c), cols - c, 0.0f);
      }
      if (p != nullptr) store_packed<Pairs>(p, rows_p, r, p_offset + c, e);
      if (stash != nullptr && c < cols) store_stash(*stash, stash_row + r, v0 + c, e);
    }
    state.sum[r] += sum_lanes(total[0] + total[1]);
  }
}

// The logit's slope with respect to the raw dot product and the logit itself.
TK_INLINE vf map_vec(vf s, float bias, const LogitMap& map, vf* slope) {
  vf z = (s + bias) * map.scale;
  *slope = splat(map.scale);
  if (map.cap != 0.0f) {
    const Tanh ratio = tanh_vec(z * (1.0f / map.cap));
    z = ratio.value * map.cap;
    *slope *= ratio.slope;
  }
  return z;
}

template <bool Pairs>
void gradient_tile(const float* s, int64_t lds, int64_t cols, int64_t rows, int64_t v0, const int64_t* target,
                   const LogitMap& map, const LogSumExp& lse, const float* g, uint32_t* dz, int64_t rows_dz,
                   int64_t dz_offset, float* dbias) {
  const int64_t padded = round_up(rows, Pairs ? 2 * kKPad : kKPad);
  for (int64_t v = 0; v < cols; ++v) {
    const float bias = map.bias != nullptr ? map.bias[v0 + v] : 0.0f;
    vf total = {};
    for (int64_t t = 0; t < padded; t += kLanes) {
      vf value = {};
      if (t < rows) {
        vf slope;
        const vf z = map_vec(load<vf>(s + v * lds + t), bias, map, &slope);
        const vf log_p = (z - load_left(lse.high + t, rows - t)) - load_left(lse.low + t, rows - t);
        value = keep_lanes(exp_vec(log_p) * load_left(g + t, rows - t) * -slope, rows - t, 0.0f);
        total += value;
      }
      store_packed<Pairs>(dz, rows_dz, v, dz_offset + t, value);
    }
    if (dbias != nullptr) dbias[v] += sum_lanes(total);
  }
  // The target's own element: 1 - p, without cancellation.
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t v = target[t] - v0;
    if (v < 0 || v >= cols) continue;
    vf slope;
    const float z = map_vec(splat(s[v * lds + t]), map.bias != nullptr ? map.bias[v0 + v] : 0.0f, map, &slope)[0];
    const float log_p = (z - lse.high[t]) - lse.low[t];
    const float unit = g[t] * slope[0];
    const float value = -__builtin_expm1f(log_p) * unit;
    if (dbias != nullptr) dbias[v] += value + exp_vec(splat(log_p))[0] * unit;
    store_one<Pairs>(dz, rows_dz, v, dz_offset + t, value);
  }
}

template <bool Pairs>
void unstash(const void* p, Type type, int64_t rows, int64_t cols, const float* coefficient, uint32_t* dz,
             int64_t rows_dz, int64_t dz_offset, float* dbias) {
  constexpr int kPer = Pairs ? 2 : 1;
  const Stash from{const_cast<void*>(p), type, 0, nullptr, kColPad, 0};
  const int64_t padded = round_up(rows, Pairs ? 2 * kKPad : kKPad);
  for (int64_t v = 0; v < cols; v += kLanes) {
    vf total = {};
    for (int64_t t = 0; t < padded; t += kPer * kLanes) {
      vu block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        vf value[kPer];
#pragma GCC unroll 2
        for (int j = 0; j < kPer; ++j) {
          const int64_t r = t + i * kPer + j;
          value[j] = r < rows ? load_stash(from, r, v) * coefficient[r] : vf{};
          total += value[j];
        }
        if constexpr (Pairs) {
          block[i] = __builtin_convertvector(to_bf16(value[0]), vu) | __builtin_convertvector(to_bf16(value[1]), vu)
                                                                          << 16;
        } else {
          block[i] = reinterpret_cast<vu>(value[0]);
        }
      }
      transpose(block);
      const int64_t k2 = (dz_offset + t) / kPer;
      uint32_t* to = dz + (k2 / kKC * rows_dz + v) * kKS + k2 % kKC;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + i * kKS, block[i]);
    }
    if (dbias != nullptr)
      for (int i = 0; i < kLanes && v + i < cols; ++i) dbias[v + i] += total[i];
  }
}

template <bool Pairs>
void set_targets(const int64_t* target, const float* value, int64_t v0, int64_t cols, int64_t rows, uint32_t* dz,
                 int64_t rows_dz, int64_t dz_offset, float* dbias) {
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t v = target[t] - v0;
    if (v < 0 || v >= cols) continue;
    store_one<Pairs>(dz, rows_dz, v, dz_offset + t, value[t]);
    if (dbias != nullptr) dbias[v] += value[t];
  }
}

}  // namespace TK_ISA
}  // namespace tk
