// linear_kl on the CPU: KL(ref || policy) and its gradient in one streaming pass over both heads.
//
//   kl_t = sum_v q_v (z^ref_v - z_v) + lse_t - lse^ref_t,  d kl_t / d h_t = scale * sum_v (p_v - q_v) slope_v W[v]
//
// The two normalisers are known only at the end, so two sums are accumulated (KlTile says which): four products in all,
// and no logits in memory. See linear_cross_entropy for the scheme.
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
#include "ops/linear_kl/problem.h"

namespace tk::linear_kl {
namespace {

struct Outputs {
  float *kl, *lse, *ref_lse;     // [T]
  float *lse_low, *ref_lse_low;  // [num_rows] what rounding lost
  void* dhidden;                 // [T, H] or null
};

constexpr int kMaxParts = 256;

class Forward {
 public:
  Forward(const Problem& p, const Outputs& out, int threads)
      : p_(p), out_(out), kernels_(tile_kernels(p.policy.weight.type)), ref_kernels_(tile_kernels(p.ref.weight.type)) {
    const bool gradient = out_.dhidden != nullptr;
    h2_ = k_dwords(kernels_, p_.policy.width);
    r2_ = k_dwords(ref_kernels_, p_.ref.width);
    ldd_ = c_stride(p_.policy.width);
    plan_ = make_plan(p_.num_rows, p_.V, gradient ? 2 * round_up(p_.policy.width, kColPad) * 4 : 0,
                      (h2_ * (gradient ? 2 : 1) + r2_) * 5, threads);
    const int64_t rows = plan_.block_rows, tiles = (rows + plan_.tile_rows - 1) / plan_.tile_rows;
    plan_.tile_rows = round_up((rows + tiles - 1) / tiles, kRowPad);  // d has room for whole tiles: equal ones
    const int64_t cols = plan_.tile_cols, c2 = k_dwords(kernels_, cols);
    for (int g = 0; g < plan_.groups; ++g) {
      groups_.push_back(
          {memory_.add<uint32_t>(packed_a_dwords(h2_, rows)), memory_.add<uint32_t>(packed_a_dwords(r2_, rows))});
      for (int m = 0; m < plan_.members; ++m)
        threads_.push_back({memory_.add<uint32_t>(h2_ * cols), memory_.add<uint32_t>(r2_ * cols),
                            memory_.add<uint32_t>(gradient ? c2 * ldd_ : 0),
                            memory_.add<float>(plan_.tile_rows * kScoreStride),
                            memory_.add<float>(plan_.tile_rows * kScoreStride),
                            memory_.add<uint32_t>(gradient ? packed_a_dwords(c2, 2 * plan_.tile_rows) : 0),
                            memory_.add<float>(gradient ? 2 * round_up(rows, plan_.tile_rows) * ldd_ : 0),
                            memory_.add<float>(5 * rows), memory_.add<double>(rows)});
    }
    memory_.allocate();
    barriers_ = std::vector<Barrier>(plan_.groups);
  }

  int num_threads() const { return plan_.members * plan_.groups; }

  void run(int thread, int num_threads) {
    // The runtime may have granted fewer threads than planned: then one group of them does everything.
    const bool as_planned = num_threads == this->num_threads();
    const int members = as_planned ? plan_.members : std::min(num_threads, plan_.members);
    const int groups = as_planned ? plan_.groups : 1;
    const int group = thread / members, member = thread % members;
    if (group >= groups) return;
    const FlushDenormals flush;
    for (int64_t r0 = group * plan_.block_rows; r0 < p_.num_rows; r0 += groups * plan_.block_rows)
      block(r0, std::min(plan_.block_rows, p_.num_rows - r0), group, member, members);
  }

 private:
  struct GroupMemory {
    int64_t a, ref_a;
  };
  struct ThreadMemory {
    int64_t bt, ref_bt, b, s, ref_s, p;
    int64_t d;      // per tile of rows: [2, tile_rows, ldd], of policy and of reference
    int64_t state;  // [5, block_rows]: max, sum, ref_max, ref_sum, ratio
    int64_t cross;
  };

  const ThreadMemory& memory_of(int group, int member) const { return threads_[group * plan_.members + member]; }
  float* state(const ThreadMemory& mine, int which) const {
    return memory_.at<float>(mine.state) + which * plan_.block_rows;
  }

  float* gradient_row(const ThreadMemory& mine, int64_t r) const {
    return memory_.at<float>(mine.d) + (r / plan_.tile_rows * 2 * plan_.tile_rows + r % plan_.tile_rows) * ldd_;
  }

  void block(int64_t r0, int64_t rows, int group, int member, int members) {
    const GroupMemory& shared = groups_[group];
    const ThreadMemory& mine = memory_of(group, member);
    Barrier& barrier = barriers_[group];
    pack_share(kernels_, p_.policy.hidden, r0, rows, p_.policy.width, plan_.block_rows, memory_.at<uint32_t>(shared.a),
               member, members);
    pack_share(ref_kernels_, p_.ref.hidden, r0, rows, p_.ref.width, plan_.block_rows,
               memory_.at<uint32_t>(shared.ref_a), member, members);
    for (int which = 0; which < 5; ++which) {
      float* values = state(mine, which);
      std::fill(values, values + rows, which == 0 || which == 2 ? -std::numeric_limits<float>::infinity() : 0.0f);
    }
    std::fill_n(memory_.at<double>(mine.cross), rows, 0.0);
    barrier.wait(members);
    const Range range = member_columns(p_.V, member, members);
    for (int64_t v0 = range.begin; v0 < range.end; v0 += plan_.tile_cols)
      tile(rows, v0, std::min(plan_.tile_cols, range.end - v0), v0 == range.begin, shared, mine);
    barrier.wait(members);
    const Range merged = split(rows, member, members);
    for (int64_t r = merged.begin; r < merged.end; ++r) merge(r0, r, group, members);
    barrier.wait(members);
  }

  void tile(int64_t rows, int64_t v0, int64_t cols, bool first, const GroupMemory& shared, const ThreadMemory& mine) {
    const bool gradient = out_.dhidden != nullptr;
    const int64_t H = p_.policy.width, tile_rows = plan_.tile_rows;
    auto* bt = memory_.at<uint32_t>(mine.bt);
    auto* ref_bt = memory_.at<uint32_t>(mine.ref_bt);
    auto* b = memory_.at<uint32_t>(mine.b);
    auto* p = gradient ? memory_.at<uint32_t>(mine.p) : nullptr;
    if (gradient) {
      kernels_.pack_both(rows_from(p_.policy.weight, v0), cols, H, bt, b);
    } else {
      kernels_.pack_bt(rows_from(p_.policy.weight, v0), cols, H, bt);
    }
    ref_kernels_.pack_bt(rows_from(p_.ref.weight, v0), cols, p_.ref.width, ref_bt);
    for (int64_t t0 = 0; t0 < rows; t0 += tile_rows) {
      const int64_t n = std::min(tile_rows, rows - t0);
      float* d = gradient ? gradient_row(mine, t0) : nullptr;
      float* ref_d = gradient ? d + tile_rows * ldd_ : nullptr;
      KlTile scores{memory_.at<float>(mine.s),
                    memory_.at<float>(mine.ref_s),
                    kScoreStride,
                    n,
                    0,
                    p_.map,
                    state(mine, 0) + t0,
                    state(mine, 1) + t0,
                    state(mine, 2) + t0,
                    state(mine, 3) + t0,
                    state(mine, 4) + t0,
                    memory_.at<double>(mine.cross) + t0,
                    p,
                    2 * tile_rows,
                    tile_rows,
                    0,
                    first ? nullptr : d,  // the first tile finds nothing to rescale
                    first ? nullptr : ref_d,
                    ldd_};
      for (int64_t c0 = 0; c0 < cols; c0 += kScoreCols) {
        scores.cols = std::min(kScoreCols, cols - c0);
        scores.p_offset = c0;
        kernels_.gemm(memory_.at<uint32_t>(shared.a) + t0 * kKS, plan_.block_rows, bt + c0 * h2_, scores.s,
                      kScoreStride, n, scores.cols, h2_, false);
        ref_kernels_.gemm(memory_.at<uint32_t>(shared.ref_a) + t0 * kKS, plan_.block_rows, ref_bt + c0 * r2_,
                          scores.ref_s, kScoreStride, n, scores.cols, r2_, false);
        kernels_.kl_tile(scores);
      }
      if (!gradient) continue;
      const int64_t c2 = k_dwords(kernels_, cols);
      if (n == tile_rows) {
        kernels_.gemm(p, 2 * tile_rows, b, d, ldd_, 2 * n, H, c2, !first);
      } else {
        kernels_.gemm(p, 2 * tile_rows, b, d, ldd_, n, H, c2, !first);
        kernels_.gemm(p + tile_rows * kKS, 2 * tile_rows, b, ref_d, ldd_, n, H, c2, !first);
      }
    }
  }

  struct Merged {
    double lse, top, total;
  };

  // logsumexp from the parts: state rows `which` (max) and `which + 1` (sum).
  Merged merge_sums(int64_t r, int which, int group, int members) const {
    double top = -std::numeric_limits<double>::infinity(), total = 0.0;
    for (int m = 0; m < members; ++m) top = std::max(top, double{state(memory_of(group, m), which)[r]});
    for (int m = 0; m < members; ++m)
      total += state(memory_of(group, m), which + 1)[r] * part_factor(r, which, group, m, top);
    return {top + std::log(total), top, total};
  }
  // A part without a maximum is empty (sum 0) or holds NaN only (a sum of NaN, which must get through).
  double part_factor(int64_t r, int which, int group, int m, double top) const {
    const double part = state(memory_of(group, m), which)[r];
    return std::isinf(part) && part < 0 ? 0.0 : std::exp(part - top);
  }

  void merge(int64_t r0, int64_t r, int group, int members) {
    const Merged policy = merge_sums(r, 0, group, members), ref = merge_sums(r, 2, group, members);
    double cross = 0.0;
    const float* parts[2 * kMaxParts];
    float beta[2 * kMaxParts];
    int used = 0;
    const double scale = p_.map.scale;
    for (int m = 0; m < members; ++m) {
      const Range range = member_columns(p_.V, m, members);
      if (range.begin >= range.end) continue;
      const ThreadMemory& part = memory_of(group, m);
      const double factor = part_factor(r, 0, group, m, policy.top), ref_factor = part_factor(r, 2, group, m, ref.top);
      if (ref_factor != 0.0) {
        // From the part's own maxima to the common ones.
        const double own_max = state(part, 0)[r], shift = std::isinf(own_max) ? policy.top : policy.top - own_max;
        cross += ref_factor * (memory_.at<double>(part.cross)[r] +
                               state(part, 3)[r] * (shift - (ref.top - double{state(part, 2)[r]})));
      }
      const double weight = factor / policy.total, ratio = state(part, 4)[r];
      beta[used] = static_cast<float>(scale * weight);
      parts[used++] = gradient_row(part, r);
      beta[used] = static_cast<float>(scale * (ratio * weight - ref_factor / ref.total));
      parts[used++] = gradient_row(part, r) + plan_.tile_rows * ldd_;
    }
    const int64_t at = p_.policy.hidden.index ? p_.policy.hidden.index[r0 + r] : r0 + r;
    out_.kl[at] = static_cast<float>(cross / ref.total + (std::log(policy.total) - std::log(ref.total)));
    out_.lse[at] = static_cast<float>(policy.lse);
    out_.ref_lse[at] = static_cast<float>(ref.lse);
    out_.lse_low[r0 + r] = static_cast<float>(policy.lse - out_.lse[at]);
    out_.ref_lse_low[r0 + r] = static_cast<float>(ref.lse - out_.ref_lse[at]);
    if (out_.dhidden == nullptr) return;
    const Type type = p_.policy.weight.type;
    kernels_.combine_row(parts, beta, used, nullptr, 0.0f, p_.policy.width, type,
                         static_cast<char*>(out_.dhidden) + at * p_.policy.width * bytes_of(type));
  }

  const Problem& p_;
  const Outputs& out_;
  const TileKernels& kernels_;
  const TileKernels& ref_kernels_;
  Plan plan_;
  int64_t h2_, r2_, ldd_;
  std::vector<GroupMemory> groups_;
  std::vector<ThreadMemory> threads_;
  Workspace memory_;
  std::vector<Barrier> barriers_;
};

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

float* floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

void bind(pybind11::module_& module) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  module.def(
      "linear_kl_forward_cpu",
      [](uintptr_t hidden, uintptr_t weight, int type, int64_t width, int64_t hidden_stride, int64_t weight_stride,
         uintptr_t ref_hidden, uintptr_t ref_weight, int ref_type, int64_t ref_width, int64_t ref_hidden_stride,
         int64_t ref_weight_stride, uintptr_t index, int64_t num_rows, int64_t V, double softcap, double scale,
         uintptr_t kl, uintptr_t lse, uintptr_t ref_lse, uintptr_t lse_low, uintptr_t ref_lse_low, uintptr_t dhidden,
         int num_threads) {
        const Problem p =
            problem_of(hidden, weight, type, width, hidden_stride, weight_stride, ref_hidden, ref_weight, ref_type,
                       ref_width, ref_hidden_stride, ref_weight_stride, index, num_rows, V, softcap, scale);
        const Outputs out{floats(kl),      floats(lse),         floats(ref_lse),
                          floats(lse_low), floats(ref_lse_low), reinterpret_cast<void*>(dhidden)};
        Forward forward(p, out, std::clamp(num_threads, 1, kMaxParts));
        parallel(forward.num_threads(), [&](int thread, int of) { forward.run(thread, of); });
      },
      release());
  module.def(
      "linear_kl_backward_weight_cpu",
      [](uintptr_t hidden, uintptr_t weight, int type, int64_t width, int64_t hidden_stride, int64_t weight_stride,
         uintptr_t ref_hidden, uintptr_t ref_weight, int ref_type, int64_t ref_width, int64_t ref_hidden_stride,
         int64_t ref_weight_stride, uintptr_t index, int64_t num_rows, int64_t V, double softcap, double scale,
         uintptr_t lse, uintptr_t ref_lse, uintptr_t lse_low, uintptr_t ref_lse_low, uintptr_t row_grad,
         uintptr_t dweight, int num_threads) {
        const Problem p =
            problem_of(hidden, weight, type, width, hidden_stride, weight_stride, ref_hidden, ref_weight, ref_type,
                       ref_width, ref_hidden_stride, ref_weight_stride, index, num_rows, V, softcap, scale);
        weight_gradient(p, {floats(lse), floats(lse_low)}, {floats(ref_lse), floats(ref_lse_low)}, floats(row_grad),
                        reinterpret_cast<void*>(dweight), num_threads);
      },
      release());
}
TK_REGISTER(bind);

}  // namespace
}  // namespace tk::linear_kl
