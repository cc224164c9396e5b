// What router_topk's forward (cuda.cu) and backward (backward.cu) on the GPU share.
#pragma once

#include "common/cuda.cuh"
#include "ops/router_topk/rule.h"

namespace tk {

__device__ __forceinline__ float load_as(const void* data, Element type, int64_t at) {
  if (type == Element::bf16) return to_float(static_cast<const __nv_bfloat16*>(data)[at]);
  if (type == Element::f16) return to_float(static_cast<const __half*>(data)[at]);
  return static_cast<const float*>(data)[at];
}

__device__ __forceinline__ void store_as(void* data, Element type, int64_t at, float value) {
  if (type == Element::bf16) {
    static_cast<__nv_bfloat16*>(data)[at] = from_float<__nv_bfloat16>(value);
  } else if (type == Element::f16) {
    static_cast<__half*>(data)[at] = from_float<__half>(value);
  } else {
    static_cast<float*>(data)[at] = value;
  }
}

}  // namespace tk
