// The gradient of router_topk on the GPU: one warp per token, the gradient's row in shared memory.
#include <cmath>

#include "common/cuda.cuh"
#include "ops/router_topk/router.cuh"

namespace tk {
namespace {

constexpr int kBackwardThreads = 128;
constexpr int kBackwardWarps = kBackwardThreads / kWarpSize;
constexpr int kTile = 1024;  // elements of a gradient's row that a warp holds in shared memory

struct RouterGradient : RouterRule {
  const void* grad_weights;
  Element grad_type;
  int64_t grad_stride_t, grad_stride_k;
  int64_t stride_t, stride_e;  // of the logits
  const int64_t* indices;      // [T, k]
  const float* chosen;         // [T, k]
  const float* stats;          // [T, 2]
  int64_t num_tokens;
  int num_experts;
  bool wide;  // rows of the gradient are whole 16-byte vectors
};

struct GradientRows {
  alignas(16) float rows[kBackwardWarps][kTile];
};

// reference.py has the formula. `logits` are null unless the gradient is dense.
template <typename T>
__global__ void __launch_bounds__(kBackwardThreads) backward_kernel(const T* logits, RouterGradient p, T* gradient) {
  TK_SHARED(GradientRows, shared);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  float* tile = shared.rows[warp];
  for (int64_t t = int64_t{blockIdx.x} * kBackwardWarps + warp; t < p.num_tokens;
       t += int64_t{gridDim.x} * kBackwardWarps) {
    const auto upstream = [&](int j) {
      return load_as(p.grad_weights, p.grad_type, t * p.grad_stride_t + j * p.grad_stride_k);
    };
    // The loops are hardly unrolled: a row has few choices, and copies of the divisions would spill.
    float sum = 0.0f, weighted = 0.0f;
#pragma unroll 1
    for (int j = lane; j < p.top_k; j += kWarpSize) {
      const float s = p.chosen[t * p.top_k + j];
      sum += s;
      weighted += s * upstream(j);
    }
    weighted = warp_sum(weighted);
    float denominator = 1.0f, mean = 0.0f, correction = 0.0f, along = p.scale * weighted;  // sum_j s_j d s_j
    if (p.renormalize) {
      denominator = warp_sum(sum) + p.eps;
      mean = weighted / denominator;
      float differences = 0.0f;
#pragma unroll 1
      for (int j = lane; j < p.top_k; j += kWarpSize) differences += p.chosen[t * p.top_k + j] * (upstream(j) - mean);
      const float of_eps = p.eps / denominator;
      correction = warp_sum(differences) / denominator - mean * of_eps;
      along = p.scale * (mean + correction) * of_eps;
    }
    for (int begin = 0; begin < p.num_experts; begin += kTile) {
      const int size = min(kTile, p.num_experts - begin);
#pragma unroll 2
      for (int e = lane; e < size; e += kWarpSize) {
        tile[e] = 0.0f;
        if (logits != nullptr) {
          const float z = to_float(logits[t * p.stride_t + (begin + e) * p.stride_e]);
          tile[e] = -(expf(z - p.stats[2 * t]) / p.stats[2 * t + 1]) * along;
        }
      }
      __syncwarp();
#pragma unroll 1
      for (int j = lane; j < p.top_k; j += kWarpSize) {
        const int64_t e = p.indices[t * p.top_k + j] - begin;
        if (e < 0 || e >= size) continue;
        const float s = p.chosen[t * p.top_k + j];
        float d_logit = s / denominator * (upstream(j) - mean - correction) * p.scale;  // of the score's logarithm
        if (p.score_function == Score::sigmoid) {
          d_logit *= 1.0f - s;
        } else if (p.score_function == Score::sqrtsoftplus) {
          const float square = s * s;  // log(1 + e^z), so d log s / dz = (1 - e^(-s^2)) / (2 s^2)
          d_logit *= square == 0.0f ? 0.5f : -expm1f(-square) / (2.0f * square);
        } else if (p.score_function == Score::softmax_topk) {
          d_logit -= s * along;
        }
        tile[e] += d_logit;
      }
      __syncwarp();
      T* out = gradient + t * p.num_experts + begin;
      if (p.wide) {
        for (int v = lane * kVector<T>; v < size; v += kWarpSize * kVector<T>) {
          float values[kVector<T>];
#pragma unroll
          for (int i = 0; i < kVector<T>; ++i) values[i] = tile[v + i];
          store_vector(out + v, values);
        }
      } else {
        for (int e = lane; e < size; e += kWarpSize) out[e] = from_float<T>(tile[e]);
      }
      __syncwarp();
    }
  }
}

[[maybe_unused]] void router_topk_backward_cuda(const RouterRule::Tuple& rule, uintptr_t grad_weights, int grad_element,
                                                int64_t grad_stride_t, int64_t grad_stride_k, uintptr_t logits,
                                                int element, int64_t stride_t, int64_t stride_e, uintptr_t indices,
                                                uintptr_t chosen, uintptr_t stats, int64_t num_tokens, int num_experts,
                                                uintptr_t gradient, int num_blocks, uintptr_t stream) {
  if (num_tokens == 0) return;
  const dim3 grid = blocks_of(std::min<int64_t>(ceil_div(num_tokens, kBackwardWarps), num_blocks));
  with_element(element, [&](auto type) {
    using T = decltype(type);
    const RouterGradient p{RouterRule::of(rule),
                           reinterpret_cast<const void*>(grad_weights),
                           static_cast<Element>(grad_element),
                           grad_stride_t,
                           grad_stride_k,
                           stride_t,
                           stride_e,
                           reinterpret_cast<const int64_t*>(indices),
                           reinterpret_cast<const float*>(chosen),
                           reinterpret_cast<const float*>(stats),
                           num_tokens,
                           num_experts,
                           num_experts % kVector<T> == 0 && gradient % sizeof(uint4) == 0};
    launch(backward_kernel<T>, grid, kBackwardThreads, stream, reinterpret_cast<const T*>(logits), p,
           reinterpret_cast<T*>(gradient));
  });
}

#ifdef TK_REGISTER
void bind(pybind11::module_& module) { module.def("router_topk_backward_cuda", &router_topk_backward_cuda); }
TK_REGISTER(bind);
#endif

}  // namespace
}  // namespace tk
