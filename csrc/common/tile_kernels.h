// The tile kernels of the linear ops: one table of functions per instruction set.
//
// Everything is built from one product, C[M,N] (+)= A[M,K] B[K,N] with fp32 accumulation, on packed operands whose
// element is a "dword": one fp32 number, or two neighbouring bf16 numbers along K (K2 counts dwords, zero padded).
//
//   packed A: [ceil(K2/kKC)][rows_a][kKS] dwords, a row-major slab per block of kKC dwords; kKS > kKC keeps the rows
//             of a register tile out of one cache set. rows_a is a multiple of kRowPad.
//   packed B: [N / nr][K2p][nr] dwords, K2p = K2 rounded up to kKPad; columns beyond N and dwords beyond K2 are zero.
//   C:        row-major fp32, ldc >= N rounded up to nr, rows padded to kRowPad.
//
// One layout serves the SIMD register tiles (fp32 FMA, vdpbf16ps) and the AMX tiles.
#pragma once

#include <cstdint>

namespace tk {

enum class Type : int { f32 = 0, bf16 = 1, f16 = 2 };

inline constexpr int64_t kKC = 256;            // dwords of K per block: 32 KiB of a panel of B
inline constexpr int64_t kKS = kKC + 16;       // row stride of packed A, in dwords
inline constexpr int64_t kKPad = 16;           // K2 is padded to this
inline constexpr int64_t kRowPad = 32;         // rows of A and C are padded to this
inline constexpr int64_t kColPad = 64;         // multiple of every nr
inline constexpr int64_t kMaxTileCols = 1024;  // of the softmax

// Rows of a matrix in memory: strides in elements, columns contiguous; `index` picks rows (null: all, in order).
struct Rows {
  const void* data;
  Type type;
  int64_t stride;
  const int64_t* index;
};

// The link from raw dot products to logits: z = softcap(scale * (s + bias)).
struct LogitMap {
  const float* bias;  // [V] or null
  float scale;
  float cap;  // 0: no softcap
};

// The targets of rows, K each; one outside [0, V) is no class, which takes part in nothing. Several may be the same.
struct Targets {
  const int64_t* classes;  // [rows, count]
  int64_t count;

  Targets from(int64_t r) const { return {classes + r * count, count}; }
};

// Online softmax state of a block of rows. The targets' own terms are kept apart, so that 1 - p(target) has no
// cancellation: sum covers the other columns only, relative to exp(max).
struct SoftmaxState {
  float* max;           // [rows] reference maximum, -inf before the first column
  float* sum;           // [rows] sum over all v but the targets of exp(z_v - max)
  float* target_logit;  // [rows, K] z_target once its column was seen
  float* target_slope;  // [rows, K] softcap'(target)
  // For the entropy, or null: the largest of the other columns, the first of several, stays out of `sum` too.
  float* pivot = nullptr;  // [rows] its logit
  int64_t* top = nullptr;  // [rows] its column
  float* gap = nullptr;    // [rows] sum over the same v as `sum` of exp(z_v - max) (z_v - max)

  SoftmaxState from(int64_t r, int64_t num_targets) const {
    return {max + r,
            sum + r,
            target_logit + r * num_targets,
            target_slope + r * num_targets,
            pivot == nullptr ? nullptr : pivot + r,
            top == nullptr ? nullptr : top + r,
            gap == nullptr ? nullptr : gap + r};
  }
};

// Where p = exp(z - max) * softcap' of some rows is kept until the normalisers are known: units of kColPad columns,
// each [rows, kColPad] in `type`. Unit u starts at element u * unit of `data`; a last unit with fewer columns is
// `tail`.
struct Stash {
  void* data;
  Type type;  // f32 or bf16
  int64_t unit;
  void* tail;
  int64_t tail_from;  // first column of the tail
  int64_t begin;      // the thread's first column: where a rescaling starts

  char* at(int64_t r, int64_t v) const {
    const int64_t bytes = type == Type::f32 ? 4 : 2;
    if (v >= tail_from) return static_cast<char*>(tail) + (r * kColPad + v - tail_from) * bytes;
    return static_cast<char*>(data) + (v / kColPad * unit + r * kColPad + v % kColPad) * bytes;
  }
};

// logsumexp of a row as high + low: with one fp32 number p would carry the rounding of a large lse.
struct LogSumExp {
  const float *high, *low;
};

// d loss / d z of rows whose logsumexp is known, d / d (W h) without the scale: softcap' times p (constant + log * log
// p), at the targets softcap' times at_target. What a target's own number is made of has no cancellation.
struct RowGradient {
  LogSumExp lse;
  const float *constant, *log;  // [rows]; log may be null, for 0
  const float* at_target;       // [rows, K]

  RowGradient from(int64_t r, int64_t num_targets) const {
    return {{lse.high + r, lse.low + r}, constant + r, log == nullptr ? nullptr : log + r, at_target + r * num_targets};
  }
};

// One column tile of KL(ref || policy), raw dot products on entry. p~ and q~ are relative to their own maxima.
//
// The gradient sum_v (p_v - q_v) W_v has two normalisers that are known at the end only, so two sums are accumulated:
// of (p~ - c q~) and of q~. With c close to the ratio of the normalisers, a difference of nearly equal distributions is
// taken before it is rounded to the operand's type.
//
// Where both models are sure of one class, p - q is a difference of nearly equal numbers there, and what either leaves
// to all others is not. So the reference's largest class, the pivot, stays out of the sums; it is in what is
// accumulated for the gradient, as `kept` and `ref_kept`, which whoever knows the normalisers replaces.
struct KlTile {
  float *s, *ref_s;  // [rows, cols], overwritten
  int64_t lds, rows, cols;
  int64_t v0;  // the first column
  LogitMap map;
  float *max, *sum, *ref_max, *ref_sum;  // [rows] online state of policy and reference
  float* ratio;                          // [rows] c; 0 before it was chosen
  float *pivot, *ref_pivot, *slope;      // [rows] logits of the pivot, and softcap' there
  float *kept, *ref_kept;                // [rows] what it is multiplied with in d and ref_d
  double* cross;                         // [rows] sum of q~ ((z_ref - ref_max) - (z - max))
  int64_t* top;                          // [rows] the pivot, -1 before there is one
  // Packed A of (p~ - c q~) softcap' and, ref_row rows below, of q~ softcap'; null without a gradient.
  uint32_t* p;
  int64_t rows_p, ref_row, p_offset;
  float *d, *ref_d;  // [rows, ldd] what was accumulated from earlier tiles, or null
  int64_t ldd;
};

struct KlGradientTile {
  const float *s, *ref_s;  // [cols of the vocabulary, rows] raw dot products
  int64_t lds, cols, rows;
  LogitMap map;
  int64_t v0;  // the first column
  LogSumExp lse, ref_lse;
  const int64_t* pivot;     // [rows] a class, or none below 0
  const float* difference;  // [rows] p - q there
  const float* g;
  uint32_t* dz;  // packed A: g_t * scale * softcap' * (p - q)
  int64_t rows_dz, dz_offset;
};

struct TileKernels {
  const char* name;
  bool pairs;  // dwords hold two bf16; otherwise one fp32
  int64_t nr;  // columns of a B panel
  // Packing a head that comes from memory takes as long as its product with this many rows (measured at H = 1024).
  int64_t pack_rows;

  // A[r,k] = rows[r][k] for r < m, k < k_elems, and 0 for m <= r < m_padded; `out` points at the slab row of r = 0.
  void (*pack_a)(const Rows& rows, int64_t m, int64_t m_padded, int64_t k_elems, int64_t rows_a, uint32_t* out);
  // B[k,n] = rows[n][k]: contraction along the columns of the source.
  void (*pack_bt)(const Rows& rows, int64_t n, int64_t k_elems, uint32_t* out);
  // B[k,n] = rows[k][n]: contraction along the rows of the source.
  void (*pack_b)(const Rows& rows, int64_t k_elems, int64_t n, uint32_t* out);
  // Both of a tile of W at once, reading it once: bt as pack_bt(rows, n, k_elems), b as pack_b(rows, n, k_elems).
  void (*pack_both)(const Rows& rows, int64_t n, int64_t k_elems, uint32_t* bt, uint32_t* b);
  // C[m,n] (+)= A B. `a` points at the slab row to start with, rows_a is the slab height of the whole buffer.
  void (*gemm)(const uint32_t* a, int64_t rows_a, const uint32_t* b, float* c, int64_t ldc, int64_t m, int64_t n,
               int64_t k2, bool accumulate);
  // One column tile [v0, v0 + cols) of the online softmax: s [rows, cols] holds raw dot products and is overwritten.
  // Writes p = exp(z - max) * softcap' (targets' columns: 0) to packed A `p`, from element p_offset on, unless null.
  // The same to the stash, from its row stash_row on, unless null.
  // Where the maximum of a row grew by more than a factor of e^8, what was accumulated with the old one is rescaled:
  // the state, the row of d [rows, ldd] unless null, elements [0, p_offset) of p, and the stash.
  void (*softmax_tile)(float* s, int64_t lds, int64_t rows, int64_t cols, int64_t v0, const Targets& targets,
                       const LogitMap& map, const SoftmaxState& state, uint32_t* p, int64_t rows_p, int64_t p_offset,
                       float* d, int64_t ldd, const Stash* stash, int64_t stash_row);
  // The same tile where the logsumexp is known: the gradient to packed A `p`. s is overwritten.
  void (*known_tile)(float* s, int64_t lds, int64_t rows, int64_t cols, int64_t v0, const Targets& targets,
                     const LogitMap& map, const RowGradient& gradient, uint32_t* p, int64_t rows_p, int64_t p_offset);
  // The transposed tile of the gradient: s [cols of the vocabulary, rows] holds raw dot products. Writes dz[v,t], times
  // the scale, to packed A; adds its row sums to dbias [cols] unless null.
  void (*gradient_tile)(const float* s, int64_t lds, int64_t cols, int64_t rows, int64_t v0, const Targets& targets,
                        const LogitMap& map, const RowGradient& gradient, uint32_t* dz, int64_t rows_dz,
                        int64_t dz_offset, float* dbias);
  // The same from a stashed unit: dz[v,t] = coefficient_t * p[t,v] for p [rows, kColPad], and the row sums unless null.
  void (*unstash)(const void* p, Type type, int64_t rows, int64_t cols, const float* coefficient, uint32_t* dz,
                  int64_t rows_dz, int64_t dz_offset, float* dbias);
  // Overwrites dz[target_t - v0, t] = value_t where the target is in [v0, v0 + cols).
  void (*set_targets)(const int64_t* target, const float* value, int64_t v0, int64_t cols, int64_t rows, uint32_t* dz,
                      int64_t rows_dz, int64_t dz_offset, float* dbias);
  void (*kl_tile)(const KlTile& tile);
  // Packed A, in place: p[r] = of_difference[r] * p[r] + of_ref[r] * p[ref_row + r].
  void (*kl_combine)(uint32_t* p, int64_t rows_p, int64_t ref_row, int64_t rows, int64_t cols,
                     const float* of_difference, const float* of_ref);
  void (*kl_gradient_tile)(const KlGradientTile& tile);
  // out[r] (in `type`, row stride in elements) = c[r] for n columns.
  void (*store_rows)(const float* c, int64_t ldc, int64_t m, int64_t n, Type type, void* out, int64_t stride);
  // out = alpha * row + sum_j beta[j] * parts[j], n columns, rounded once to `type`.
  void (*combine_row)(const float* const* parts, const float* beta, int64_t num_parts, const void* row, float alpha,
                      int64_t n, Type type, void* out);
};

// The kernels of the instruction set in use for operands of `type` (fp16 and, without bf16 dot products, bf16 are
// widened to fp32 while they are packed).
const TileKernels& tile_kernels(Type type);

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// dwords that hold k elements, padded.
inline int64_t k_dwords(const TileKernels& kernels, int64_t k) {
  return round_up(kernels.pairs ? (k + 1) / 2 : k, kKPad);
}
// Row stride of a C with n columns. Odd in cache lines: with 4096 bytes all rows of a tile would share one set of L1.
inline constexpr int64_t c_stride(int64_t n) { return (n + kColPad - 1) / kColPad * kColPad + 16; }
inline int64_t packed_a_dwords(int64_t k2, int64_t rows_a) { return (k2 + kKC - 1) / kKC * rows_a * kKS; }

}  // namespace tk
