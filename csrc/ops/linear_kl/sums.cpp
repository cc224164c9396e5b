// What both forms of linear_kl's forward pass do with a tile of logits, and with a row at the end.
#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/linear_kl/problem.h"

namespace tk::linear_kl {

Sums Sums::at(float* floats, double* cross, int64_t* top, int64_t rows) {
  float* at[kFloats];
  for (int i = 0; i < kFloats; ++i) at[i] = floats + i * rows;
  return {at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], at[8], at[9], cross, top};
}

void Sums::reset(int64_t rows) const {
  for (float* values : {max, ref_max, pivot, ref_pivot})
    std::fill_n(values, rows, -std::numeric_limits<float>::infinity());
  for (float* values : {sum, ref_sum, ratio, slope, kept, ref_kept}) std::fill_n(values, rows, 0.0f);
  std::fill_n(cross, rows, 0.0);
  std::fill_n(top, rows, int64_t{-1});
}

KlTile Sums::tile(int64_t t, int64_t rows, float* s, float* ref_s, int64_t v0, const LogitMap& map) const {
  KlTile tile{};
  tile.s = s;
  tile.ref_s = ref_s;
  tile.lds = kScoreStride;
  tile.rows = rows;
  tile.v0 = v0;
  tile.map = map;
  tile.max = max + t;
  tile.sum = sum + t;
  tile.ref_max = ref_max + t;
  tile.ref_sum = ref_sum + t;
  tile.ratio = ratio + t;
  tile.pivot = pivot + t;
  tile.ref_pivot = ref_pivot + t;
  tile.slope = slope + t;
  tile.kept = kept + t;
  tile.ref_kept = ref_kept + t;
  tile.cross = cross + t;
  tile.top = top + t;
  return tile;
}

double part_factor(double part_max, double max) {
  return std::isinf(part_max) && part_max < 0 ? 0.0 : std::exp(part_max - max);
}

RowSums merge(const Sums* parts, int num_parts, int64_t r) {
  constexpr double kNone = -std::numeric_limits<double>::infinity();
  RowSums row{kNone, 0.0, kNone, 0.0, 0.0, -1, 0.0, 0.0, 0.0};
  double pivot = kNone, ref_pivot = kNone, cross = 0.0;
  for (int i = 0; i < num_parts; ++i) {
    const Sums& part = parts[i];
    row.max = std::max({row.max, double{part.max[r]}, double{part.pivot[r]}});
    row.ref_max = std::max({row.ref_max, double{part.ref_max[r]}, double{part.ref_pivot[r]}});
    if (part.top[r] < 0 || part.ref_pivot[r] <= ref_pivot) continue;
    pivot = part.pivot[r];
    ref_pivot = part.ref_pivot[r];
    row.top = part.top[r];
    row.slope = part.slope[r];
  }
  // Of all columns but the pivot.
  for (int i = 0; i < num_parts; ++i) {
    const Sums& part = parts[i];
    row.total += part.sum[r] * part_factor(part.max[r], row.max);
    const double ref_factor = part_factor(part.ref_max[r], row.ref_max);
    row.ref_total += part.ref_sum[r] * ref_factor;
    if (ref_factor != 0.0) {
      // From the part's own maxima to the common ones.
      const double own = part.max[r], shift = std::isinf(own) ? row.max : row.max - own;
      cross += ref_factor * (part.cross[r] + part.ref_sum[r] * (shift - (row.ref_max - double{part.ref_max[r]})));
    }
    if (part.top[r] < 0 || part.top[r] == row.top) continue;
    const double z = part.pivot[r] - row.max, ref_z = part.ref_pivot[r] - row.ref_max, e = std::exp(ref_z);
    row.total += std::exp(z);
    row.ref_total += e;
    if (e != 0.0) cross += e * (ref_z - z);
  }
  const double own = std::exp(pivot - row.max), ref_own = std::exp(ref_pivot - row.ref_max);
  const double log_total = std::log(row.total + own), log_ref_total = std::log(row.ref_total + ref_own);
  row.logp = own > 0 ? -std::log1p(row.total / own) : pivot - row.max - log_total;
  row.ref_logp = -std::log1p(row.ref_total / ref_own);
  const double others = row.ref_total == 0.0 ? 0.0 : row.ref_total * (log_total - log_ref_total);
  row.kl = (cross + others) / (row.ref_total + ref_own) + std::exp(row.ref_logp) * (row.ref_logp - row.logp);
  row.total += own;
  row.ref_total += ref_own;
  return row;
}

double RowSums::difference() const { return std::expm1(logp) - std::expm1(ref_logp); }

int64_t write_row(const Problem& p, const Outputs& out, int64_t r, const RowSums& sums) {
  const int64_t at = p.policy.hidden.index ? p.policy.hidden.index[r] : r;
  const double lse = sums.max + std::log(sums.total), ref_lse = sums.ref_max + std::log(sums.ref_total);
  out.kl[at] = static_cast<float>(sums.kl);
  out.lse[at] = static_cast<float>(lse);
  out.ref_lse[at] = static_cast<float>(ref_lse);
  out.pivot[at] = sums.top;
  out.logp[at] = static_cast<float>(sums.logp);
  out.ref_logp[at] = static_cast<float>(sums.ref_logp);
  out.lse_low[r] = static_cast<float>(lse - out.lse[at]);
  out.ref_lse_low[r] = static_cast<float>(ref_lse - out.ref_lse[at]);
  return at;
}

void score(const PackedSide& policy, const PackedSide& ref, int64_t rows_a, int64_t cols, KlTile tile) {
  const int64_t v0 = tile.v0;
  for (int64_t c0 = 0; c0 < cols; c0 += kScoreCols) {
    tile.v0 = v0 + c0;
    tile.cols = std::min(kScoreCols, cols - c0);
    tile.p_offset = c0;
    policy.kernels.gemm(policy.a, rows_a, policy.bt + c0 * policy.k2, tile.s, tile.lds, tile.rows, tile.cols, policy.k2,
                        false);
    ref.kernels.gemm(ref.a, rows_a, ref.bt + c0 * ref.k2, tile.ref_s, tile.lds, tile.rows, tile.cols, ref.k2, false);
    policy.kernels.kl_tile(tile);
  }
}

}  // namespace tk::linear_kl
