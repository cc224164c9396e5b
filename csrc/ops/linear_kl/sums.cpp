// What both forms of linear_kl's forward pass do with a tile of logits, and with a row at the end.
#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/linear_kl/problem.h"

namespace tk::linear_kl {

Sums Sums::at(float* floats, double* cross, int64_t rows) {
  return {floats, floats + rows, floats + 2 * rows, floats + 3 * rows, floats + 4 * rows, cross};
}

void Sums::reset(int64_t rows) const {
  for (float* values : {max, ref_max}) std::fill_n(values, rows, -std::numeric_limits<float>::infinity());
  for (float* values : {sum, ref_sum, ratio}) std::fill_n(values, rows, 0.0f);
  std::fill_n(cross, rows, 0.0);
}

double part_factor(double part_max, double max) {
  return std::isinf(part_max) && part_max < 0 ? 0.0 : std::exp(part_max - max);
}

RowSums merge(const Sums* parts, int num_parts, int64_t r) {
  constexpr double kNone = -std::numeric_limits<double>::infinity();
  RowSums row{kNone, 0.0, kNone, 0.0, 0.0};
  for (int i = 0; i < num_parts; ++i) {
    row.max = std::max(row.max, double{parts[i].max[r]});
    row.ref_max = std::max(row.ref_max, double{parts[i].ref_max[r]});
  }
  for (int i = 0; i < num_parts; ++i) {
    const Sums& part = parts[i];
    row.total += part.sum[r] * part_factor(part.max[r], row.max);
    const double ref_factor = part_factor(part.ref_max[r], row.ref_max);
    row.ref_total += part.ref_sum[r] * ref_factor;
    if (ref_factor == 0.0) continue;
    // From the part's own maxima to the common ones.
    const double own = part.max[r], shift = std::isinf(own) ? row.max : row.max - own;
    row.cross += ref_factor * (part.cross[r] + part.ref_sum[r] * (shift - (row.ref_max - double{part.ref_max[r]})));
  }
  return row;
}

int64_t write_row(const Problem& p, const Outputs& out, int64_t r, const RowSums& sums) {
  const int64_t at = p.policy.hidden.index ? p.policy.hidden.index[r] : r;
  const double lse = sums.max + std::log(sums.total), ref_lse = sums.ref_max + std::log(sums.ref_total);
  out.kl[at] = static_cast<float>(sums.cross / sums.ref_total + (std::log(sums.total) - std::log(sums.ref_total)));
  out.lse[at] = static_cast<float>(lse);
  out.ref_lse[at] = static_cast<float>(ref_lse);
  out.lse_low[r] = static_cast<float>(lse - out.lse[at]);
  out.ref_lse_low[r] = static_cast<float>(ref_lse - out.ref_lse[at]);
  return at;
}

void score(const PackedSide& policy, const PackedSide& ref, int64_t rows_a, int64_t cols, KlTile tile) {
  for (int64_t c0 = 0; c0 < cols; c0 += kScoreCols) {
    tile.cols = std::min(kScoreCols, cols - c0);
    tile.p_offset = c0;
    policy.kernels.gemm(policy.a, rows_a, policy.bt + c0 * policy.k2, tile.s, tile.lds, tile.rows, tile.cols, policy.k2,
                        false);
    ref.kernels.gemm(ref.a, rows_a, ref.bt + c0 * ref.k2, tile.ref_s, tile.lds, tile.rows, tile.cols, ref.k2, false);
    policy.kernels.kl_tile(tile);
  }
}

}  // namespace tk::linear_kl
