// What every CUDA kernel shares: launching, element types, 16-byte loads, reductions over a warp.
//
// A kernel names its shared memory by TK_SHARED and starts through launch(), so that tests/kernels/cuda/emulation.h can
// run the same source on the CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifndef TK_EMULATION
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define TK_SHARED(Type, name) __shared__ Type name

namespace tk {

// Starts `kernel` on a stream of the current device. Raises where the launch itself fails; what goes wrong while it
// runs shows at the next synchronisation.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, uintptr_t stream, Arguments... arguments) {
  kernel<<<grid, block, 0, reinterpret_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA launch failed: ") + cudaGetErrorString(error));
}

}  // namespace tk
#endif

namespace tk {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpSize = 32;

// Codes of the element types, as trace_kernels/runtime/cuda_backend.py hands them over.
enum class Element : int { f32 = 0, bf16 = 1, f16 = 2 };

// Calls function(T{}) with the type of the code.
template <typename Function>
void with_element(int element, Function&& function) {
  switch (static_cast<Element>(element)) {
    case Element::f32:
      return function(float{});
    case Element::bf16:
      return function(__nv_bfloat16{});
    case Element::f16:
      return function(__half{});
  }
  throw std::invalid_argument("unknown element type");
}

// Calls function(std::true_type or std::false_type).
template <typename Function>
void with_flag(bool flag, Function&& function) {
  flag ? function(std::true_type{}) : function(std::false_type{});
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return __float2half_rn(value);
  }
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Elements that one 16-byte load or store moves.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <typename T>
struct alignas(16) Vector {
  T elements[kVector<T>];
};

template <typename T>
__device__ __forceinline__ uint4 load_words(const T* address) {
  return *reinterpret_cast<const uint4*>(address);
}

template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* address) {
  const uint4 bits = load_words(address);
  return reinterpret_cast<const Vector<T>&>(bits);
}

// The kVector<T> floats that four words hold.
template <typename T>
__device__ __forceinline__ void unpack(const uint4& bits, float (&values)[kVector<T>]) {
  const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      values[i] = __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      values[2 * i] = __uint_as_float(words[i] << 16);
      values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    } else {
      values[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i])));
      values[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] >> 16)));
    }
  }
}

// Two rounded numbers in a word.
template <typename T>
__device__ __forceinline__ unsigned packed(float low, float high) {
#ifndef TK_EMULATION
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const unsigned&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const unsigned&>(pair);
  }
#else
  return emulation::packed(from_float<T>(low), from_float<T>(high));
#endif
}

// __stcg and not an assignment, which the compiler may cut into stores of single elements.
template <typename T>
__device__ __forceinline__ void store_vector(T* address, const float (&values)[kVector<T>]) {
  uint4 words;
  if constexpr (std::is_same_v<T, float>) {
    words = {__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
             __float_as_uint(values[3])};
  } else {
    words = {packed<T>(values[0], values[1]), packed<T>(values[2], values[3]), packed<T>(values[4], values[5]),
             packed<T>(values[6], values[7])};
  }
  __stcg(reinterpret_cast<uint4*>(address), words);
}

// Four elements: 16 bytes of float32, 8 of the other types.
template <typename T>
__device__ __forceinline__ void store_four(T* address, const float (&values)[4]) {
  if constexpr (std::is_same_v<T, float>) {
    store_vector(address, values);
  } else {
    __stcg(reinterpret_cast<uint2*>(address), uint2{packed<T>(values[0], values[1]), packed<T>(values[2], values[3])});
  }
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) value += __shfl_xor_sync(kAllLanes, value, bits);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, bits));
  return value;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What kernels count in 32 bits: columns and blocks. Leaves room for an index beyond the last.
inline int checked_int(int64_t count) {
  if (count > INT32_MAX - (1 << 16)) throw std::invalid_argument("too large for a kernel: " + std::to_string(count));
  return static_cast<int>(count);
}

// A grid of so many blocks along x.
inline dim3 blocks_of(int64_t count) { return dim3(static_cast<unsigned>(checked_int(count))); }

}  // namespace tk

// Bindings matter to the host only: the passes that compile for a GPU are faster without pybind11.
#ifndef __CUDA_ARCH__
#include "common/registry.h"
#endif
