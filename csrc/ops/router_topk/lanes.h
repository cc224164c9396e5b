// Lane arithmetic that router_topk's two row kernels share. Included by *.isa.cpp only.
#pragma once

#include "common/isa/vec.h"

namespace tk {
namespace TK_ISA {

TK_INLINE vi splat_int(int32_t x) { return vi{} + x; }
TK_INLINE vi iota() {
  vi v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// Writes a vector at element `at`, of which `count` lanes count; memory up to element `limit` may be written: rows are
// filled in order, so what lands in the next row is overwritten by it.
template <Type T>
TK_INLINE void store_part(void* p, int64_t at, vf v, int64_t count, int64_t limit) {
  if (at + kLanes <= limit) return store_float<T>(p, at, v);
  char raw[kLanes * 4];
  store_float<T>(raw, 0, v);
  if (count > kLanes) count = kLanes;
  __builtin_memcpy(static_cast<char*>(p) + at * size_of(T), raw, static_cast<size_t>(count * size_of(T)));
}

// kLanes numbers from element `at` of an array of `size`, zeros beyond its end.
template <Type T>
TK_INLINE vf load_part(const void* p, int64_t at, int64_t size) {
  if (at + kLanes <= size) return load_as_float<T>(p, at);
  char raw[kLanes * 4] = {};
  const int64_t left = size - at;
  __builtin_memcpy(raw, static_cast<const char*>(p) + at * size_of(T), static_cast<size_t>(left * size_of(T)));
  return load_as_float<T>(raw, 0);
}

}  // namespace TK_ISA
}  // namespace tk
