// Softmax of a row of logits in memory: one table of functions per instruction set. z = softcap(scale * x).
#pragma once

#include <cstdint>

#include "common/tile_kernels.h"

namespace tk {

struct RowSum {
  float max;   // over the row without one column, -inf when none is above it
  double sum;  // of exp(z - max) over the same; NaN when it holds a NaN or +inf
};

// d loss / d z of a row: constant * p + uniform, at the target at_target.
struct LogitGradient {
  float constant, uniform, at_target;
};

struct RowKernels {
  // One pass over the row, of which the column `target` stays out.
  RowSum (*log_sum)(Type type, const void* row, int64_t V, float scale, float cap, int64_t target);
  // out[v] = slope_v * d loss / d z_v with p = exp(z - lse), in the row's type; out may be the row itself.
  void (*gradient)(Type type, const void* row, void* out, int64_t V, float scale, float cap, float lse,
                   const LogitGradient& gradient, int64_t target);
  // z of one column.
  float (*logit)(Type type, const void* row, int64_t at, float scale, float cap);
};

// Those of the instruction set in use.
const RowKernels& row_kernels();

}  // namespace tk
