// What router_topk's threads and binding (cpu.cpp) and its row kernels (rows.isa.cpp and gradient.isa.cpp,
// one copy per instruction set) share.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "common/tile_kernels.h"
#include "ops/router_topk/rule.h"

namespace tk {

// Strides in elements; null where absent. Outputs are contiguous.
struct Router : RouterRule {
  const void* logits;
  Type logits_type;
  int64_t num_tokens, num_experts, stride_t, stride_e;
  const float* bias;  // [E] contiguous
  const bool* mask;
  int64_t mask_stride;
  const float* table;    // [E] contiguous
  const int64_t* given;  // [T, k] contiguous, the experts of each token; null: choose them
  void* weights;         // [T, k]
  Type weights_type;
  int64_t* indices;  // [T, k]
  float* chosen;     // [T, k]
  float* stats;      // [T, 2]: maximum m and sum of e^(z - m), for the gradient
  int64_t* counts;   // [E], added to
  int64_t counts_stride;
  float* score;  // [T], added to
  int64_t score_stride;
};

struct RouterGradient : RouterRule {
  const void* grad_weights;
  Type grad_type;
  int64_t grad_stride_t, grad_stride_k;
  const void* logits;  // null unless the gradient is dense
  Type type;           // of the logits and their gradient
  int64_t stride_t, stride_e;
  const int64_t* indices;  // [T, k] contiguous
  const float* chosen;     // [T, k] contiguous
  const float* stats;      // [T, 2] contiguous
  int64_t num_tokens, num_experts;
  void* gradient;  // [T, E] contiguous
};

// Numbers in a row's scratch arrays: whole vectors for every instruction set, one to spare.
inline int64_t row_capacity(int64_t num_experts) { return round_up(num_experts, 16) + 16; }

// Rows that a thread takes through the steps of the forward together: a row's steps wait for each other, and a
// processor looks a few hundred instructions ahead, no more than one row is long.
inline constexpr int kRouterRows = 4;

// Of one row; arrays hold row_capacity(E) elements.
struct RouterRow {
  float *logits, *scores, *choice;
  int32_t *ordered, *candidates, *candidate_index, *best, *groups;
};

// The k largest of ordered[n], best first, lowest index among equals: for k too large for the row kernels.
using SelectMany = void (*)(const int32_t* ordered, int64_t n, int64_t k, int32_t* best);

// Of one thread.
struct RouterScratch {
  RouterRow rows[kRouterRows];
  int64_t* counts;  // [E]
  SelectMany select_many;
};

// Of one thread.
struct RouterGradientScratch {
  float* upstream;  // [row_capacity(k)]
  // With block_rows > 0, this many rows are made in `block` and written past the caches; block and the gradient's rows
  // then begin on cache lines.
  char* block;
  int64_t block_rows;
};

using RouterForward = void (*)(const Router& p, const Range& tokens, const RouterScratch& scratch);
using RouterBackward = void (*)(const RouterGradient& p, const Range& tokens, const RouterGradientScratch& scratch);

}  // namespace tk
