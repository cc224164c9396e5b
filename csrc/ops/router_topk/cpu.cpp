// router_topk on the CPU: one pass over each row of logits gives weights, indices, counts and the token's score; the
// backward reads the k chosen scores only, unless the gradient is dense. Here: threads and the binding.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/registry.h"
#include "ops/router_topk/router.h"

namespace tk {

#define TK_DECLARE_KERNELS(name)               \
  namespace name {                             \
  extern const RouterForward kRouterForward;   \
  extern const RouterBackward kRouterBackward; \
  }
TK_DECLARE_KERNELS(portable)
TK_DECLARE_KERNELS(avx2)
TK_DECLARE_KERNELS(avx512)
TK_DECLARE_KERNELS(avx512bf16)
#undef TK_DECLARE_KERNELS

namespace {

struct RouterKernels {
  RouterForward forward;
  RouterBackward backward;
};

RouterKernels router_kernels() {
  switch (current_isa()) {
    case Isa::portable:
      return {portable::kRouterForward, portable::kRouterBackward};
#if TK_ISA_X86
    case Isa::avx2:
      return {avx2::kRouterForward, avx2::kRouterBackward};
    case Isa::avx512:
      return {avx512::kRouterForward, avx512::kRouterBackward};
    default:  // tiles are of no use here
      return {avx512bf16::kRouterForward, avx512bf16::kRouterBackward};
#else
    default:
      return {portable::kRouterForward, portable::kRouterBackward};
#endif
  }
}

void select_many(const int32_t* ordered, int64_t n, int64_t k, int32_t* best) {
  std::vector<int64_t> keys(n);
  for (int64_t i = 0; i < n; ++i) keys[i] = static_cast<int64_t>(ordered[i]) * (int64_t{1} << 32) + (INT32_MAX - i);
  std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<>());
  std::sort(keys.begin(), keys.begin() + k, std::greater<>());
  for (int64_t j = 0; j < k; ++j) best[j] = INT32_MAX - static_cast<int32_t>(keys[j]);
}

// The flat position of the first given expert that is none, or stands in its row already; -1 where all are right.
int64_t first_wrong(const int64_t* given, int64_t num_tokens, int64_t top_k, int64_t num_experts) {
  std::vector<int64_t> seen(num_experts, -1);  // the last row that had the expert
  for (int64_t i = 0; i < num_tokens * top_k; ++i) {
    if (given[i] < 0 || given[i] >= num_experts || seen[given[i]] == i / top_k) return i;
    seen[given[i]] = i / top_k;
  }
  return -1;
}

int useful_threads(int64_t num_tokens, int64_t num_experts, int num_threads) {
  constexpr int64_t kGrain = 32768;  // logits below which a thread costs more than it saves
  return static_cast<int>(std::clamp<int64_t>(num_tokens * num_experts / kGrain, 1, num_threads));
}

// Returns how many entries of the table are NaN or infinite, and writes nothing when there are any.
int64_t forward(const Router& p, int num_threads) {
  const int64_t bad = p.table == nullptr
                          ? 0
                          : std::count_if(p.table, p.table + p.num_experts, [](float x) { return !std::isfinite(x); });
  if (bad != 0) return bad;
  const RouterKernels kernels = router_kernels();
  const int threads = useful_threads(p.num_tokens, p.num_experts, num_threads);
  std::vector<std::vector<int64_t>> partial(threads);
  parallel(threads, [&](int thread, int of) {
    const int64_t row = row_capacity(p.num_experts);
    std::vector<float> floats(kRouterRows * 3 * row);
    std::vector<int32_t> integers(kRouterRows * 5 * row);
    std::vector<int64_t>& counts = partial[thread];
    counts.assign(p.counts == nullptr ? 0 : p.num_experts, 0);
    RouterScratch scratch{{}, counts.data(), &select_many};
    for (int r = 0; r < kRouterRows; ++r) {
      float* f = floats.data() + r * 3 * row;
      int32_t* i = integers.data() + r * 5 * row;
      scratch.rows[r] = {f, f + row, f + 2 * row, i, i + row, i + 2 * row, i + 3 * row, i + 4 * row};
    }
    kernels.forward(p, split(p.num_tokens, thread, of), scratch);
  });
  for (const std::vector<int64_t>& local : partial) {
    for (size_t e = 0; e < local.size(); ++e) p.counts[static_cast<int64_t>(e) * p.counts_stride] += local[e];
  }
  return 0;
}

// Rows that a thread makes before it writes them past the caches; 0 where the caches take the gradient, or rows do not
// fill cache lines.
int64_t rows_to_stream(const RouterGradient& p) {
  constexpr int64_t kBlockBytes = 8192, kLeastBytes = 2 << 20;  // a quarter of the first cache, the second cache
  const int64_t row_bytes = p.num_experts * (p.type == Type::f32 ? 4 : 2);
  const bool lines = row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(p.gradient) % 64 == 0;
  return lines && p.num_tokens * row_bytes >= kLeastBytes ? std::max<int64_t>(kBlockBytes / row_bytes, 1) : 0;
}

void backward(const RouterGradient& p, int num_threads) {
  const RouterKernels kernels = router_kernels();
  const int threads = useful_threads(p.num_tokens, p.num_experts, num_threads);
  const int64_t block_rows = rows_to_stream(p);
  parallel(threads, [&](int thread, int of) {
    struct alignas(64) Line {
      char bytes[64];
    };
    std::vector<float> upstream(row_capacity(p.top_k));
    std::vector<Line> block(block_rows * p.num_experts * 4 / 64);
    kernels.backward(p, split(p.num_tokens, thread, of),
                     {upstream.data(), block.empty() ? nullptr : block.data()->bytes, block_rows});
  });
}

int64_t router_topk_cpu(const RouterRule::Tuple& rule, uintptr_t logits, int logits_dtype, int64_t num_tokens,
                        int64_t num_experts, int64_t stride_t, int64_t stride_e, uintptr_t bias, uintptr_t mask,
                        int64_t mask_stride, uintptr_t table, uintptr_t given, uintptr_t weights, int weights_dtype,
                        uintptr_t indices, uintptr_t chosen, uintptr_t stats, uintptr_t counts, int64_t counts_stride,
                        uintptr_t score, int64_t score_stride, int num_threads) {
  return forward({RouterRule::of(rule),
                  reinterpret_cast<const void*>(logits),
                  static_cast<Type>(logits_dtype),
                  num_tokens,
                  num_experts,
                  stride_t,
                  stride_e,
                  reinterpret_cast<const float*>(bias),
                  reinterpret_cast<const bool*>(mask),
                  mask_stride,
                  reinterpret_cast<const float*>(table),
                  reinterpret_cast<const int64_t*>(given),
                  reinterpret_cast<void*>(weights),
                  static_cast<Type>(weights_dtype),
                  reinterpret_cast<int64_t*>(indices),
                  reinterpret_cast<float*>(chosen),
                  reinterpret_cast<float*>(stats),
                  reinterpret_cast<int64_t*>(counts),
                  counts_stride,
                  reinterpret_cast<float*>(score),
                  score_stride},
                 num_threads);
}

void router_topk_backward_cpu(const RouterRule::Tuple& rule, uintptr_t grad_weights, int grad_dtype,
                              int64_t grad_stride_t, int64_t grad_stride_k, uintptr_t logits, int dtype,
                              int64_t stride_t, int64_t stride_e, uintptr_t indices, uintptr_t chosen, uintptr_t stats,
                              int64_t num_tokens, int64_t num_experts, uintptr_t gradient, int num_threads) {
  backward({RouterRule::of(rule), reinterpret_cast<const void*>(grad_weights), static_cast<Type>(grad_dtype),
            grad_stride_t, grad_stride_k, reinterpret_cast<const void*>(logits), static_cast<Type>(dtype), stride_t,
            stride_e, reinterpret_cast<const int64_t*>(indices), reinterpret_cast<const float*>(chosen),
            reinterpret_cast<const float*>(stats), num_tokens, num_experts, reinterpret_cast<void*>(gradient)},
           num_threads);
}

int64_t router_topk_first_wrong(uintptr_t given, int64_t num_tokens, int64_t top_k, int64_t num_experts) {
  return first_wrong(reinterpret_cast<const int64_t*>(given), num_tokens, top_k, num_experts);
}

void bind(pybind11::module_& module) {
  module.def("router_topk_first_wrong", &router_topk_first_wrong);
  module.def("router_topk_cpu", &router_topk_cpu, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("router_topk_backward_cpu", &router_topk_backward_cpu,
             pybind11::call_guard<pybind11::gil_scoped_release>());
}
TK_REGISTER(bind);

}  // namespace
}  // namespace tk
