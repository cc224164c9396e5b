// linear_kl on the CPU: KL(ref || policy) and its gradient, streaming past both heads.
//
//   kl_t = sum_v q_v (z^ref_v - z_v) + lse_t - lse^ref_t,  d kl_t / d h_t = scale * sum_v (p_v - q_v) slope_v W[v]
//
// The difference of p and q must be taken before it is rounded, and needs two normalisers that are known at the end of
// a pass only. Either two sums are accumulated (four_products.cpp), or p and q wait in scratch memory
// (three_products.cpp). See linear_cross_entropy for the scheme, and for what is measured.
#include <algorithm>
#include <cstdint>

#include "common/parallel.h"
#include "common/registry.h"
#include "ops/linear_kl/problem.h"

namespace tk::linear_kl {
namespace {

// Three products save one, and pack the policy's head once more than there are blocks of rows, which scratch memory
// makes small. Both costs are in rows of one product.
void forward(const Problem& p, const Outputs& out, int threads) {
  const bool gradient = out.dhidden != nullptr;
  const Plan four = four_products_plan(p, gradient, threads), three = three_products_plan(p, threads);
  if (gradient && four.groups == 1 && three.block_rows > 0) {
    const auto blocks = [&](const Plan& plan) { return (p.num_rows + plan.block_rows - 1) / plan.block_rows; };
    const int64_t heads = p.one_head() ? 1 : 2;
    const int64_t more_packings = heads * blocks(three) + 1 - heads * blocks(four);
    if (more_packings * tile_kernels(p.policy.weight.type).pack_rows < p.num_rows) {
      forward_three_products(p, out, three);
      return;
    }
  }
  forward_four_products(p, out, four);
}

Side side_of(uintptr_t hidden, uintptr_t weight, int type, int64_t width, int64_t hidden_stride, int64_t weight_stride,
             uintptr_t index) {
  const auto storage = static_cast<Type>(type);
  return {{reinterpret_cast<const void*>(hidden), storage, hidden_stride, reinterpret_cast<const int64_t*>(index)},
          {reinterpret_cast<const void*>(weight), storage, weight_stride, nullptr},
          width};
}

Problem problem_of(uintptr_t hidden, uintptr_t weight, int type, int64_t width, int64_t hidden_stride,
                   int64_t weight_stride, uintptr_t ref_hidden, uintptr_t ref_weight, int ref_type, int64_t ref_width,
                   int64_t ref_hidden_stride, int64_t ref_weight_stride, uintptr_t index, int64_t num_rows, int64_t V,
                   double softcap, double scale) {
  return {side_of(hidden, weight, type, width, hidden_stride, weight_stride, index),
          side_of(ref_hidden, ref_weight, ref_type, ref_width, ref_hidden_stride, ref_weight_stride, index),
          num_rows,
          V,
          {nullptr, static_cast<float>(scale), static_cast<float>(softcap)}};
}

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind(pybind11::module_& module) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  pybind11::class_<Problem>(module, "DivergenceProblem").def(pybind11::init(&problem_of));
  module.def(
      "linear_kl_forward_cpu",
      [](const Problem& p, uintptr_t kl, uintptr_t lse, uintptr_t ref_lse, uintptr_t logp, uintptr_t ref_logp,
         uintptr_t pivot, uintptr_t lse_low, uintptr_t ref_lse_low, uintptr_t dhidden, int num_threads) {
        const Outputs out{at<float>(kl),      at<float>(lse),         at<float>(ref_lse),
                          at<int64_t>(pivot), at<float>(logp),        at<float>(ref_logp),
                          at<float>(lse_low), at<float>(ref_lse_low), at<void>(dhidden)};
        forward(p, out, std::clamp(num_threads, 1, kMaxParts));
      },
      release());
  module.def(
      "linear_kl_backward_weight_cpu",
      [](const Problem& p, uintptr_t lse, uintptr_t ref_lse, uintptr_t lse_low, uintptr_t ref_lse_low, uintptr_t pivot,
         uintptr_t difference, uintptr_t row_grad, uintptr_t dweight, int num_threads) {
        const Known known{{at<float>(lse), at<float>(lse_low)},
                          {at<float>(ref_lse), at<float>(ref_lse_low)},
                          at<int64_t>(pivot),
                          at<float>(difference),
                          at<float>(row_grad)};
        weight_gradient(p, known, at<void>(dweight), num_threads);
      },
      release());
}
TK_REGISTER(bind);

}  // namespace
}  // namespace tk::linear_kl
