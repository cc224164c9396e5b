// cross_entropy on the CPU, from logits in memory: the forward reads them once, the backward reads and writes them
// once.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/parallel.h"
#include "common/registry.h"
#include "common/row_kernels.h"
#include "common/workspace.h"

namespace tk {
namespace {

struct Logits {
  uintptr_t data;
  int64_t stride;  // in elements
  Type type;
  int64_t bytes() const { return type == Type::f32 ? 4 : 2; }
  void* row(int64_t t) const { return reinterpret_cast<char*>(data) + t * stride * bytes(); }
};

// Threads worth waking for T rows of V columns.
int useful_threads(int64_t T, int64_t V, int num_threads) {
  constexpr int64_t kGrain = 1 << 15;  // columns
  return static_cast<int>(std::clamp<int64_t>(std::min(T, T * V / kGrain), 1, num_threads));
}

void forward_cpu(uintptr_t logits, int type, int64_t T, int64_t V, int64_t stride, uintptr_t target_at, int64_t ignore,
                 double softcap, double scale_at, uintptr_t logp_at, uintptr_t lse_at, int num_threads) {
  const RowKernels& kernels = row_kernels();
  const Logits in{logits, stride, static_cast<Type>(type)};
  const auto* target = reinterpret_cast<const int64_t*>(target_at);
  auto* logp = reinterpret_cast<float*>(logp_at);
  auto* lse = reinterpret_cast<float*>(lse_at);
  const auto scale = static_cast<float>(scale_at), cap = static_cast<float>(softcap);
  parallel(useful_threads(T, V, num_threads), [&](int thread, int of) {
    const FlushDenormals flush;
    const Range range = split(T, thread, of);
    for (int64_t t = range.begin; t < range.end; ++t) {
      logp[t] = lse[t] = 0.0f;
      if (target[t] == ignore) continue;
      const RowSum sum = kernels.log_sum(in.type, in.row(t), V, scale, cap);
      double log_sum = static_cast<double>(sum.max) + std::log(sum.sum);
      if (std::isinf(sum.max)) {
        // All -inf, or a +inf somewhere: then the sum is NaN by inf - inf, although only a NaN logit makes it one.
        bool nan = false;
        for (int64_t v = 0; v < V && !nan; ++v) nan = std::isnan(kernels.logit(in.type, in.row(t), v, scale, cap));
        log_sum = nan ? std::nan("") : static_cast<double>(sum.max);
      }
      const float z = kernels.logit(in.type, in.row(t), target[t], scale, cap);
      lse[t] = static_cast<float>(log_sum);
      logp[t] = static_cast<float>(z - log_sum);
    }
  });
}

void backward_cpu(uintptr_t logits, int type, int64_t T, int64_t V, int64_t stride, uintptr_t target_at, int64_t ignore,
                  double softcap, double scale_at, uintptr_t grad_logp, uintptr_t lse_at, uintptr_t out,
                  int64_t out_stride, int num_threads) {
  const RowKernels& kernels = row_kernels();
  const Logits in{logits, stride, static_cast<Type>(type)}, to{out, out_stride, static_cast<Type>(type)};
  const auto* target = reinterpret_cast<const int64_t*>(target_at);
  const auto* g = reinterpret_cast<const float*>(grad_logp);
  const auto* lse = reinterpret_cast<const float*>(lse_at);
  parallel(useful_threads(T, V, num_threads), [&](int thread, int of) {
    const FlushDenormals flush;
    const Range range = split(T, thread, of);
    for (int64_t t = range.begin; t < range.end; ++t) {
      if (target[t] == ignore || g[t] == 0.0f) {
        // Exact zeros, also where the logits are not finite.
        std::memset(to.row(t), 0, static_cast<size_t>(V * to.bytes()));
      } else {
        kernels.gradient(in.type, in.row(t), to.row(t), V, static_cast<float>(scale_at), static_cast<float>(softcap),
                         lse[t], g[t], target[t]);
      }
    }
  });
}

void bind(pybind11::module_& module) {
  module.def("cross_entropy_forward_cpu", &forward_cpu, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("cross_entropy_backward_cpu", &backward_cpu, pybind11::call_guard<pybind11::gil_scoped_release>());
}
TK_REGISTER(bind);

}  // namespace
}  // namespace tk
