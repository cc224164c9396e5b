// What the two CPU passes of linear_kl share.
#pragma once

#include <cstdint>

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
};

void weight_gradient(const Problem& problem, const LogSumExp& lse, const LogSumExp& ref_lse, const float* g,
                     void* dweight, int num_threads);

}  // namespace tk::linear_kl
