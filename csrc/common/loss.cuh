// Row mathematics of the losses on the GPU: softcap, online softmax, rows cut into 16-byte vectors.
#pragma once

#include <cmath>

#include "common/cuda.cuh"

namespace tk {

// Where running maxima start: finite, so that the difference of two is never NaN.
constexpr float kLowest = -1e30f;

// From a raw logit to x = cap * tanh(scale * z / cap), or scale * z without a cap.
struct LogitMap {
  float cap, scale;
};

struct Mapped {
  float x, slope;  // slope = dx / dz / scale
};

template <bool SOFTCAP>
__device__ __forceinline__ Mapped map_logit(float z, const LogitMap& map) {
  const float x = z * map.scale;
  if constexpr (!SOFTCAP) return {x, 1.0f};
  // With r = 1 - tanh|u|, the slope 1 - tanh^2 = r (2 - r) keeps its digits where tanh nears 1.
  const float u = x / map.cap;
  const float r = 2.0f / (__expf(2.0f * fabsf(u)) + 1.0f);
  return {u < 0.0f ? (r - 1.0f) * map.cap : u >= 0.0f ? (1.0f - r) * map.cap : u, r * (2.0f - r)};
}

// Sum of e^x relative to e^maximum.
struct Softmax {
  float maximum = kLowest, sum = 0.0f;

  __device__ __forceinline__ void raise(float to) {
    if (to > maximum) {
      sum *= __expf(maximum - to);
      maximum = to;
    }
  }
  // A NaN never becomes the maximum and makes the sum NaN.
  __device__ __forceinline__ void add(float x) {
    raise(x);
    sum += __expf(x - maximum);
  }
  __device__ __forceinline__ void add(const Softmax& other) {
    raise(other.maximum);
    sum += other.sum * __expf(other.maximum - maximum);
  }
};

__device__ __forceinline__ Softmax warp_softmax(Softmax value) {
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) {
    Softmax other;
    other.maximum = __shfl_xor_sync(kAllLanes, value.maximum, bits);
    other.sum = __shfl_xor_sync(kAllLanes, value.sum, bits);
    value.add(other);
  }
  return value;
}

struct LogProb {
  float logp, lse;
};

// Of a class with x, from the sum over all others: where the class is nearly certain the loss is log(1 + small).
__device__ __forceinline__ LogProb log_prob(float x, const Softmax& others) {
  if (x > others.maximum && x < INFINITY) {
    const float loss = log1pf(others.sum * expf(others.maximum - x));
    return {-loss, x + loss};
  }
  const float log_sum = logf(others.sum + expf(x - others.maximum));
  // Maximum and logarithm apart: their sum would round away digits of the loss.
  return {(x - others.maximum) - log_sum, others.maximum + log_sum};
}

// Of a class with x, from the sum over all others, of which none is above it.
__device__ __forceinline__ float largest_logp(float x, float maximum, float others) {
  return x < INFINITY ? -log1pf(others * expf(maximum - x)) : NAN;
}

// A row of `size` elements at an address that need not be aligned to 16 bytes, seen as vectors: vector v holds the
// elements [v * N - shift, (v + 1) * N - shift). Those in [begin, end) lie in the row as a whole; before them are
// `head` elements, after them those from `tail` on, fewer than N each.
template <typename T>
struct VectorRow {
  static constexpr int N = kVector<T>;
  int shift, begin, end, head, tail;

  __device__ __forceinline__ VectorRow(const T* row, int size)
      : shift(static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % N)),
        begin(shift == 0 ? 0 : 1),
        end((size + shift) / N),
        head(begin == 0 ? 0 : min(N - shift, size)),
        tail(max(end * N - shift, head)) {}

  __device__ __forceinline__ int first(int vector) const { return vector * N - shift; }
};

// The row kernels of the linear losses: kRowThreads threads walk over a row in tiles of kTile columns, kStep neighbours
// each. Rows of float32 logits start on 16 bytes, those of dz on 4 elements.
constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kWarpSize;
constexpr int kStep = 4;
constexpr int kTile = kRowThreads * kStep;

// The logits from `column` on, 0 where there are none.
__device__ __forceinline__ void load_step(const float* row, int column, int size, float (&out)[kStep]) {
  if (column + kStep <= size) return unpack<float>(load_words(row + column), out);
#pragma unroll
  for (int i = 0; i < kStep; ++i) out[i] = column + i < size ? row[column + i] : 0.0f;
}

// The elements of dz from `column` on, as far as there are any.
template <typename T>
__device__ __forceinline__ void store_step(T* dz, int column, int size, const float (&values)[kStep]) {
  if (column + kStep <= size) {
    store_four(dz + column, values);
  } else {
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      if (column + i < size) dz[column + i] = from_float<T>(values[i]);
    }
  }
}

template <typename T>
__device__ __forceinline__ void zero_row(T* dz, int size) {
  const float zeros[kStep] = {};
  for (int column = static_cast<int>(threadIdx.x) * kStep; column < size; column += kTile) {
    store_step(dz, column, size, zeros);
  }
}

}  // namespace tk
