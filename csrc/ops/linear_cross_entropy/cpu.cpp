// linear_cross_entropy and linear_log_prob on the CPU: log-probabilities and the gradient of the hidden states in one
// streaming pass over the weight. It is flash attention with keys = values = W: logits exist as one cache tile only.
//
//   z_t = softcap(scale * (W h_t + b)),  logp_t = z_t[target_t] - lse_t
//   d logp_t / d h_t = scale * ((1 - p_target) slope_target W[target] - sum_{v != target} p_v slope_v W[v])
//
// The target's column is left out of the streamed sums and added at the end, in fp32, so a confident token loses
// nothing to cancellation or to the rounding of p.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "common/registry.h"
#include "common/streaming.h"
#include "common/tile_kernels.h"
#include "common/workspace.h"
#include "ops/linear_cross_entropy/problem.h"

namespace tk::linear_cross_entropy {
namespace {

struct Outputs {
  float *logp, *lse;  // [T]
  void* dhidden;      // [T, H] contiguous in hidden's type, or null
  // What the head's gradient needs, per row that counts; null without one.
  float *lse_high = nullptr, *lse_low = nullptr;
  const float* g = nullptr;
};

// Room for p of the first rows until the normalisers are known, and what they turn out to be: see WeightGradient.
struct Stashed {
  int64_t num_rows = 0;
  Stash place{};
  float *coefficient = nullptr, *target_value = nullptr;
};

class Forward {
 public:
  Forward(const Problem& p, const Outputs& out, const Plan& plan, const Stashed& stashed)
      : p_(p), out_(out), plan_(plan), stashed_(stashed), kernels_(tile_kernels(p.weight.type)) {
    const bool gradient = out_.dhidden != nullptr;
    h2_ = k_dwords(kernels_, p_.H);
    ldd_ = c_stride(p_.H);
    const int64_t rows = plan_.block_rows;
    cols_ = plan_.tile_cols;
    c2_ = k_dwords(kernels_, cols_);
    for (int g = 0; g < plan_.groups; ++g) {
      groups_.push_back(
          {memory_.add<uint32_t>(packed_a_dwords(h2_, rows)), memory_.add<float>(rows), memory_.add<float>(rows)});
      for (int m = 0; m < plan_.members; ++m) {
        threads_.push_back({memory_.add<uint32_t>(h2_ * cols_), memory_.add<uint32_t>(gradient ? c2_ * ldd_ : 0),
                            memory_.add<float>(plan_.tile_rows * kScoreStride),
                            memory_.add<uint32_t>(gradient ? packed_a_dwords(c2_, plan_.tile_rows) : 0),
                            memory_.add<float>(gradient ? rows * ldd_ : 0), memory_.add<float>(rows),
                            memory_.add<float>(rows)});
      }
    }
    memory_.allocate();
    barriers_ = std::vector<Barrier>(plan_.groups);
  }

  int num_threads() const { return plan_.members * plan_.groups; }
  // The threads that shared the columns in the last run.
  int parts() const { return parts_; }

  void run(int thread, int num_threads) {
    // The runtime may have granted fewer threads than planned: then one group of them does everything.
    const bool as_planned = num_threads == this->num_threads();
    const int members = as_planned ? plan_.members : std::min(num_threads, plan_.members);
    const int groups = as_planned ? plan_.groups : 1;
    const int group = thread / members, member = thread % members;
    if (group >= groups) return;
    if (thread == 0) parts_ = members;
    const FlushDenormals flush;
    for (int64_t r0 = group * plan_.block_rows; r0 < p_.num_rows; r0 += groups * plan_.block_rows)
      block(r0, std::min(plan_.block_rows, p_.num_rows - r0), group, member, members);
  }

 private:
  struct GroupMemory {
    int64_t a, target_logit, target_slope;
  };
  struct ThreadMemory {
    int64_t bt, b, s, p, d, max, sum;
  };

  const ThreadMemory& memory_of(int group, int member) const { return threads_[group * plan_.members + member]; }

  void block(int64_t r0, int64_t rows, int group, int member, int members) {
    const GroupMemory& shared = groups_[group];
    const ThreadMemory& mine = memory_of(group, member);
    const int64_t block_rows = plan_.block_rows;
    auto* a = memory_.at<uint32_t>(shared.a);
    Barrier& barrier = barriers_[group];

    pack_share(kernels_, p_.hidden, r0, rows, p_.H, block_rows, a, member, members);
    auto* max = memory_.at<float>(mine.max);
    auto* sum = memory_.at<float>(mine.sum);
    std::fill(max, max + rows, -std::numeric_limits<float>::infinity());
    std::fill(sum, sum + rows, 0.0f);
    if (member == 0) {  // what a target that is no class keeps: a probability of 0
      auto* logit = memory_.at<float>(shared.target_logit);
      std::fill(logit, logit + rows, -std::numeric_limits<float>::infinity());
      auto* slope = memory_.at<float>(shared.target_slope);
      std::fill(slope, slope + rows, 0.0f);
    }
    barrier.wait(members);

    const Range range = member_columns(p_.V, member, members);
    for (int64_t v0 = range.begin; v0 < range.end; v0 += cols_)
      tile(r0, rows, v0, std::min(cols_, range.end - v0), range.begin, shared, mine);
    barrier.wait(members);

    const Range merged = split(rows, member, members);
    for (int64_t r = merged.begin; r < merged.end; ++r) merge(r0, r, group, members);
    barrier.wait(members);
  }

  void tile(int64_t r0, int64_t rows, int64_t v0, int64_t cols, int64_t begin, const GroupMemory& shared,
            const ThreadMemory& mine) {
    const bool gradient = out_.dhidden != nullptr, first = v0 == begin;
    Stash place = stashed_.place;
    place.begin = begin;
    const Stash* stash = r0 < stashed_.num_rows ? &place : nullptr;  // a block is stashed as a whole
    const int64_t block_rows = plan_.block_rows;
    const auto* a = memory_.at<uint32_t>(shared.a);
    auto* bt = memory_.at<uint32_t>(mine.bt);
    auto* b = memory_.at<uint32_t>(mine.b);
    auto* s = memory_.at<float>(mine.s);
    auto* packed_p = gradient ? memory_.at<uint32_t>(mine.p) : nullptr;
    auto* d = gradient ? memory_.at<float>(mine.d) : nullptr;
    const Rows weight = rows_from(p_.weight, v0);
    if (gradient) {
      kernels_.pack_both(weight, cols, p_.H, bt, b);
    } else {
      kernels_.pack_bt(weight, cols, p_.H, bt);
    }
    for (int64_t t0 = 0; t0 < rows; t0 += plan_.tile_rows) {
      const int64_t n = std::min(plan_.tile_rows, rows - t0);
      const SoftmaxState state{memory_.at<float>(mine.max) + t0, memory_.at<float>(mine.sum) + t0,
                               memory_.at<float>(shared.target_logit) + t0,
                               memory_.at<float>(shared.target_slope) + t0};
      // The first tile finds no gradient to rescale.
      float* accumulated = first || !gradient ? nullptr : d + t0 * ldd_;
      for (int64_t c0 = 0; c0 < cols; c0 += kScoreCols) {
        const int64_t width = std::min(kScoreCols, cols - c0);
        kernels_.gemm(a + t0 * kKS, block_rows, bt + c0 * h2_, s, kScoreStride, n, width, h2_, false);
        kernels_.softmax_tile(s, kScoreStride, n, width, v0 + c0, p_.target + r0 + t0, p_.map, state, packed_p,
                              plan_.tile_rows, c0, accumulated, ldd_, stash, r0 + t0);
      }
      if (gradient)
        kernels_.gemm(packed_p, plan_.tile_rows, b, d + t0 * ldd_, ldd_, n, p_.H, k_dwords(kernels_, cols), !first);
    }
  }

  // Row r of the block from the parts of the threads; the state is in double here.
  void merge(int64_t r0, int64_t r, int group, int members) {
    const GroupMemory& shared = groups_[group];
    const double logit = memory_.at<float>(shared.target_logit)[r];
    double top = logit;
    for (int m = 0; m < members; ++m) top = std::max(top, double{memory_.at<float>(memory_of(group, m).max)[r]});
    double others = 0.0;
    const float* parts[kMaxParts];
    double factors[kMaxParts];
    float beta[kMaxParts];
    int used = 0;
    for (int m = 0; m < members; ++m) {
      const Range range = member_columns(p_.V, m, members);
      if (range.begin >= range.end) continue;
      const ThreadMemory& part = memory_of(group, m);
      const double part_max = memory_.at<float>(part.max)[r], part_sum = memory_.at<float>(part.sum)[r];
      // A part without a maximum is empty (sum 0) or holds NaN only (sum NaN, which must get through).
      const double factor = std::isinf(part_max) && part_max < 0 ? 0.0 : std::exp(part_max - top);
      others += part_sum * factor;
      factors[used] = factor;
      parts[used++] = memory_.at<float>(part.d) + r * ldd_;
    }
    const double own = std::exp(logit - top), total = own + others;
    const int64_t at = p_.hidden.index ? p_.hidden.index[r0 + r] : r0 + r;
    const double lse = top + std::log(total);
    out_.lse[at] = static_cast<float>(lse);
    out_.logp[at] = static_cast<float>(own > 0 ? -std::log1p(others / own) : logit - lse);
    const double scale = p_.map.scale;
    const double target_slope = scale * others / total * memory_.at<float>(shared.target_slope)[r];
    if (out_.g != nullptr) {
      const int64_t row = r0 + r;
      const double g = out_.g[row];
      out_.lse_high[row] = out_.lse[at];
      out_.lse_low[row] = static_cast<float>(lse - out_.lse[at]);
      if (row < stashed_.num_rows) {
        stashed_.target_value[row] = static_cast<float>(g * target_slope);
        for (int i = 0; i < used; ++i)
          stashed_.coefficient[i * stashed_.num_rows + row] = static_cast<float>(-g * scale * factors[i] / total);
      }
    }
    if (out_.dhidden == nullptr) return;
    for (int i = 0; i < used; ++i) beta[i] = static_cast<float>(-scale * factors[i] / total);
    const auto alpha = static_cast<float>(target_slope);
    const int64_t bytes = bytes_of(p_.weight.type);
    const int64_t target = p_.target[r0 + r], column = target >= 0 && target < p_.V ? target : 0;
    const char* row = static_cast<const char*>(p_.weight.data) + column * p_.weight.stride * bytes;
    kernels_.combine_row(parts, beta, used, row, alpha, p_.H, p_.weight.type,
                         static_cast<char*>(out_.dhidden) + at * p_.H * bytes);
  }

 public:
  static constexpr int kMaxParts = 256;

 private:
  const Problem& p_;
  const Outputs& out_;
  const Plan& plan_;
  const Stashed& stashed_;
  const TileKernels& kernels_;
  int parts_ = 1;
  int64_t h2_, ldd_, cols_, c2_;
  std::vector<GroupMemory> groups_;
  std::vector<ThreadMemory> threads_;
  Workspace memory_;
  std::vector<Barrier> barriers_;
};

Plan plan_of(const Problem& p, bool gradient, int threads) {
  const int64_t h2 = k_dwords(tile_kernels(p.weight.type), p.H);
  return make_plan(p.num_rows, p.V, gradient ? round_up(p.H, kColPad) * 4 : 0, h2 * (gradient ? 8 : 4), threads);
}

// Rows whose p fits into the memory of the head's gradient, which has room for H numbers of the same type per column:
// whole blocks of them, which are made smaller where that helps.
int64_t stashable_rows(const Problem& p, Plan* plan) {
  if (p.weight.type == Type::f16) return 0;  // could not hold a p of e^-17
  if (p.num_rows <= p.H) return p.num_rows;
  if (p.H >= kScoreCols) plan->block_rows = std::min(plan->block_rows, p.H / kRowPad * kRowPad);
  return p.H / plan->block_rows * plan->block_rows;
}

Problem problem_of(uintptr_t hidden, uintptr_t weight, int type, int64_t num_rows, int64_t H, int64_t V,
                   int64_t hidden_stride, int64_t weight_stride, uintptr_t index, uintptr_t bias, uintptr_t target,
                   double softcap, double scale) {
  const auto storage = static_cast<Type>(type);
  return {{reinterpret_cast<const void*>(hidden), storage, hidden_stride, reinterpret_cast<const int64_t*>(index)},
          {reinterpret_cast<const void*>(weight), storage, weight_stride, nullptr},
          num_rows,
          H,
          V,
          reinterpret_cast<const int64_t*>(target),
          {reinterpret_cast<const float*>(bias), static_cast<float>(scale), static_cast<float>(softcap)}};
}

void forward_cpu(uintptr_t hidden, uintptr_t weight, int type, int64_t num_rows, int64_t H, int64_t V,
                 int64_t hidden_stride, int64_t weight_stride, uintptr_t index, uintptr_t bias, uintptr_t target,
                 double softcap, double scale, uintptr_t logp, uintptr_t lse, uintptr_t dhidden, uintptr_t row_grad,
                 uintptr_t dweight, uintptr_t dbias, int num_threads) {
  if (num_rows == 0) return;
  const Problem p = problem_of(hidden, weight, type, num_rows, H, V, hidden_stride, weight_stride, index, bias, target,
                               softcap, scale);
  num_threads = std::clamp(num_threads, 1, Forward::kMaxParts);
  Outputs out{reinterpret_cast<float*>(logp), reinterpret_cast<float*>(lse), reinterpret_cast<void*>(dhidden)};
  Plan plan = plan_of(p, dhidden != 0, num_threads);
  Stashed stashed;
  if (dweight == 0) {
    Forward forward(p, out, plan, stashed);
    parallel(forward.num_threads(), [&](int thread, int of) { forward.run(thread, of); });
    return;
  }
  WeightGradient gradient;
  std::vector<float> sums(2 * num_rows), values, tail;
  out.lse_high = sums.data();
  out.lse_low = out.lse_high + num_rows;
  out.g = reinterpret_cast<const float*>(row_grad);
  if (const int64_t most = stashable_rows(p, &plan); most > 0) {
    values.resize((num_threads + 1) * most);
    tail.resize(most * kColPad);
    stashed = {most,
               {reinterpret_cast<void*>(dweight), p.weight.type, kColPad * H, tail.data(), V / kColPad * kColPad, 0},
               values.data() + most,
               values.data()};
  }
  {
    Forward forward(p, out, plan, stashed);
    parallel(forward.num_threads(), [&](int thread, int of) { forward.run(thread, of); });
    gradient.parts = forward.parts();
  }
  gradient.lse = {out.lse_high, out.lse_low};
  gradient.g = out.g;
  gradient.dweight = reinterpret_cast<void*>(dweight);
  gradient.dbias = reinterpret_cast<float*>(dbias);
  gradient.num_stashed = stashed.num_rows;
  gradient.stash = stashed.place;
  gradient.coefficient = stashed.coefficient;
  gradient.target_value = stashed.target_value;
  weight_gradient(p, gradient, num_threads);
}

void backward_weight_cpu(uintptr_t hidden, uintptr_t weight, int type, int64_t num_rows, int64_t H, int64_t V,
                         int64_t hidden_stride, int64_t weight_stride, uintptr_t index, uintptr_t bias,
                         uintptr_t target, double softcap, double scale, uintptr_t lse, uintptr_t row_grad,
                         uintptr_t dweight, uintptr_t dbias, int num_threads) {
  const Problem p = problem_of(hidden, weight, type, num_rows, H, V, hidden_stride, weight_stride, index, bias, target,
                               softcap, scale);
  const std::vector<float> low(num_rows, 0.0f);
  WeightGradient gradient;
  gradient.lse = {reinterpret_cast<const float*>(lse), low.data()};
  gradient.g = reinterpret_cast<const float*>(row_grad);
  gradient.dweight = reinterpret_cast<void*>(dweight);
  gradient.dbias = reinterpret_cast<float*>(dbias);
  weight_gradient(p, gradient, num_threads);
}

void bind(pybind11::module_& module) {
  module.def("linear_cross_entropy_forward_cpu", &forward_cpu, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("linear_cross_entropy_backward_weight_cpu", &backward_weight_cpu,
             pybind11::call_guard<pybind11::gil_scoped_release>());
}
TK_REGISTER(bind);

}  // namespace
}  // namespace tk::linear_cross_entropy
