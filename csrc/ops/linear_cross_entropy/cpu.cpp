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
  float *logp, *lse;  // [T, K], [T]
  // [T, H] contiguous in hidden's type, or null: d logp / d h; or, with `exclude`, what the columns other than the
  // targets add to d lse / d h.
  void* dhidden;
  bool exclude;
  float* slope;  // [T, K] dz / d (W h) at the targets, or null
  // [T], with the entropy only: it, the largest class, the first of several, and its log-probability.
  float *entropy, *top_logp;
  int64_t* top;
  // What the head's gradient needs, per row that counts; null without one.
  float *lse_high = nullptr, *lse_low = nullptr, *target_dz = nullptr;
  const float* g = nullptr;
};

// A class that stays out of a row's sum: its logit, and exp of it relative to the row's largest.
struct Single {
  int64_t column;
  double z, term;
};

// Room for p of the first rows until the normalisers are known, and what they turn out to be: see WeightGradient.
struct Stashed {
  int64_t num_rows = 0;
  Stash place{};
  float *coefficient = nullptr, *target_value = nullptr;
};

class Forward final : public BlockPass {
 public:
  // known: the gradient whose product with the head is wanted, where the logsumexp is known; or null.
  Forward(const Problem& p, const Outputs& out, const Plan& plan, const Stashed& stashed, const RowGradient* known)
      : BlockPass(p.num_rows, plan),
        p_(p),
        out_(out),
        stashed_(stashed),
        known_(known),
        K_(p.targets.count),
        kernels_(tile_kernels(p.weight.type)) {
    const bool gradient = out_.dhidden != nullptr;
    h2_ = k_dwords(kernels_, p_.H);
    ldd_ = c_stride(p_.H);
    const int64_t rows = plan_.block_rows;
    cols_ = plan_.tile_cols;
    c2_ = k_dwords(kernels_, cols_);
    for (int g = 0; g < plan_.groups; ++g) {
      groups_.push_back({memory_.add<uint32_t>(packed_a_dwords(h2_, rows)), memory_.add<float>(rows * K_),
                         memory_.add<float>(rows * K_)});
      for (int m = 0; m < plan_.members; ++m) {
        threads_.push_back({memory_.add<uint32_t>(h2_ * cols_), memory_.add<uint32_t>(gradient ? c2_ * ldd_ : 0),
                            memory_.add<float>(plan_.tile_rows * kScoreStride),
                            memory_.add<uint32_t>(gradient ? packed_a_dwords(c2_, plan_.tile_rows) : 0),
                            memory_.add<float>(gradient ? rows * ldd_ : 0), memory_.add<float>(rows),
                            memory_.add<float>(rows), memory_.add<float>(entropy() ? rows : 0),
                            memory_.add<float>(entropy() ? rows : 0), memory_.add<int64_t>(entropy() ? rows : 0)});
      }
    }
    memory_.allocate();
  }

 private:
  struct GroupMemory {
    int64_t a, target_logit, target_slope;
  };
  struct ThreadMemory {
    int64_t bt, b, s, p, d, max, sum, pivot, gap, top;
  };

  const ThreadMemory& memory_of(int group, int member) const { return threads_[group * plan_.members + member]; }
  bool entropy() const { return out_.entropy != nullptr; }
  SoftmaxState state_of(const GroupMemory& shared, const ThreadMemory& mine) const {
    return {memory_.at<float>(mine.max),
            memory_.at<float>(mine.sum),
            memory_.at<float>(shared.target_logit),
            memory_.at<float>(shared.target_slope),
            entropy() ? memory_.at<float>(mine.pivot) : nullptr,
            entropy() ? memory_.at<int64_t>(mine.top) : nullptr,
            entropy() ? memory_.at<float>(mine.gap) : nullptr};
  }

  void block(int64_t r0, int64_t rows, int group, int member, int members) override {
    const GroupMemory& shared = groups_[group];
    const ThreadMemory& mine = memory_of(group, member);
    const int64_t block_rows = plan_.block_rows;
    auto* a = memory_.at<uint32_t>(shared.a);
    Barrier& barrier = barriers_[group];

    pack_share(kernels_, p_.hidden, r0, rows, p_.H, block_rows, a, member, members);
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    const SoftmaxState state = state_of(shared, mine);
    std::fill_n(state.max, rows, kNone);
    std::fill_n(state.sum, rows, 0.0f);
    if (entropy()) {
      std::fill_n(state.pivot, rows, kNone);
      std::fill_n(state.gap, rows, 0.0f);
    }
    if (member == 0) {  // what a target that is no class keeps: a probability of 0
      std::fill_n(state.target_logit, rows * K_, kNone);
      std::fill_n(state.target_slope, rows * K_, 0.0f);
    }
    barrier.wait(members);

    const Range range = member_columns(p_.V, member, members);
    for (int64_t v0 = range.begin; v0 < range.end; v0 += cols_)
      tile(r0, rows, v0, std::min(cols_, range.end - v0), range.begin, shared, mine);
    barrier.wait(members);

    const Range merged = split(rows, member, members);
    for (int64_t r = merged.begin; r < merged.end; ++r)
      known_ == nullptr ? merge(r0, r, group, members) : add(r0, r, group, members);
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
      const SoftmaxState state = state_of(shared, mine).from(t0, K_);
      const Targets targets = p_.targets.from(r0 + t0);
      // The first tile finds no gradient to rescale.
      float* accumulated = first || !gradient ? nullptr : d + t0 * ldd_;
      for (int64_t c0 = 0; c0 < cols; c0 += kScoreCols) {
        const int64_t width = std::min(kScoreCols, cols - c0);
        kernels_.gemm(a + t0 * kKS, block_rows, bt + c0 * h2_, s, kScoreStride, n, width, h2_, false);
        if (known_ != nullptr) {
          kernels_.known_tile(s, kScoreStride, n, width, v0 + c0, targets, p_.map, known_->from(r0 + t0, K_), packed_p,
                              plan_.tile_rows, c0);
        } else {
          kernels_.softmax_tile(s, kScoreStride, n, width, v0 + c0, targets, p_.map, state, packed_p, plan_.tile_rows,
                                c0, accumulated, ldd_, stash, r0 + t0);
        }
      }
      if (gradient)
        kernels_.gemm(packed_p, plan_.tile_rows, b, d + t0 * ldd_, ldd_, n, p_.H, k_dwords(kernels_, cols), !first);
    }
  }

  // Row r of the block from the parts of the threads; the state is in double here.
  void merge(int64_t r0, int64_t r, int group, int members) {
    constexpr double kNone = -std::numeric_limits<double>::infinity();
    const GroupMemory& shared = groups_[group];
    const float* logit = memory_.at<float>(shared.target_logit) + r * K_;
    const float* slope = memory_.at<float>(shared.target_slope) + r * K_;
    const int64_t* classes = p_.targets.classes + (r0 + r) * K_;
    double largest = kNone, pivot = kNone;
    int64_t pivot_class = -1;
    for (int64_t k = 0; k < K_; ++k) largest = std::max(largest, double{logit[k]});
    for (int m = 0; m < members; ++m) {
      const ThreadMemory& part = memory_of(group, m);
      largest = std::max(largest, double{memory_.at<float>(part.max)[r]});
      if (entropy() && memory_.at<float>(part.pivot)[r] > pivot) {
        pivot = memory_.at<float>(part.pivot)[r];
        pivot_class = memory_.at<int64_t>(part.top)[r];
      }
    }
    // Of the columns other than the targets and the pivot, relative to `largest`.
    double others = 0.0, gap = 0.0;
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
      const double factor = std::isinf(part_max) && part_max < 0 ? 0.0 : std::exp(part_max - largest);
      others += part_sum * factor;
      if (entropy() && factor > 0) {
        gap += factor * (memory_.at<float>(part.gap)[r] + part_sum * (part_max - largest));
        const double own = memory_.at<float>(part.pivot)[r];
        if (memory_.at<int64_t>(part.top)[r] != pivot_class && own > kNone) {
          others += std::exp(own - largest);
          gap += std::exp(own - largest) * (own - largest);
        }
      }
      factors[used] = factor;
      parts[used++] = memory_.at<float>(part.d) + r * ldd_;
    }
    // The classes that are known one by one: targets, each once, and the pivot.
    thread_local std::vector<Single> singles;
    singles.clear();
    for (int64_t k = 0; k < K_; ++k)
      if (std::find(classes, classes + k, classes[k]) == classes + k)
        singles.push_back({classes[k], logit[k], std::exp(logit[k] - largest)});
    if (pivot_class >= 0) singles.push_back({pivot_class, pivot, std::exp(pivot - largest)});
    const auto all_but = [&](int64_t excluded) {
      double sum = others;
      for (const Single& single : singles)
        if (single.column != excluded) sum += single.term;
      return sum;
    };
    const double total = all_but(-1), lse = largest + std::log(total);
    const auto log_prob = [&](int64_t column, double z, double term) {
      return term > 0 ? -std::log1p(all_but(column) / term) : z - lse;
    };
    const int64_t row = r0 + r, at = p_.hidden.index ? p_.hidden.index[row] : row;
    out_.lse[at] = static_cast<float>(lse);
    for (int64_t k = 0; k < K_; ++k) {
      out_.logp[at * K_ + k] = static_cast<float>(log_prob(classes[k], logit[k], std::exp(logit[k] - largest)));
      if (out_.slope != nullptr) out_.slope[at * K_ + k] = p_.map.scale * slope[k];
    }
    if (entropy()) {
      double sum = -(gap + others * (largest - lse)) / total;
      const Single* top = nullptr;
      for (const Single& single : singles) {
        if (single.term > 0) sum -= single.term / total * log_prob(single.column, single.z, single.term);
        if (single.column < 0 || single.column >= p_.V) continue;
        if (top == nullptr || single.z > top->z || (single.z == top->z && single.column < top->column)) top = &single;
      }
      out_.entropy[at] = static_cast<float>(sum);
      out_.top[at] = top == nullptr ? 0 : top->column;
      out_.top_logp[at] = top == nullptr ? std::nanf("") : static_cast<float>(log_prob(top->column, top->z, top->term));
    }
    const double scale = p_.map.scale;
    const double target_slope = scale * others / total * slope[0];  // of the only target, unless excluded
    if (out_.g != nullptr) {
      const double g = out_.g[row];
      out_.lse_high[row] = out_.lse[at];
      out_.lse_low[row] = static_cast<float>(lse - out_.lse[at]);
      out_.target_dz[row] = static_cast<float>(g * others / total);
      if (row < stashed_.num_rows) {
        stashed_.target_value[row] = static_cast<float>(g * target_slope);
        for (int i = 0; i < used; ++i)
          stashed_.coefficient[i * stashed_.num_rows + row] = static_cast<float>(-g * scale * factors[i] / total);
      }
    }
    if (out_.dhidden == nullptr) return;
    const double sign = out_.exclude ? scale : -scale;
    for (int i = 0; i < used; ++i) beta[i] = static_cast<float>(sign * factors[i] / total);
    const int64_t bytes = bytes_of(p_.weight.type), column = classes[0] >= 0 && classes[0] < p_.V ? classes[0] : 0;
    const char* target_row = static_cast<const char*>(p_.weight.data) + column * p_.weight.stride * bytes;
    kernels_.combine_row(parts, beta, used, out_.exclude ? nullptr : target_row, static_cast<float>(target_slope), p_.H,
                         p_.weight.type, static_cast<char*>(out_.dhidden) + at * p_.H * bytes);
  }

  // Row r of the product of a known gradient.
  void add(int64_t r0, int64_t r, int group, int members) {
    const float* parts[kMaxParts];
    float beta[kMaxParts];
    int used = 0;
    for (int m = 0; m < members; ++m) {
      const Range range = member_columns(p_.V, m, members);
      if (range.begin >= range.end) continue;
      beta[used] = p_.map.scale;
      parts[used++] = memory_.at<float>(memory_of(group, m).d) + r * ldd_;
    }
    const int64_t at = p_.hidden.index ? p_.hidden.index[r0 + r] : r0 + r;
    kernels_.combine_row(parts, beta, used, nullptr, 0.0f, p_.H, p_.weight.type,
                         static_cast<char*>(out_.dhidden) + at * p_.H * bytes_of(p_.weight.type));
  }

 public:
  static constexpr int kMaxParts = 256;

 private:
  const Problem& p_;
  const Outputs& out_;
  const Stashed& stashed_;
  const RowGradient* known_;
  const int64_t K_;
  const TileKernels& kernels_;
  int64_t h2_, ldd_, cols_, c2_;
  std::vector<GroupMemory> groups_;
  std::vector<ThreadMemory> threads_;
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
                   int64_t hidden_stride, int64_t weight_stride, uintptr_t index, uintptr_t bias, uintptr_t targets,
                   int64_t num_targets, double softcap, double scale) {
  const auto storage = static_cast<Type>(type);
  return {{reinterpret_cast<const void*>(hidden), storage, hidden_stride, reinterpret_cast<const int64_t*>(index)},
          {reinterpret_cast<const void*>(weight), storage, weight_stride, nullptr},
          num_rows,
          H,
          V,
          {reinterpret_cast<const int64_t*>(targets), num_targets},
          {reinterpret_cast<const float*>(bias), static_cast<float>(scale), static_cast<float>(softcap)}};
}

int run(const Problem& p, const Outputs& out, const Plan& plan, const Stashed& stashed, const RowGradient* known) {
  return Forward(p, out, plan, stashed, known).run();
}

float* floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

// Of one target per row; row_grad and dweight: see WeightGradient.
void forward_cpu(const Problem& p, uintptr_t logp, uintptr_t lse, uintptr_t dhidden, uintptr_t row_grad,
                 uintptr_t dweight, uintptr_t dbias, int num_threads) {
  if (p.num_rows == 0) return;
  num_threads = std::clamp(num_threads, 1, Forward::kMaxParts);
  Outputs out{floats(logp), floats(lse), reinterpret_cast<void*>(dhidden), false, nullptr, nullptr, nullptr, nullptr};
  Plan plan = plan_of(p, dhidden != 0, num_threads);
  Stashed stashed;
  if (dweight == 0) {
    run(p, out, plan, stashed, nullptr);
    return;
  }
  const int64_t n = p.num_rows;
  std::vector<float> sums(4 * n), values, tail;
  out.lse_high = sums.data();
  out.lse_low = out.lse_high + n;
  out.target_dz = out.lse_low + n;
  float* constant = out.target_dz + n;
  out.g = floats(row_grad);
  for (int64_t t = 0; t < n; ++t) constant[t] = -out.g[t];
  if (const int64_t most = stashable_rows(p, &plan); most > 0) {
    values.resize((num_threads + 1) * most);
    tail.resize(most * kColPad);
    stashed = {
        most,
        {reinterpret_cast<void*>(dweight), p.weight.type, kColPad * p.H, tail.data(), p.V / kColPad * kColPad, 0},
        values.data() + most,
        values.data()};
  }
  WeightGradient gradient;
  gradient.parts = run(p, out, plan, stashed, nullptr);
  gradient.rows = {{out.lse_high, out.lse_low}, constant, nullptr, out.target_dz};
  gradient.dweight = reinterpret_cast<void*>(dweight);
  gradient.dbias = floats(dbias);
  gradient.num_stashed = stashed.num_rows;
  gradient.stash = stashed.place;
  gradient.coefficient = stashed.coefficient;
  gradient.target_value = stashed.target_value;
  weight_gradient(p, gradient, num_threads);
}

void stats_cpu(const Problem& p, uintptr_t logp, uintptr_t lse, uintptr_t slope, uintptr_t others, uintptr_t entropy,
               uintptr_t top, uintptr_t top_logp, int num_threads) {
  if (p.num_rows == 0) return;
  const Outputs out{floats(logp),    floats(lse),      reinterpret_cast<void*>(others), true, floats(slope),
                    floats(entropy), floats(top_logp), reinterpret_cast<int64_t*>(top)};
  run(p, out, plan_of(p, others != 0, std::clamp(num_threads, 1, Forward::kMaxParts)), {}, nullptr);
}

void backward_cpu(const Problem& p, uintptr_t lse, uintptr_t constant, uintptr_t log, uintptr_t at_target,
                  uintptr_t dhidden, uintptr_t dweight, uintptr_t dbias, int num_threads) {
  if (p.num_rows == 0) return;
  num_threads = std::clamp(num_threads, 1, Forward::kMaxParts);
  const std::vector<float> low(p.num_rows, 0.0f);
  const RowGradient rows{{floats(lse), low.data()}, floats(constant), floats(log), floats(at_target)};
  if (dhidden != 0) {
    const Outputs out{nullptr, nullptr, reinterpret_cast<void*>(dhidden), true, nullptr, nullptr, nullptr, nullptr};
    run(p, out, plan_of(p, true, num_threads), {}, &rows);
  }
  if (dweight == 0) return;
  WeightGradient gradient;
  gradient.rows = rows;
  gradient.dweight = reinterpret_cast<void*>(dweight);
  gradient.dbias = floats(dbias);
  weight_gradient(p, gradient, num_threads);
}

void bind(pybind11::module_& module) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  pybind11::class_<Problem>(module, "LinearProblem").def(pybind11::init(&problem_of));
  module.def("linear_cross_entropy_forward_cpu", &forward_cpu, release());
  module.def("linear_cross_entropy_stats_cpu", &stats_cpu, release());
  module.def("linear_cross_entropy_backward_cpu", &backward_cpu, release());
}
TK_REGISTER(bind);

}  // namespace
}  // namespace tk::linear_cross_entropy
