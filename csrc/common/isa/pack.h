// Packing of operands: see tile_kernels.h for the layouts.
#pragma once

#include "common/isa/gemm.h"

namespace tk {
namespace TK_ISA {

// kLanes dwords of one source row from dword `k2` on; `left` source elements remain there (may be <= 0): rest zero.
template <Type T, bool Pairs>
TK_INLINE vu load_dwords(const void* row, int64_t k2, int64_t k_elems) {
  constexpr int kPer = Pairs ? 2 : 1;
  const int64_t first = k2 * kPer, left = k_elems - first;
  if constexpr (Pairs || T == Type::f32) {
    const char* p = static_cast<const char*>(row) + first * size_of(T);
    if (left >= kLanes * kPer) return load<vu>(p);
    vu v = {};
    if (left > 0) memcpy(&v, p, static_cast<size_t>(left) * size_of(T));
    return v;
  } else {
    if (left >= kLanes) return reinterpret_cast<vu>(load_as_float<T>(row, first));
    uint16_t some[kLanes] = {};
    if (left > 0) memcpy(some, static_cast<const uint16_t*>(row) + first, static_cast<size_t>(left) * 2);
    return reinterpret_cast<vu>(load_as_float<T>(some, 0));
  }
}

TK_INLINE const void* row_of(const Rows& rows, int64_t r) {
  const int64_t at = rows.index ? rows.index[r] : r;
  return static_cast<const char*>(rows.data) + at * rows.stride * size_of(rows.type);
}

// Instantiates body<T> for the storage type.
template <bool Pairs, typename F>
TK_INLINE void for_type(Type type, F&& body) {
  if constexpr (Pairs) {
    body.template operator()<Type::bf16>();
  } else {
    if (type == Type::f32) body.template operator()<Type::f32>();
    if (type == Type::bf16) body.template operator()<Type::bf16>();
    if (type == Type::f16) body.template operator()<Type::f16>();
  }
}

template <bool Pairs>
void pack_a(const Rows& rows, int64_t m, int64_t m_padded, int64_t k_elems, int64_t rows_a, uint32_t* out) {
  const int64_t k2 = round_up(Pairs ? (k_elems + 1) / 2 : k_elems, kKPad);
  for_type<Pairs>(rows.type, [&]<Type T>() {
    for (int64_t r = 0; r < m_padded; ++r) {
      const void* row = r < m ? row_of(rows, r) : nullptr;
      for (int64_t k = 0; k < k2; k += kLanes) {
        uint32_t* to = out + (k / kKC * rows_a + r) * kKS + k % kKC;
        store(to, r < m ? load_dwords<T, Pairs>(row, k, k_elems) : vu{});
      }
    }
  });
}

// v[i][j] -> v[j][i] of kLanes x kLanes dwords: log2(kLanes) rounds of the perfect shuffle.
TK_INLINE void transpose(vu (&v)[kLanes]) {
  vu low = {}, high = {};
  for (int i = 0; i < kLanes; ++i) {
    low[i] = static_cast<uint32_t>(i / 2 + (i % 2) * kLanes);
    high[i] = low[i] + kLanes / 2;
  }
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    vu next[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shuffle(v[i], v[i + kLanes / 2], low);
      next[2 * i + 1] = __builtin_shuffle(v[i], v[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = next[i];
  }
}

template <bool Pairs>
void pack_bt(const Rows& rows, int64_t n, int64_t k_elems, uint32_t* out) {
  const int64_t k2 = round_up(Pairs ? (k_elems + 1) / 2 : k_elems, kKPad);
  const int64_t n_padded = round_up(n, kNR);
  for_type<Pairs>(rows.type, [&]<Type T>() {
    for (int64_t n0 = 0; n0 < n_padded; n0 += kLanes) {
      uint32_t* panel = out + n0 / kNR * k2 * kNR + n0 % kNR;
      const void* source[kLanes];
      for (int i = 0; i < kLanes; ++i) source[i] = n0 + i < n ? row_of(rows, n0 + i) : nullptr;
      for (int64_t k = 0; k < k2; k += kLanes) {
        vu v[kLanes];
        if (n0 + kLanes <= n) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) v[i] = load_dwords<T, Pairs>(source[i], k, k_elems);
        } else {
          for (int i = 0; i < kLanes; ++i) v[i] = source[i] ? load_dwords<T, Pairs>(source[i], k, k_elems) : vu{};
        }
        transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(panel + (k + i) * kNR, v[i]);
      }
    }
  });
}

template <bool Pairs>
void pack_b(const Rows& rows, int64_t k_elems, int64_t n, uint32_t* out) {
  const int64_t k2 = round_up(Pairs ? (k_elems + 1) / 2 : k_elems, kKPad);
  const int64_t n_padded = round_up(n, kNR);
  for_type<Pairs>(rows.type, [&]<Type T>() {
    for (int64_t k = 0; k < k2; ++k) {
      if constexpr (Pairs) {
        const void* even = 2 * k < k_elems ? row_of(rows, 2 * k) : nullptr;
        const void* odd = 2 * k + 1 < k_elems ? row_of(rows, 2 * k + 1) : nullptr;
        for (int64_t n0 = 0; n0 < n_padded; n0 += kLanes) {
          vh lower = {}, upper = {};
          if (n0 + kLanes <= n) {
            if (even) lower = load<vh>(static_cast<const uint16_t*>(even) + n0);
            if (odd) upper = load<vh>(static_cast<const uint16_t*>(odd) + n0);
          } else if (n0 < n) {
            const auto bytes = static_cast<size_t>(n - n0) * 2;
            if (even) memcpy(&lower, static_cast<const uint16_t*>(even) + n0, bytes);
            if (odd) memcpy(&upper, static_cast<const uint16_t*>(odd) + n0, bytes);
          }
          const vu v = __builtin_convertvector(lower, vu) | (__builtin_convertvector(upper, vu) << 16);
          store(out + (n0 / kNR * k2 + k) * kNR + n0 % kNR, v);
        }
      } else {
        const void* row = k < k_elems ? row_of(rows, k) : nullptr;
        for (int64_t n0 = 0; n0 < n_padded; n0 += kLanes)
          store(out + (n0 / kNR * k2 + k) * kNR + n0 % kNR, row ? load_dwords<T, false>(row, n0, n) : vu{});
      }
    }
  });
}

template <Type T>
TK_INLINE void store_some(void* out, int64_t offset, vf v, int64_t left) {
  if (left >= kLanes) {
    store_float<T>(out, offset, v);
  } else {
    char some[kLanes * 4];
    store_float<T>(some, 0, v);
    memcpy(static_cast<char*>(out) + offset * size_of(T), some, static_cast<size_t>(left) * size_of(T));
  }
}

inline void store_rows(const float* c, int64_t ldc, int64_t m, int64_t n, Type type, void* out, int64_t stride) {
  for_type<false>(type, [&]<Type T>() {
    for (int64_t r = 0; r < m; ++r) {
      void* to = static_cast<char*>(out) + r * stride * size_of(T);
      for (int64_t i = 0; i < n; i += kLanes) store_some<T>(to, i, load<vf>(c + r * ldc + i), n - i);
    }
  });
}

inline void combine_row(const float* const* parts, const float* beta, int64_t num_parts, const void* row, float alpha,
                        int64_t n, Type type, void* out) {
  for_type<false>(type, [&]<Type T>() {
    for (int64_t i = 0; i < n; i += kLanes) {
      vf v = {};
      if (row != nullptr) v = reinterpret_cast<vf>(load_dwords<T, false>(row, i, n)) * alpha;
      for (int64_t j = 0; j < num_parts; ++j) v += load<vf>(parts[j] + i) * beta[j];
      store_some<T>(out, i, v, n - i);
    }
  });
}

}  // namespace TK_ISA
}  // namespace tk
