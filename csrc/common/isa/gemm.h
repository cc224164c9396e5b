// The product of packed operands: see tile_kernels.h for the layouts.
#pragma once

#include "common/isa/vec.h"

namespace tk {
namespace TK_ISA {

// Register tile of the SIMD kernels: kMR rows by kNV vectors; AMX has 32 x 32 for bf16.
#if defined(__AVX512F__)
constexpr int kMR = 14, kNV = 2;
#elif defined(__AVX2__)
constexpr int kMR = 6, kNV = 2;
#else
constexpr int kMR = 4, kNV = 2;
#endif
constexpr int kNR = kNV * kLanes;

template <bool Pairs>
TK_INLINE vf multiply_add(vf acc, uint32_t a, vf b) {
#if defined(__AVX512BF16__)
  if constexpr (Pairs)
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a))),
                            reinterpret_cast<__m512bh>(b));
#endif
  float scalar;
  memcpy(&scalar, &a, 4);
  return acc + scalar * b;
}

// Terms of one sum before it is added to C: sums of sums lose fewer digits than one long sum. Products of bf16 do not
// need it.
template <bool Pairs>
constexpr int64_t kTerms = Pairs ? kKC : 128;

// c[M, kNR] (+)= a[M, k] b[k, kNR]; a has row stride kKS, all dwords.
template <bool Pairs, int M>
void micro(const uint32_t* a, const uint32_t* b, float* c, int64_t ldc, int64_t k, bool accumulate) {
  for (int64_t begin = 0; begin < k; begin += kTerms<Pairs>) {
    const int64_t end = k - begin < kTerms<Pairs> ? k : begin + kTerms<Pairs>;
    const bool add = accumulate || begin > 0;
    vf acc[M][kNV];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kNV; ++j) acc[i][j] = vf{};
    for (int64_t step = begin; step < end; ++step) {
      vf column[kNV];
#pragma GCC unroll 4
      for (int j = 0; j < kNV; ++j) column[j] = load<vf>(b + step * kNR + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kNV; ++j) acc[i][j] = multiply_add<Pairs>(acc[i][j], a[i * kKS + step], column[j]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kNV; ++j) {
        float* to = c + i * ldc + j * kLanes;
        store(to, add ? load<vf>(to) + acc[i][j] : acc[i][j]);
      }
  }
}

using Micro = void (*)(const uint32_t*, const uint32_t*, float*, int64_t, int64_t, bool);

template <bool Pairs, int M>
struct MicroTable {
  static Micro of(int64_t rows) { return rows == M ? &micro<Pairs, M> : MicroTable<Pairs, M - 1>::of(rows); }
};
template <bool Pairs>
struct MicroTable<Pairs, 0> {
  static Micro of(int64_t) { return nullptr; }
};

template <bool Pairs>
void gemm_simd(const uint32_t* a, int64_t rows_a, const uint32_t* b, float* c, int64_t ldc, int64_t m, int64_t n,
               int64_t k2, bool accumulate) {
  const int64_t k2_padded = round_up(k2, kKPad);
  // Equal panels: 128 rows are 9 panels of 14 and one of 2, or, better, 10 of 12 or 13.
  const int64_t panels = (m + kMR - 1) / kMR;
  for (int64_t k0 = 0; k0 < k2_padded; k0 += kKC) {
    const int64_t k = k2_padded - k0 < kKC ? k2_padded - k0 : kKC;
    const uint32_t* slab = a + k0 / kKC * rows_a * kKS;
    for (int64_t n0 = 0; n0 < n; n0 += kNR) {
      const uint32_t* panel = b + (n0 / kNR * k2_padded + k0) * kNR;  // stays in L1 over all rows
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t begin = p * m / panels, rows = (p + 1) * m / panels - begin;
        MicroTable<Pairs, kMR>::of(rows)(slab + begin * kKS, panel, c + begin * ldc + n0, ldc, k, accumulate || k0 > 0);
      }
    }
  }
}

#if defined(__AMX_BF16__)
// Addresses, because they may lie past the end: then nothing happens.
template <bool ForWriting>
TK_INLINE void fetch(uintptr_t at) {
  __builtin_prefetch(reinterpret_cast<const void*>(at), ForWriting, ForWriting ? 3 : 2);
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

// C of 32 x 32 in four tiles; every step multiplies 32 bf16 of K. Rows of A and C are padded to 32. A panel of B, 32
// KiB of it, stays in L1 over all rows: A, which is read once per panel, is loaded past L1 (2.3 instead of 1.7
// TFLOP/s). Meanwhile the next part of C and of the next panel are fetched: they come from behind L2 (without: 2.0).
inline void gemm_amx(const uint32_t* a, int64_t rows_a, const uint32_t* b, float* c, int64_t ldc, int64_t m, int64_t n,
                     int64_t k2, bool accumulate) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.bytes_per_row[tile] = 64;
    config.rows[tile] = 16;
  }
  _tile_loadconfig(&config);
  const int64_t k2_padded = round_up(k2, kKPad);
  const int64_t c_bytes = ldc * 4;
  for (int64_t k0 = 0; k0 < k2_padded; k0 += kKC) {
    const int64_t k = k2_padded - k0 < kKC ? k2_padded - k0 : kKC;
    const uint32_t* slab = a + k0 / kKC * rows_a * kKS;
    const bool add = accumulate || k0 > 0;
    for (int64_t n0 = 0; n0 < n; n0 += kNR) {
      const uint32_t* panel = b + (n0 / kNR * k2_padded + k0) * kNR;
      const int64_t panel_step = k * kNR * 4 / ((m + 31) / 32) / 64 * 64;
      auto next_panel = reinterpret_cast<uintptr_t>(panel + k2_padded * kNR);
      for (int64_t m0 = 0; m0 < m; m0 += 32, next_panel += panel_step) {
        uintptr_t next_b = next_panel;
        auto next_c = reinterpret_cast<uintptr_t>(c + n0) + (m0 + 32 < m ? (m0 + 32) * c_bytes : kNR * 4);
        const uint32_t *a0 = slab + m0 * kKS, *a1 = a0 + 16 * kKS, *b0 = panel;
        float *c0 = c + m0 * ldc + n0, *c1 = c0 + 16 * ldc;
        if (add) {
          _tile_loadd(0, c0, c_bytes);
          _tile_loadd(1, c0 + 16, c_bytes);
          _tile_loadd(2, c1, c_bytes);
          _tile_loadd(3, c1 + 16, c_bytes);
        } else {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        }
        for (int64_t step = 0; step < k; step += 16, a0 += 16, a1 += 16, b0 += 16 * kNR) {
          _tile_stream_loadd(4, a0, kKS * 4);
          _tile_loadd(6, b0, kNR * 4);
          _tile_stream_loadd(5, a1, kKS * 4);
          _tile_loadd(7, b0 + 16, kNR * 4);
          for (int i = 0; i < 2; ++i, next_c += c_bytes) {
            fetch<true>(next_c);
            fetch<true>(next_c + 64);
          }
          for (int i = 0; i < 4; ++i, next_b += 64) fetch<false>(next_b);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, c0, c_bytes);
        _tile_stored(1, c0 + 16, c_bytes);
        _tile_stored(2, c1, c_bytes);
        _tile_stored(3, c1 + 16, c_bytes);
      }
    }
  }
  _tile_release();
}
#endif

}  // namespace TK_ISA
}  // namespace tk
