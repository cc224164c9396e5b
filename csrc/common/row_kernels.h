// Softmax of a row of logits in memory: one table of functions per instruction set. z = softcap(scale * x).
#pragma once

#include <cstdint>

#include "common/tile_kernels.h"

namespace tk {

struct RowSum {
  float max;   // over the row, -inf when no column is above it
  double sum;  // of exp(z - max); NaN when the row holds a NaN or +inf
};

struct RowKernels {
  // One pass over the row.
  RowSum (*log_sum)(Type type, const void* row, int64_t V, float scale, float cap);
  // out[v] = g * slope_v * ((v == target) - exp(z_v - lse)), in the row's type; out may be the row itself.
  void (*gradient)(Type type, const void* row, void* out, int64_t V, float scale, float cap, float lse, float g,
                   int64_t target);
  // z of one column.
  float (*logit)(Type type, const void* row, int64_t at, float scale, float cap);
};

// Those of the instruction set in use.
const RowKernels& row_kernels();

}  // namespace tk
