// The tiles of KL(ref || policy): see tile_kernels.h.
#pragma once

#include "common/isa/softmax.h"

namespace tk {
namespace TK_ISA {

TK_INLINE float* row_or_null(float* d, int64_t r, int64_t ldd) { return d == nullptr ? nullptr : d + r * ldd; }

// Changes the constant c of a row: what was accumulated of (p~ - c q~) is corrected with what was accumulated of q~.
template <bool Pairs>
TK_INLINE void set_ratio(const KlTile& tile, int64_t r, float c) {
  const float change = tile.ratio[r] - c;
  tile.ratio[r] = c;
  if (tile.d != nullptr) {
    for (int64_t i = r * tile.ldd; i < (r + 1) * tile.ldd; i += kLanes)
      store(tile.d + i, load<vf>(tile.d + i) + load<vf>(tile.ref_d + i) * change);
    tile.kept[r] += tile.ref_kept[r] * change;
  }
  if (tile.p != nullptr)
    for (int64_t k = 0; k < tile.p_offset; k += kLanes)
      store_packed<Pairs>(tile.p, tile.rows_p, r, k,
                          load_packed<Pairs>(tile.p, tile.rows_p, r, k) +
                              load_packed<Pairs>(tile.p, tile.rows_p, tile.ref_row + r, k) * change);
}

// Whether the tile's maximum exceeds the row's reference by the limit, or is the first one.
TK_INLINE bool must_raise(float best, float before) {
  return best > before + kLogLimit || (before == -__builtin_inff() && best > before);
}

// Returns the tile's maximum of the reference.
template <bool Pairs>
TK_INLINE float raise_maxima(const KlTile& tile, int64_t r) {
  const float infinity = __builtin_inff();
  const float best = row_max(tile.s + r * tile.lds, tile.cols), before = tile.max[r];
  if (must_raise(best, before)) {
    if (before != -infinity) {
      const float factor = exp_vec(splat(before - best))[0];
      tile.cross[r] += static_cast<double>(tile.ref_sum[r]) * (static_cast<double>(best) - before);
      tile.sum[r] *= factor;
      tile.ratio[r] *= factor;
      rescale<Pairs>(factor, row_or_null(tile.d, r, tile.ldd), tile.ldd, tile.p, tile.rows_p, r, tile.p_offset);
      if (tile.d != nullptr) tile.kept[r] *= factor;
    } else {
      tile.cross[r] += static_cast<double>(tile.ref_sum[r]) * best;
    }
    tile.max[r] = best;
  }
  const float ref_best = row_max(tile.ref_s + r * tile.lds, tile.cols), ref_before = tile.ref_max[r];
  if (must_raise(ref_best, ref_before)) {
    if (ref_before != -infinity) {
      const float factor = exp_vec(splat(ref_before - ref_best))[0];
      set_ratio<Pairs>(tile, r, 0.0f);  // chosen anew below: c / factor may be out of range
      tile.ref_sum[r] *= factor;
      tile.cross[r] = tile.cross[r] * static_cast<double>(factor) -
                      static_cast<double>(tile.ref_sum[r]) * (static_cast<double>(ref_best) - ref_before);
      rescale<Pairs>(factor, row_or_null(tile.ref_d, r, tile.ldd), tile.ldd, tile.p, tile.rows_p, tile.ref_row + r,
                     tile.p_offset);
      if (tile.d != nullptr) tile.ref_kept[r] *= factor;
    }
    tile.ref_max[r] = ref_best;
  }
  return ref_best;
}

template <bool Pairs>
void kl_tile(const KlTile& tile) {
  const float infinity = __builtin_inff();
  const int64_t cols = tile.cols, padded = round_up(cols, Pairs ? 2 * kKPad : kKPad);
  const bool plain = tile.map.bias == nullptr && tile.map.cap == 0.0f && tile.map.scale == 1.0f;
  float slopes[kMaxTileCols], unused[kMaxTileCols];
  for (int64_t r = 0; r < tile.rows; ++r) {
    float *row = tile.s + r * tile.lds, *ref_row = tile.ref_s + r * tile.lds;
    if (!plain) {
      map_row(row, cols, 0, tile.map, slopes);
      map_row(ref_row, cols, 0, tile.map, unused);
    }
    const float ref_best = raise_maxima<Pairs>(tile, r);
    const float offset = tile.max[r] == -infinity ? 0.0f : tile.max[r];
    const float ref_offset = tile.ref_max[r] == -infinity ? 0.0f : tile.ref_max[r];
    int64_t column = -1;  // of a new pivot
    if (ref_best > tile.ref_pivot[r]) {
      if (tile.top[r] >= 0) {  // the pivot so far joins the others
        const float z = tile.pivot[r] - offset, ref_z = tile.ref_pivot[r] - ref_offset, e = exp_scalar(ref_z);
        tile.sum[r] += exp_scalar(z);
        tile.ref_sum[r] += e;
        if (e != 0.0f) tile.cross[r] += static_cast<double>(e) * (ref_z - z);
      }
      column = 0;
      while (ref_row[column] != ref_best) ++column;
      tile.pivot[r] = row[column];
      tile.ref_pivot[r] = ref_best;
      tile.slope[r] = tile.map.cap != 0.0f ? slopes[column] : 1.0f;
      tile.top[r] = tile.v0 + column;
      row[column] = ref_row[column] = -infinity;
    }
    vf total = {}, ref_total = {}, cross = {};
    for (int64_t c = 0; c < cols; c += kLanes) {
      const vf z = keep_lanes(load<vf>(row + c), cols - c, -infinity) - offset;
      const vf ref_z = keep_lanes(load<vf>(ref_row + c), cols - c, -infinity) - ref_offset;
      const vf e = exp_vec(z), ref_e = exp_vec(ref_z);
      total += e;
      ref_total += ref_e;
      cross += ref_e == vf{} ? vf{} : ref_e * (ref_z - z);  // 0 log 0 is 0, also where both logits are -inf
      store(row + c, e);
      store(ref_row + c, ref_e);
    }
    tile.sum[r] += sum_lanes(total);
    tile.ref_sum[r] += sum_lanes(ref_total);
    tile.cross[r] += static_cast<double>(sum_lanes(cross));
    if (tile.p == nullptr) continue;
    const float own = tile.top[r] < 0 ? 0.0f : exp_scalar(tile.pivot[r] - offset);
    const float ref_own = tile.top[r] < 0 ? 0.0f : exp_scalar(tile.ref_pivot[r] - ref_offset);
    if (column >= 0) {
      row[column] = own;
      ref_row[column] = ref_own;
    }
    // Too small a c costs nothing; too large a one would drown p~. So it only ever shrinks with the totals' ratio; but
    // a new pivot may hold nearly everything, and then only the exact ratio leaves its p~ - c q~ small.
    const float c = (tile.sum[r] + own) / (tile.ref_sum[r] + ref_own);
    const bool usable = c > 1e-20f && c < 1e20f;
    if ((usable && (tile.ratio[r] == 0.0f || column >= 0)) || tile.ratio[r] > 2.0f * c) set_ratio<Pairs>(tile, r, c);
    const vf ratio = splat(tile.ratio[r]);
    for (int64_t c = 0; c < padded; c += kLanes) {
      vf e = {}, ref_e = {};
      if (c < cols) {
        e = load<vf>(row + c);
        ref_e = load<vf>(ref_row + c);
        e -= ratio * ref_e;
        if (tile.map.cap != 0.0f) {
          const vf slope = keep_lanes(load<vf>(slopes + c), cols - c, 0.0f);
          e *= slope;
          ref_e *= slope;
        }
      }
      store_packed<Pairs>(tile.p, tile.rows_p, r, tile.p_offset + c, e);
      store_packed<Pairs>(tile.p, tile.rows_p, tile.ref_row + r, tile.p_offset + c, ref_e);
    }
  }
}

template <bool Pairs>
void kl_combine(uint32_t* p, int64_t rows_p, int64_t ref_row, int64_t rows, int64_t cols, const float* of_difference,
                const float* of_ref) {
  const int64_t padded = round_up(cols, Pairs ? 2 * kKPad : kKPad);
  for (int64_t r = 0; r < rows; ++r) {
    const vf a = splat(of_difference[r]), b = splat(of_ref[r]);
    for (int64_t k = 0; k < padded; k += kLanes)
      store_packed<Pairs>(p, rows_p, r, k,
                          load_packed<Pairs>(p, rows_p, r, k) * a + load_packed<Pairs>(p, rows_p, ref_row + r, k) * b);
  }
}

template <bool Pairs>
void kl_gradient_tile(const KlGradientTile& tile) {
  const int64_t rows = tile.rows, padded = round_up(rows, Pairs ? 2 * kKPad : kKPad);
  for (int64_t v = 0; v < tile.cols; ++v) {
    for (int64_t t = 0; t < padded; t += kLanes) {
      vf value = {};
      if (t < rows) {
        const int64_t left = rows - t;
        vf slope, unused;
        const vf z = map_vec(load<vf>(tile.s + v * tile.lds + t), 0.0f, tile.map, &slope);
        const vf ref_z = map_vec(load<vf>(tile.ref_s + v * tile.lds + t), 0.0f, tile.map, &unused);
        const vf p = exp_vec((z - load_left(tile.lse.high + t, left)) - load_left(tile.lse.low + t, left));
        const vf q = exp_vec((ref_z - load_left(tile.ref_lse.high + t, left)) - load_left(tile.ref_lse.low + t, left));
        value = keep_lanes((p - q) * load_left(tile.g + t, left) * slope, left, 0.0f);
      }
      store_packed<Pairs>(tile.dz, tile.rows_dz, v, tile.dz_offset + t, value);
    }
  }
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t v = tile.pivot[t] - tile.v0;
    if (v < 0 || v >= tile.cols) continue;
    vf slope;
    map_vec(splat(tile.s[v * tile.lds + t]), 0.0f, tile.map, &slope);
    store_one<Pairs>(tile.dz, tile.rows_dz, v, tile.dz_offset + t, tile.difference[t] * tile.g[t] * slope[0]);
  }
}

}  // namespace TK_ISA
}  // namespace tk
