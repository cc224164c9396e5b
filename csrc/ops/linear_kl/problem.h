// What the CPU passes of linear_kl share.
#pragma once

#include <cstdint>

#include "common/streaming.h"
#include "common/tile_kernels.h"

namespace tk::linear_kl {

struct Side {
  Rows hidden, weight;
  int64_t width;
};

struct Problem {
  Side policy, ref;
  int64_t num_rows, V;
  LogitMap map;

  // Both models end in the same head: one packing of it serves both.
  bool one_head() const {
    const Rows &mine = policy.weight, &other = ref.weight;
    return mine.data == other.data && mine.type == other.type && mine.stride == other.stride &&
           policy.width == ref.width;
  }
};

struct Outputs {
  float *kl, *lse, *ref_lse;     // [T]
  int64_t* pivot;                // [T] the reference's largest class
  float *logp, *ref_logp;        // [T] its log-probabilities
  float *lse_low, *ref_lse_low;  // [num_rows] what rounding lost
  void* dhidden;                 // [T, H] or null
};

inline constexpr int kMaxParts = 256;  // threads that share the columns

// The online sums of a block of rows over one thread's columns, all [rows]: see KlTile.
struct Sums {
  float *max, *sum, *ref_max, *ref_sum, *ratio, *pivot, *ref_pivot, *slope, *kept, *ref_kept;
  double* cross;
  int64_t* top;

  static constexpr int kFloats = 10;
  static Sums at(float* floats, double* cross, int64_t* top, int64_t rows);
  void reset(int64_t rows) const;
  // The tile kernel's view of the rows from t on: s and ref_s hold dot products with the columns from v0 on.
  KlTile tile(int64_t t, int64_t rows, float* s, float* ref_s, int64_t v0, const LogitMap& map) const;
};

// One row over all columns: maxima and sums of exponentials, kl, and of the pivot its number, softcap' and
// log-probabilities.
struct RowSums {
  double max, total, ref_max, ref_total, kl;
  int64_t top;
  double slope, logp, ref_logp;

  double difference() const;  // p - q of the pivot
};
RowSums merge(const Sums* parts, int num_parts, int64_t r);
// What a part's numbers are worth relative to the maximum of all. A part without a maximum is empty (sum 0) or holds
// NaN only (a sum of NaN, which must get through).
double part_factor(double part_max, double max);
// Row r of those that count: kl and the logsumexps. Returns its number among all.
int64_t write_row(const Problem& p, const Outputs& out, int64_t r, const RowSums& sums);

// A model's packed operands of one tile.
struct PackedSide {
  const TileKernels& kernels;
  const uint32_t *a, *bt;
  int64_t k2;
};
// The dot products with `cols` columns, and kl_tile of them; tile.cols and tile.p_offset are set here.
void score(const PackedSide& policy, const PackedSide& ref, int64_t rows_a, int64_t cols, KlTile tile);

// The forward in four products (two without a gradient).
Plan four_products_plan(const Problem& p, bool gradient, int threads);
void forward_four_products(const Problem& p, const Outputs& out, const Plan& plan);
// The forward in three, where the scratch memory allows block_rows > 0.
Plan three_products_plan(const Problem& p, int threads);
void forward_three_products(const Problem& p, const Outputs& out, const Plan& plan);

// What is known of the rows that count when the gradient of the head is formed.
struct Known {
  LogSumExp lse, ref_lse;
  const int64_t* pivot;
  const float *difference, *g;
};
void weight_gradient(const Problem& problem, const Known& known, void* dweight, int num_threads);

}  // namespace tk::linear_kl
