// cross_entropy on the CPU, from logits in memory: the forward reads them once, the backward reads and writes them
// once.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

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
      const RowSum sum = kernels.log_sum(in.type, in.row(t), V, scale, cap, target[t]);
      double others = static_cast<double>(sum.max) + std::log(sum.sum);
      if (std::isinf(sum.max)) {
        // All -inf, or a +inf somewhere: then the sum is NaN by inf - inf, although only a NaN logit makes it one.
        bool nan = false;
        for (int64_t v = 0; v < V && !nan; ++v) nan = std::isnan(kernels.logit(in.type, in.row(t), v, scale, cap));
        others = nan ? std::nan("") : static_cast<double>(sum.max);
      }
      const double z = kernels.logit(in.type, in.row(t), target[t], scale, cap);
      // log(1 + e^x): where the target is nearly certain, what it leaves to the others is all that counts.
      const double x = others - z, loss = std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x)));
      logp[t] = z == std::numeric_limits<double>::infinity() ? std::nanf("") : static_cast<float>(0.0 - loss);
      lse[t] = static_cast<float>(x < 0 ? z + loss : others + std::log1p(std::exp(-std::abs(x))));
    }
  });
}

void backward_cpu(uintptr_t logits, int type, int64_t T, int64_t V, int64_t stride, uintptr_t target_at, int64_t ignore,
                  double softcap, double scale_at, uintptr_t lse_at, uintptr_t constant_at, uintptr_t uniform_at,
                  uintptr_t at_target_at, uintptr_t out, int64_t out_stride, int num_threads) {
  const RowKernels& kernels = row_kernels();
  const Logits in{logits, stride, static_cast<Type>(type)}, to{out, out_stride, static_cast<Type>(type)};
  const auto* target = reinterpret_cast<const int64_t*>(target_at);
  const auto* lse = reinterpret_cast<const float*>(lse_at);
  const auto* constant = reinterpret_cast<const float*>(constant_at);
  const auto* uniform = reinterpret_cast<const float*>(uniform_at);  // null: 0
  const auto* at_target = reinterpret_cast<const float*>(at_target_at);
  parallel(useful_threads(T, V, num_threads), [&](int thread, int of) {
    const FlushDenormals flush;
    const Range range = split(T, thread, of);
    for (int64_t t = range.begin; t < range.end; ++t) {
      const LogitGradient gradient{constant[t], uniform == nullptr ? 0.0f : uniform[t], at_target[t]};
      if (target[t] == ignore ||
          (gradient.constant == 0.0f && gradient.uniform == 0.0f && gradient.at_target == 0.0f)) {
        // Exact zeros, also where the logits are not finite.
        std::memset(to.row(t), 0, static_cast<size_t>(V * to.bytes()));
      } else {
        kernels.gradient(in.type, in.row(t), to.row(t), V, static_cast<float>(scale_at), static_cast<float>(softcap),
                         lse[t], gradient, target[t]);
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
