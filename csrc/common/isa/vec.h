// Vectors of the instruction set that this file is compiled for, in GCC's and clang's portable vector notation.
// Included by *.isa.cpp only. No std:: templates here: their out-of-line copies would be shared with code for other
// instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/tile_kernels.h"

namespace tk {
namespace TK_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

#define TK_INLINE inline __attribute__((always_inline))

TK_INLINE vf splat(float x) { return vf{} + x; }
TK_INLINE vu splat_bits(uint32_t x) { return vu{} + x; }
template <typename V>
TK_INLINE V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V>
TK_INLINE void store(void* p, V v) {
  memcpy(p, &v, sizeof(V));
}
// Writes whole cache lines past the caches, of which `to` begins one: for results that do not fit into them anyway,
// where an ordinary store would first read the line. Whoever hands the result to another thread needs the fence.
TK_INLINE void stream(char* to, const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += sizeof(vf)) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), load<__m512i>(from + i));
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), load<__m256i>(from + i));
#elif defined(__SSE2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), load<__m128i>(from + i));
#else
    store(to + i, load<vf>(from + i));
#endif
  }
}
TK_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
// NaN in x stays NaN: the comparison is false and x is taken.
TK_INLINE vf at_least(vf x, float low) { return splat(low) > x ? splat(low) : x; }

TK_INLINE float sum_lanes(vf v) {
#if defined(__AVX512F__)
  // In registers, in the same order as below.
  vi lane = {};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int half = kLanes / 2; half > 0; half /= 2)
    v += _mm512_maskz_permutexvar_ps(0xffff, reinterpret_cast<__m512i>(lane ^ half), v);
  return v[0];
#endif
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
TK_INLINE float max_lanes(vf v) {
  float lanes[kLanes];
  store(lanes, v);
  float best = lanes[0];
  for (int i = 1; i < kLanes; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

// fp32 <-> bf16, round to nearest even, NaN stays a (quiet) NaN.
TK_INLINE vh to_bf16(vf v) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<vh>(_mm512_cvtneps_pbh(v));
#else
  const vu bits = reinterpret_cast<vu>(v);
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector(v == v ? rounded : quiet, vh);
#endif
}
TK_INLINE vf from_bf16(vh v) { return reinterpret_cast<vf>(__builtin_convertvector(v, vu) << 16); }

TK_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, body = h & 0x7fffu;
  uint32_t bits;
  if (body >= 0x7c00u) {
    bits = sign | 0x7f800000u | ((body & 0x3ffu) << 13);
  } else if (body >= 0x400u) {
    bits = sign | ((body << 13) + (112u << 23));
  } else {
    const float tiny = static_cast<float>(body) * 0x1p-24f;
    memcpy(&bits, &tiny, 4);
    bits |= sign;
  }
  float out;
  memcpy(&out, &bits, 4);
  return out;
}
TK_INLINE uint16_t float_to_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u, body = bits & 0x7fffffffu;
  if (body > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (body >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (body < 0x38800000u) {                                               // subnormal: let the FPU round
    float magnitude;
    memcpy(&magnitude, &body, 4);
    magnitude += 0.5f;  // ulp of [0.5, 1) is 2^-24, the subnormal step of half
    uint32_t shifted;
    memcpy(&shifted, &magnitude, 4);
    return static_cast<uint16_t>(sign | (shifted - 0x3f000000u));
  }
  const uint32_t rounded = body + 0xfffu + ((body >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

TK_INLINE vf from_f16(vh v) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(v));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(v));
#else
  vf out;
  for (int i = 0; i < kLanes; ++i) out[i] = half_to_float(v[i]);
  return out;
#endif
}
TK_INLINE vh to_f16(vf v) {
#if defined(__AVX512F__)
  return reinterpret_cast<vh>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return reinterpret_cast<vh>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  vh out;
  for (int i = 0; i < kLanes; ++i) out[i] = float_to_half(v[i]);
  return out;
#endif
}

constexpr int size_of(Type type) { return type == Type::f32 ? 4 : 2; }

// kLanes numbers at element `offset` of an array of type T, as fp32.
template <Type T>
TK_INLINE vf load_as_float(const void* p, int64_t offset) {
  if constexpr (T == Type::f32) {
    return load<vf>(static_cast<const float*>(p) + offset);
  } else {
    const vh raw = load<vh>(static_cast<const uint16_t*>(p) + offset);
    return T == Type::bf16 ? from_bf16(raw) : from_f16(raw);
  }
}
template <Type T>
TK_INLINE void store_float(void* p, int64_t offset, vf v) {
  if constexpr (T == Type::f32) {
    store(static_cast<float*>(p) + offset, v);
  } else {
    store(static_cast<uint16_t*>(p) + offset, T == Type::bf16 ? to_bf16(v) : to_f16(v));
  }
}

// Rounds to nearest, for |x| < 2^22.
TK_INLINE vf to_integer(vf x) {
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  return (x + magic) - magic;
#endif
}
// v * 2^n for an integer n from -151 to 127; without AVX-512 0 where n is below -126.
TK_INLINE vf times_power_of_two(vf v, vf n) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(v, n);
#else
  const vf scale = reinterpret_cast<vf>((__builtin_convertvector(n, vi) + 127) << 23);
  return n < splat(-126.0f) ? vf{} : v * scale;
#endif
}

// exp(x), relative error below 1e-7; subnormal or 0 below -87.3, NaN stays NaN. Not meant for x > 88.
TK_INLINE vf exp_vec(vf x) {
  x = at_least(x, -104.0f);  // also keeps -inf out of the reduction below
  const vf n = to_integer(x * 1.44269504088896341f);
  vf r = x - n * 0.693145751953125f;  // ln 2 in two parts: n times the first is exact
  r = r - n * 1.42860682030941723e-6f;
  vf p = splat(1.0f / 720.0f);
  p = p * r + (1.0f / 120.0f);
  p = p * r + (1.0f / 24.0f);
  p = p * r + (1.0f / 6.0f);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return times_power_of_two(p, n);
}

// exp(x), relative error below 8e-5, for results that are rounded to bfloat16, which errs by up to 2e-3. Otherwise like
// exp_vec.
TK_INLINE vf exp_for_bf16(vf x) {
  const vf y = at_least(x * 1.44269504088896341f, -150.0f), n = to_integer(y), f = y - n;
  // The cubic closest to 2^f on [-1/2, 1/2] in relative error.
  const vf p = ((splat(0.0551716691f) * f + 0.242611122f) * f + 0.693260985f) * f + 0.999928074f;
  return times_power_of_two(p, n);
}

struct Tanh {
  vf value, slope;  // tanh(x) and 1 - tanh(x)^2, which has no cancellation where tanh(x) is close to 1
};

// Absolute error below 1e-7, relative error of the slope below 1e-6.
TK_INLINE Tanh tanh_vec(vf x) {
  const vf magnitude = reinterpret_cast<vf>(reinterpret_cast<vu>(x) & 0x7fffffffu);
  const vf e = exp_vec(magnitude * -2.0f);
  const vf inverse = 1.0f / (1.0f + e);
  const vf big = (1.0f - e) * inverse;
  const vf x2 = x * x;
  const vf small = magnitude * (1.0f + x2 * (-1.0f / 3.0f + x2 * (2.0f / 15.0f + x2 * (-17.0f / 315.0f))));
  const vf value = magnitude < splat(0.2f) ? small : big;
  return {reinterpret_cast<vf>(reinterpret_cast<vu>(value) | (reinterpret_cast<vu>(x) & 0x80000000u)),
          4.0f * e * inverse * inverse};
}

}  // namespace TK_ISA
}  // namespace tk
