// What the two CPU passes of linear_cross_entropy share.
#pragma once

#include <cstdint>

#include "common/tile_kernels.h"

namespace tk::linear_cross_entropy {

struct Problem {
  Rows hidden, weight;
  int64_t num_rows, H, V;  // rows that count
  Targets targets;
  LogitMap map;
};

// The gradient of the head: dweight[v] = sum_t dz[t, v] h_t. Everything is per row that counts.
struct WeightGradient {
  RowGradient rows;  // of rows >= num_stashed at least
  void* dweight;     // [V, H] contiguous
  float* dbias;      // [V] or null

  // Rows [0, num_stashed) need no logits: the forward left their p in dweight's own memory.
  int64_t num_stashed = 0;
  Stash stash{};
  const float* coefficient = nullptr;   // [parts, num_stashed]: dz = coefficient * p, by the thread that stashed it
  const float* target_value = nullptr;  // [num_stashed]: dz of the target's column
  int parts = 1;                        // the threads that shared the columns, as member_columns says
};

void weight_gradient(const Problem& problem, const WeightGradient& out, int num_threads);

}  // namespace tk::linear_cross_entropy
