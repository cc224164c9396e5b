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

// The columns of a tile that are targets of a row, in place: their logits and slopes to the state, and -inf in their
// place. Classes may repeat, so all are read before one is overwritten.
TK_INLINE void take_targets(float* row, const float* slopes, int64_t cols, int64_t v0, const int64_t* classes,
                            int64_t count, float* logit, float* slope) {
  const auto inside = [&](int64_t k) { return classes[k] >= v0 && classes[k] < v0 + cols; };
  for (int64_t k = 0; k < count; ++k) {
    if (!inside(k)) continue;
    logit[k] = row[classes[k] - v0];
    slope[k] = slopes == nullptr ? 1.0f : slopes[classes[k] - v0];
  }
  for (int64_t k = 0; k < count; ++k)
    if (inside(k)) row[classes[k] - v0] = -__builtin_inff();
}

template <bool Pairs, bool Entropy>
TK_INLINE void softmax_rows(float* s, int64_t lds, int64_t rows, int64_t cols, int64_t v0, const Targets& targets,
                            const LogitMap& map, const SoftmaxState& state, uint32_t* p, int64_t rows_p,
                            int64_t p_offset, float* d, int64_t ldd, const Stash* stash, int64_t stash_row) {
  const float infinity = __builtin_inff();
  const int64_t padded = round_up(cols, Pairs ? 2 * kKPad : kKPad), K = targets.count;
  const bool plain = map.bias == nullptr && map.cap == 0.0f && map.scale == 1.0f;
  float slopes[kMaxTileCols];
  for (int64_t r = 0; r < rows; ++r) {
    float* row = s + r * lds;
    if (!plain) map_row(row, cols, v0, map, slopes);
    take_targets(row, map.cap != 0.0f ? slopes : nullptr, cols, v0, targets.classes + r * K, K,
                 state.target_logit + r * K, state.target_slope + r * K);
    const float best = row_max(row, cols);
    float reference = state.max[r];
    if (best > reference + kLogLimit || (reference == -infinity && best > -infinity)) {
      const float factor = reference == -infinity ? 0.0f : exp_scalar(reference - best);
      if constexpr (Entropy)
        state.gap[r] = factor == 0.0f ? 0.0f : factor * (state.gap[r] + state.sum[r] * (reference - best));
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
    int64_t column = -1;  // of a new pivot
    if constexpr (Entropy) {
      if (best > state.pivot[r]) {
        if (state.pivot[r] != -infinity) {  // the pivot so far joins the others
          const float above = state.pivot[r] - offset, joining = exp_scalar(above);
          state.sum[r] += joining;
          state.gap[r] += joining * above;
        }
        column = 0;
        while (row[column] != best) ++column;
        row[column] = -infinity;
        state.pivot[r] = best;
        state.top[r] = v0 + column;
      }
    }
    vf total[2] = {}, gap = {};
    for (int64_t c = 0; c < padded; c += kLanes) {
      vf e = {};
      if (c < cols) {
        const vf z = keep_lanes(load<vf>(row + c), cols - c, -infinity) - offset;
        e = exp_vec(z);
        total[c / kLanes % 2] += e;
        if constexpr (Entropy) gap += e == vf{} ? vf{} : e * z;
        if (map.cap != 0.0f) e *= keep_lanes(load<vf>(slopes + c), cols - c, 0.0f);
      }
      if (p != nullptr) store_packed<Pairs>(p, rows_p, r, p_offset + c, e);
      if (stash != nullptr && c < cols) store_stash(*stash, stash_row + r, v0 + c, e);
    }
    state.sum[r] += sum_lanes(total[0] + total[1]);
    if constexpr (Entropy) {
      state.gap[r] += sum_lanes(gap);
      if (p != nullptr && column >= 0)
        store_one<Pairs>(p, rows_p, r, p_offset + column,
                         exp_scalar(best - offset) * (map.cap != 0.0f ? slopes[column] : 1.0f));
    }
  }
}

template <bool Pairs>
void softmax_tile(float* s, int64_t lds, int64_t rows, int64_t cols, int64_t v0, const Targets& targets,
                  const LogitMap& map, const SoftmaxState& state, uint32_t* p, int64_t rows_p, int64_t p_offset,
                  float* d, int64_t ldd, const Stash* stash, int64_t stash_row) {
  if (state.gap != nullptr) {
    softmax_rows<Pairs, true>(s, lds, rows, cols, v0, targets, map, state, p, rows_p, p_offset, d, ldd, stash,
                              stash_row);
  } else {
    softmax_rows<Pairs, false>(s, lds, rows, cols, v0, targets, map, state, p, rows_p, p_offset, d, ldd, stash,
                               stash_row);
  }
}

// What multiplies p; p is 0 where log p is cut off.
TK_INLINE vf gradient_weight(vf log_p, vf constant, vf log) { return constant + log * at_least(log_p, -104.0f); }

template <bool Pairs>
void known_tile(float* s, int64_t lds, int64_t rows, int64_t cols, int64_t v0, const Targets& targets,
                const LogitMap& map, const RowGradient& gradient, uint32_t* p, int64_t rows_p, int64_t p_offset) {
  const int64_t padded = round_up(cols, Pairs ? 2 * kKPad : kKPad), K = targets.count;
  float slopes[kMaxTileCols];
  for (int64_t r = 0; r < rows; ++r) {
    float* row = s + r * lds;
    map_row(row, cols, v0, map, slopes);
    const vf high = splat(gradient.lse.high[r]), low = splat(gradient.lse.low[r]);
    const vf constant = splat(gradient.constant[r]);
    const vf log = splat(gradient.log == nullptr ? 0.0f : gradient.log[r]);
    for (int64_t c = 0; c < padded; c += kLanes) {
      vf value = {};
      if (c < cols) {
        const vf log_p = (load<vf>(row + c) - high) - low;
        value = exp_vec(log_p) * gradient_weight(log_p, constant, log);
        if (map.cap != 0.0f) value *= load<vf>(slopes + c);
        value = keep_lanes(value, cols - c, 0.0f);
      }
      store_packed<Pairs>(p, rows_p, r, p_offset + c, value);
    }
    for (int64_t k = 0; k < K; ++k) {
      const int64_t c = targets.classes[r * K + k] - v0;
      if (c < 0 || c >= cols) continue;
      store_one<Pairs>(p, rows_p, r, p_offset + c,
                       gradient.at_target[r * K + k] * (map.cap != 0.0f ? slopes[c] : 1.0f));
    }
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
void gradient_tile(const float* s, int64_t lds, int64_t cols, int64_t rows, int64_t v0, const Targets& targets,
                   const LogitMap& map, const RowGradient& gradient, uint32_t* dz, int64_t rows_dz, int64_t dz_offset,
                   float* dbias) {
  const int64_t padded = round_up(rows, Pairs ? 2 * kKPad : kKPad), K = targets.count;
  bool is_target[kMaxTileCols] = {};  // of any row: what the column adds to dbias must then leave that row out
  if (dbias != nullptr)
    for (int64_t i = 0; i < rows * K; ++i) {
      const int64_t v = targets.classes[i] - v0;
      if (v >= 0 && v < cols) is_target[v] = true;
    }
  for (int64_t v = 0; v < cols; ++v) {
    const float bias = map.bias != nullptr ? map.bias[v0 + v] : 0.0f;
    vf total = {};
    for (int64_t t = 0; t < padded; t += kLanes) {
      vf value = {};
      if (t < rows) {
        const int64_t left = rows - t;
        vf slope;
        const vf z = map_vec(load<vf>(s + v * lds + t), bias, map, &slope);
        const vf log_p = (z - load_left(gradient.lse.high + t, left)) - load_left(gradient.lse.low + t, left);
        vf weight = load_left(gradient.constant + t, left);
        if (gradient.log != nullptr) weight = gradient_weight(log_p, weight, load_left(gradient.log + t, left));
        value = keep_lanes(exp_vec(log_p) * weight * slope, left, 0.0f);
        if (is_target[v]) {
          vf others = value;
          for (int64_t i = 0; i < kLanes && i < left; ++i)
            for (int64_t k = 0; k < K; ++k)
              if (targets.classes[(t + i) * K + k] == v0 + v) others[i] = 0.0f;
          total += others;
        } else {
          total += value;
        }
      }
      store_packed<Pairs>(dz, rows_dz, v, dz_offset + t, value);
    }
    if (dbias != nullptr) dbias[v] += sum_lanes(total);
  }
  for (int64_t i = 0; i < rows * K; ++i) {
    const int64_t v = targets.classes[i] - v0, t = i / K;
    if (v < 0 || v >= cols) continue;
    vf slope;
    map_vec(splat(s[v * lds + t]), map.bias != nullptr ? map.bias[v0 + v] : 0.0f, map, &slope);
    const float value = gradient.at_target[i] * slope[0];
    if (dbias != nullptr) dbias[v] += value;
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
