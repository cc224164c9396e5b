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

// Two neighbouring rows of bf16, 2 kLanes columns each, to pairs along the rows: dwords of columns 0.., kLanes...
TK_INLINE void interleave(vu even, vu odd, vu* first, vu* second) {
  vu low = {}, high = {};
  for (int i = 0; i < kLanes; ++i) {
    low[i] = static_cast<uint32_t>(i / 2 + (i % 2) * kLanes);
    high[i] = low[i] + kLanes / 2;
  }
  const vu x = (even & 0xffffu) | (odd << 16), y = (even >> 16) | (odd & 0xffff0000u);  // even, odd columns
  *first = __builtin_shuffle(x, y, low);
  *second = __builtin_shuffle(x, y, high);
}

// Blocks of kLanes rows by kLanes dwords: transposed to bt, in order to b. `bt` is null for the second form only.
template <Type T, bool Pairs>
void pack_blocks(const Rows& rows, int64_t n, int64_t k_elems, uint32_t* bt, uint32_t* b) {
  constexpr int kPer = Pairs ? 2 : 1;
  const int64_t k2 = round_up((k_elems + kPer - 1) / kPer, kKPad);  // of bt
  const int64_t n_padded = round_up(n, kNR);                        // columns of bt
  const int64_t b_k2 = round_up((n + kPer - 1) / kPer, kKPad);      // of b
  const int64_t b_dwords = round_up(k_elems, kNR) / kPer;           // source dwords that b's columns take
  const int64_t blocks_end = round_up(b_k2 * kPer > n_padded ? b_k2 * kPer : n_padded, kLanes);
  const int64_t k_end = k2 > b_dwords ? k2 : b_dwords;
  constexpr int64_t kAhead = 1024;  // bytes of a row; the memory's latency at a row's share of its bandwidth
  for (int64_t n0 = 0; n0 < blocks_end; n0 += kLanes) {
    const void* source[kLanes];
    for (int i = 0; i < kLanes; ++i) source[i] = n0 + i < n ? row_of(rows, n0 + i) : nullptr;
    const bool whole = n0 + kLanes <= n;
    for (int64_t k = 0; k < k_end; k += kLanes) {
      vu v[kLanes];
      if (whole) {
        const int64_t here = k * kPer * size_of(T), width = k_elems * size_of(T);
        for (int i = 0; i < kLanes; ++i) {
          const auto* row = static_cast<const char*>(source[i]);
          // Past the end of this row comes the start of the row that the next block reads in its place.
          const int64_t at =
              here + kAhead < width ? here + kAhead : here + kAhead - width + kLanes * rows.stride * size_of(T);
          __builtin_prefetch(row + at, 0, 2);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) v[i] = load_dwords<T, Pairs>(source[i], k, k_elems);
      } else {
        for (int i = 0; i < kLanes; ++i) v[i] = source[i] ? load_dwords<T, Pairs>(source[i], k, k_elems) : vu{};
      }
      if (b != nullptr && k < b_dwords) {
        const int64_t column = k * kPer;
        uint32_t* to = b + (column / kNR * b_k2 + n0 / kPer) * kNR + column % kNR;
        const int64_t rows_left = b_k2 - n0 / kPer;
#pragma GCC unroll 16
        for (int i = 0; i < kLanes / kPer; ++i) {
          if (i >= rows_left) break;
          if constexpr (Pairs) {
            vu first, second;
            interleave(v[2 * i], v[2 * i + 1], &first, &second);
            store(to + i * kNR, first);
            store(to + i * kNR + kLanes, second);
          } else {
            store(to + i * kNR, v[i]);
          }
        }
      }
      if (bt != nullptr && k < k2 && n0 < n_padded) {
        uint32_t* to = bt + (n0 / kNR * k2 + k) * kNR + n0 % kNR;
        transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(to + i * kNR, v[i]);
      }
    }
  }
}

template <bool Pairs>
void pack_bt(const Rows& rows, int64_t n, int64_t k_elems, uint32_t* out) {
  for_type<Pairs>(rows.type, [&]<Type T>() { pack_blocks<T, Pairs>(rows, n, k_elems, out, nullptr); });
}

template <bool Pairs>
void pack_b(const Rows& rows, int64_t k_elems, int64_t n, uint32_t* out) {
  for_type<Pairs>(rows.type, [&]<Type T>() { pack_blocks<T, Pairs>(rows, k_elems, n, nullptr, out); });
}

template <bool Pairs>
void pack_both(const Rows& rows, int64_t n, int64_t k_elems, uint32_t* bt, uint32_t* b) {
  for_type<Pairs>(rows.type, [&]<Type T>() { pack_blocks<T, Pairs>(rows, n, k_elems, bt, b); });
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

// A store that does not read the line first: for results larger than any cache. p is aligned to the vector.
template <Type T>
TK_INLINE void stream(void* p, vf v) {
#if defined(__AVX512F__)
  if constexpr (T == Type::f32) {
    _mm512_stream_ps(static_cast<float*>(p), v);
  } else {
    const vh half = T == Type::bf16 ? to_bf16(v) : to_f16(v);
    _mm256_stream_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(half));
  }
#else
  store_float<T>(p, 0, v);
#endif
}

inline void store_rows(const float* c, int64_t ldc, int64_t m, int64_t n, Type type, void* out, int64_t stride) {
  for_type<false>(type, [&]<Type T>() {
    constexpr int64_t kBytes = kLanes * size_of(T);
    const bool aligned = (reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(stride * size_of(T))) % kBytes == 0;
    for (int64_t r = 0; r < m; ++r) {
      auto* to = static_cast<char*>(out) + r * stride * size_of(T);
      int64_t i = 0;
      if (aligned)
        for (; i + kLanes <= n; i += kLanes) stream<T>(to + i * size_of(T), load<vf>(c + r * ldc + i));
      for (; i < n; i += kLanes) store_some<T>(to, i, load<vf>(c + r * ldc + i), n - i);
    }
  });
#if defined(__AVX512F__)
  _mm_sfence();
#endif
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
