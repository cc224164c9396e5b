// The k largest of a row, in order. Included by *.isa.cpp only.
#pragma once

#include "ops/router_topk/lanes.h"
#include "ops/router_topk/router.h"

namespace tk {
namespace TK_ISA {
namespace {

constexpr int32_t kLowest = INT32_MIN;  // it and the next are below every number's `ordered`

TK_INLINE int32_t min_lanes(vi v) {
#if defined(__AVX512F__)
  return _mm512_reduce_min_epi32(reinterpret_cast<__m512i>(v));
#else
  int32_t lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i + half] < lanes[i] ? lanes[i + half] : lanes[i];
  return lanes[0];
#endif
}

// Bit i: lane i of x is at least `low`.
TK_INLINE uint32_t at_least_mask(vi x, int32_t low) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epi32_mask(reinterpret_cast<__m512i>(x), _mm512_set1_epi32(low));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(x >= splat_int(low))));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(x >= splat_int(low))));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(x[i] >= low) << i;
  return mask;
#endif
}

// Integers in torch.sort's order of the numbers: NaN above all, -0 equal to +0.
TK_INLINE vi to_ordered(vf x) {
  const vi bits = reinterpret_cast<vi>(x + 0.0f);  // -0 becomes +0
  const vi ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  return x == x ? ordered : splat_int(INT32_MAX);
}

TK_INLINE vf from_ordered(vi x) { return reinterpret_cast<vf>(x ^ ((x >> 31) & 0x7fffffff)); }

#if defined(__AVX512F__)
// For each lane, how many of the 16 numbers are larger; with `ties`, also how many equal ones stand in lower lanes.
template <bool ties>
TK_INLINE vi count_before(const int32_t* numbers, vi mine) {
  const __m512i one = _mm512_set1_epi32(1);
  __m512i before = _mm512_setzero_si512();
#pragma GCC unroll 16
  for (int j = 0; j < kLanes; ++j) {
    // No number, nor what fills a vector, is INT32_MIN, so that the -1 does not wrap.
    const vi least = ties ? mine + (iota() > j) : mine;
    const __mmask16 larger = _mm512_cmpgt_epi32_mask(_mm512_set1_epi32(numbers[j]), reinterpret_cast<__m512i>(least));
    before = _mm512_mask_add_epi32(before, larger, before, one);
  }
  return reinterpret_cast<vi>(before);
}

// As `rank` for n <= 16, without a branch or a loop that depends on n: a branch that waits for the selection, and is
// predicted wrongly every other row, keeps the processor from beginning the next row. Writes 16 of values and best.
TK_INLINE void rank_vector(int32_t* values, const int32_t* index, int64_t n, int32_t* best) {
  const auto real = static_cast<__mmask16>((1u << n) - 1);
  const auto mine = _mm512_mask_loadu_epi32(_mm512_set1_epi32(kLowest + 1), real, values);  // count_before subtracts 1
  _mm512_storeu_si512(values, mine);
  asm("" : "+r"(values) : : "memory");  // lanes are read from memory below, which is cheaper than permuting them
  const auto lanes = reinterpret_cast<__m512i>(iota());
  const auto ranks = _mm512_mask_mov_epi32(
      lanes, real, reinterpret_cast<__m512i>(count_before<true>(values, reinterpret_cast<vi>(mine))));
  // The inverse permutation: lane i puts the digit i at place rank_i of a number of 16 hexadecimal digits.
  const auto half = [&](__m256i lane, __m256i place) {
    return _mm512_sllv_epi64(_mm512_cvtepu32_epi64(lane), _mm512_cvtepu32_epi64(_mm256_slli_epi32(place, 2)));
  };
  const auto digits = _mm512_or_si512(half(_mm512_castsi512_si256(lanes), _mm512_castsi512_si256(ranks)),
                                      half(_mm512_extracti64x4_epi64(lanes, 1), _mm512_extracti64x4_epi64(ranks, 1)));
  const __m128i number = _mm_cvtsi64_si128(_mm512_reduce_or_epi64(digits)), low = _mm_set1_epi8(15);
  const __m128i order = _mm_unpacklo_epi8(_mm_and_si128(number, low), _mm_and_si128(_mm_srli_epi16(number, 4), low));
  const __m512i from = _mm512_cvtepu8_epi32(order);
  _mm512_storeu_si512(best, _mm512_permutexvar_epi32(from, _mm512_loadu_si512(index)));
  _mm512_storeu_si512(values, _mm512_permutexvar_epi32(from, mine));
}
#endif

// Ranks the candidates [n] (in the order of their indices) by counting what is before each, and puts the k first in
// order. Arrays are padded to whole vectors.
void rank(const int32_t* values, const int32_t* index, int64_t n, int64_t k, int32_t* best) {
  int32_t ranks[64 + kLanes], ordered[64 + kLanes];
  for (int64_t i = 0; i < n; i += kLanes) {
    const vi mine = load<vi>(values + i), lane = iota() + static_cast<int32_t>(i);
    vi before = {};
    for (int64_t j = 0; j < n; ++j) {
      // An equal one is before when its index is lower; no real value is INT32_MIN, so that the -1 does not wrap.
      before -= splat_int(values[j]) > mine + (lane > static_cast<int32_t>(j));
    }
    store(ranks + i, before);
  }
  for (int64_t i = 0; i < n; ++i) ordered[ranks[i]] = index[i];
  for (int64_t j = 0; j < k; ++j) best[j] = ordered[j];
}

// Insertion behind a threshold. Values and index are read once, in order.
void insert(const int32_t* values, const int32_t* index, int64_t n, int64_t k, int32_t* best) {
  int32_t top[16];
  int64_t have = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (have == k && values[i] <= top[k - 1]) continue;
    int64_t j = have < k ? have++ : k - 1;
    for (; j > 0 && top[j - 1] < values[i]; --j) {
      top[j] = top[j - 1];
      best[j] = best[j - 1];
    }
    top[j] = values[i];
    best[j] = index[i];
  }
}

// A row to choose from and what the choice writes: the indices of the k largest into `best`, best first, the lowest
// index first among equals, and what they are ordered by into `candidates`.
struct Selection {
  const float* x;
  int32_t *ordered, *candidates, *candidate_index, *best;
  int32_t bound;
};

constexpr int kSlices = 16, kVectors = kSlices / kLanes;

// x as ordered integers, and the maxima of 16 interleaved slices of them.
TK_INLINE void order(const Selection& row, int64_t n, int32_t* slices) {
  vi maxima[kVectors];
  for (vi& maximum : maxima) maximum = splat_int(kLowest);
  const float* x = row.x;
  int32_t* ordered = row.ordered;
  const auto step = [&](int64_t e, bool whole) {
    for (int v = 0; v < kVectors; ++v) {
      vi value = to_ordered(load<vf>(x + e + v * kLanes));
      const int64_t left = n - e - v * kLanes;
      if (!whole) value = iota() < static_cast<int32_t>(left < 0 ? 0 : left) ? value : splat_int(kLowest);
      store(ordered + e + v * kLanes, value);
      maxima[v] = value > maxima[v] ? value : maxima[v];
    }
  };
  int64_t e = 0;
  for (; e + kSlices <= n; e += kSlices) step(e, true);
  if (e < n) step(e, false);
  for (int v = 0; v < kVectors; ++v) store(slices + v * kLanes, maxima[v]);
}

// The k-th largest of the slices' maxima. They are 16 different elements, so it bounds the k-th largest of the row from
// below; about k + 3 elements pass it.
TK_INLINE int32_t lower_bound(const int32_t* slices, int64_t k) {
  int32_t bound = INT32_MAX;
  for (int v = 0; v < kVectors; ++v) {
    const vi mine = load<vi>(slices + v * kLanes);
#if defined(__AVX512F__)
    const vi above = count_before<false>(slices, mine);
#else
    vi above = {};
    for (int j = 0; j < kSlices; ++j) above -= splat_int(slices[j]) > mine;
#endif
    const vi kept = above < static_cast<int32_t>(k) ? mine : splat_int(INT32_MAX);
    const int32_t least = min_lanes(kept);
    bound = least < bound ? least : bound;
  }
  return bound == kLowest ? kLowest + 1 : bound;  // keeps the padding out
}

// The elements that pass the bound, in order, into the candidates; returns how many.
TK_INLINE int64_t pass(const Selection& row, int64_t n) {
  int64_t found = 0;
  const int32_t* ordered = row.ordered;
  int32_t *candidates = row.candidates, *candidate_index = row.candidate_index;
  for (int64_t e = 0; e < n; e += kLanes) {
    const vi value = load<vi>(ordered + e);
    uint32_t mask = at_least_mask(value, row.bound);
#if defined(__AVX512F__)
    const __m512i index = _mm512_add_epi32(reinterpret_cast<__m512i>(iota()), _mm512_set1_epi32(static_cast<int>(e)));
    _mm512_storeu_si512(candidates + found,
                        _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), reinterpret_cast<__m512i>(value)));
    _mm512_storeu_si512(candidate_index + found, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), index));
    found += __builtin_popcount(mask);
#else
    for (; mask != 0; mask &= mask - 1) {
      const int lane = __builtin_ctz(mask);
      candidates[found] = ordered[e + lane];
      candidate_index[found++] = static_cast<int32_t>(e) + lane;
    }
#endif
  }
  return found;
}

// Chooses in each of `count` rows of n, one step after the other in all of them: see kRouterRows.
void select(Selection* rows, int count, int64_t n, int64_t k, SelectMany many) {
  int32_t slices[kRouterRows][kSlices];
  int64_t found[kRouterRows];
  const auto take_values = [k](const Selection& row) {
    for (int64_t j = 0; j < k; ++j) row.candidates[j] = row.ordered[row.best[j]];
  };
  for (int r = 0; r < count; ++r) order(rows[r], n, slices[r]);
  if (k > kSlices) {
    for (int r = 0; r < count; ++r) {
      many(rows[r].ordered, n, k, rows[r].best);
      take_values(rows[r]);
    }
    return;
  }
  for (int r = 0; r < count; ++r) rows[r].bound = lower_bound(slices[r], k);
  for (int r = 0; r < count; ++r) found[r] = pass(rows[r], n);
  for (int r = 0; r < count; ++r) {
    const Selection& row = rows[r];
#if defined(__AVX512F__)
    if (found[r] <= kLanes) {
      rank_vector(row.candidates, row.candidate_index, found[r], row.best);
      continue;
    }
#endif
    (found[r] <= 64 ? &rank : &insert)(row.candidates, row.candidate_index, found[r], k, row.best);
    take_values(row);
  }
}

}  // namespace
}  // namespace TK_ISA
}  // namespace tk
