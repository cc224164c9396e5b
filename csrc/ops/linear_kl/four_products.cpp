// linear_kl's forward pass over both heads, once: the two normalisers are known only at the end, so two sums are
// accumulated (KlTile says which). Four products with a gradient, two without.
#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/workspace.h"
#include "ops/linear_kl/problem.h"

namespace tk::linear_kl {
namespace {

class Forward final : public BlockPass {
 public:
  Forward(const Problem& p, const Outputs& out, const Plan& plan)
      : BlockPass(p.num_rows, plan),
        p_(p),
        out_(out),
        kernels_(tile_kernels(p.policy.weight.type)),
        ref_kernels_(tile_kernels(p.ref.weight.type)) {
    const bool gradient = out_.dhidden != nullptr;
    h2_ = k_dwords(kernels_, p_.policy.width);
    r2_ = k_dwords(ref_kernels_, p_.ref.width);
    ldd_ = c_stride(p_.policy.width);
    const int64_t rows = plan_.block_rows, cols = plan_.tile_cols, c2 = k_dwords(kernels_, cols);
    for (int g = 0; g < plan_.groups; ++g) {
      groups_.push_back(
          {memory_.add<uint32_t>(packed_a_dwords(h2_, rows)), memory_.add<uint32_t>(packed_a_dwords(r2_, rows))});
      for (int m = 0; m < plan_.members; ++m)
        threads_.push_back(
            {memory_.add<uint32_t>(h2_ * cols), memory_.add<uint32_t>(p_.one_head() ? 0 : r2_ * cols),
             memory_.add<uint32_t>(gradient ? c2 * ldd_ : 0), memory_.add<float>(plan_.tile_rows * kScoreStride),
             memory_.add<float>(plan_.tile_rows * kScoreStride),
             memory_.add<uint32_t>(gradient ? packed_a_dwords(c2, 2 * plan_.tile_rows) : 0),
             memory_.add<float>(gradient ? 2 * round_up(rows, plan_.tile_rows) * ldd_ : 0),
             memory_.add<float>(Sums::kFloats * rows), memory_.add<double>(rows), memory_.add<int64_t>(rows)});
    }
    memory_.allocate();
    for (const ThreadMemory& thread : threads_)
      sums_.push_back(Sums::at(memory_.at<float>(thread.sums), memory_.at<double>(thread.cross),
                               memory_.at<int64_t>(thread.top), rows));
  }

 private:
  struct GroupMemory {
    int64_t a, ref_a;
  };
  struct ThreadMemory {
    int64_t bt, ref_bt, b, s, ref_s, p;
    int64_t d;  // per tile of rows: [2, tile_rows, ldd], of policy and of reference
    int64_t sums, cross, top;
  };

  float* gradient_row(const ThreadMemory& mine, int64_t r) const {
    return memory_.at<float>(mine.d) + (r / plan_.tile_rows * 2 * plan_.tile_rows + r % plan_.tile_rows) * ldd_;
  }

  void block(int64_t r0, int64_t rows, int group, int member, int members) override {
    const GroupMemory& shared = groups_[group];
    Barrier& barrier = barriers_[group];
    pack_share(kernels_, p_.policy.hidden, r0, rows, p_.policy.width, plan_.block_rows, memory_.at<uint32_t>(shared.a),
               member, members);
    pack_share(ref_kernels_, p_.ref.hidden, r0, rows, p_.ref.width, plan_.block_rows,
               memory_.at<uint32_t>(shared.ref_a), member, members);
    const int part = group * plan_.members + member;
    sums_[part].reset(rows);
    barrier.wait(members);
    const Range range = member_columns(p_.V, member, members);
    for (int64_t v0 = range.begin; v0 < range.end; v0 += plan_.tile_cols)
      tile(rows, v0, std::min(plan_.tile_cols, range.end - v0), v0 == range.begin, shared, part);
    barrier.wait(members);
    const Range merged = split(rows, member, members);
    for (int64_t r = merged.begin; r < merged.end; ++r) finish_row(r0, r, group, members);
    barrier.wait(members);
  }

  void tile(int64_t rows, int64_t v0, int64_t cols, bool first, const GroupMemory& shared, int part) {
    const ThreadMemory& mine = threads_[part];
    const Sums& sums = sums_[part];
    const bool gradient = out_.dhidden != nullptr;
    const int64_t H = p_.policy.width, tile_rows = plan_.tile_rows;
    auto* bt = memory_.at<uint32_t>(mine.bt);
    auto* b = memory_.at<uint32_t>(mine.b);
    auto* p = gradient ? memory_.at<uint32_t>(mine.p) : nullptr;
    if (gradient) {
      kernels_.pack_both(rows_from(p_.policy.weight, v0), cols, H, bt, b);
    } else {
      kernels_.pack_bt(rows_from(p_.policy.weight, v0), cols, H, bt);
    }
    auto* ref_bt = p_.one_head() ? bt : memory_.at<uint32_t>(mine.ref_bt);
    if (!p_.one_head()) ref_kernels_.pack_bt(rows_from(p_.ref.weight, v0), cols, p_.ref.width, ref_bt);
    for (int64_t t0 = 0; t0 < rows; t0 += tile_rows) {
      const int64_t n = std::min(tile_rows, rows - t0);
      float* d = gradient ? gradient_row(mine, t0) : nullptr;
      float* ref_d = gradient ? d + tile_rows * ldd_ : nullptr;
      const bool rescaled = gradient && !first;  // the first tile finds nothing to rescale
      KlTile scored = sums.tile(t0, n, memory_.at<float>(mine.s), memory_.at<float>(mine.ref_s), v0, p_.map);
      scored.p = p;
      scored.rows_p = 2 * tile_rows;
      scored.ref_row = tile_rows;
      scored.d = rescaled ? d : nullptr;
      scored.ref_d = rescaled ? ref_d : nullptr;
      scored.ldd = ldd_;
      score({kernels_, memory_.at<uint32_t>(shared.a) + t0 * kKS, bt, h2_},
            {ref_kernels_, memory_.at<uint32_t>(shared.ref_a) + t0 * kKS, ref_bt, r2_}, plan_.block_rows, cols, scored);
      if (!gradient) continue;
      for (int64_t r = 0; r < n; ++r) {
        const int64_t column = scored.top[r] - v0;
        if (column < 0 || column >= cols) continue;  // the pivot is older
        scored.kept[r] = packed_value(kernels_.pairs, p, 2 * tile_rows, r, column);
        scored.ref_kept[r] = packed_value(kernels_.pairs, p, 2 * tile_rows, tile_rows + r, column);
      }
      const int64_t c2 = k_dwords(kernels_, cols);
      if (n == tile_rows) {
        kernels_.gemm(p, 2 * tile_rows, b, d, ldd_, 2 * n, H, c2, !first);
      } else {
        kernels_.gemm(p, 2 * tile_rows, b, d, ldd_, n, H, c2, !first);
        kernels_.gemm(p + tile_rows * kKS, 2 * tile_rows, b, ref_d, ldd_, n, H, c2, !first);
      }
    }
  }

  void finish_row(int64_t r0, int64_t r, int group, int members) {
    const int first = group * plan_.members;
    const RowSums row = merge(&sums_[first], members, r);
    const int64_t at = write_row(p_, out_, r0 + r, row);
    if (out_.dhidden == nullptr) return;
    const float* parts[2 * kMaxParts];
    float beta[2 * kMaxParts];
    int used = 0;
    const double scale = p_.map.scale;
    double at_pivot = row.slope * row.difference();  // less what has been accumulated of it
    for (int m = 0; m < members; ++m) {
      const Range range = member_columns(p_.V, m, members);
      if (range.begin >= range.end) continue;
      const Sums& sums = sums_[first + m];
      const double weight = part_factor(sums.max[r], row.max) / row.total, ratio = sums.ratio[r];
      const double ref_weight = ratio * weight - part_factor(sums.ref_max[r], row.ref_max) / row.ref_total;
      if (sums.top[r] == row.top) at_pivot -= weight * sums.kept[r] + ref_weight * sums.ref_kept[r];
      beta[used] = static_cast<float>(scale * weight);
      parts[used++] = gradient_row(threads_[first + m], r);
      beta[used] = static_cast<float>(scale * ref_weight);
      parts[used++] = gradient_row(threads_[first + m], r) + plan_.tile_rows * ldd_;
    }
    const Rows& weight = p_.policy.weight;
    const Type type = weight.type;
    const char* pivot =
        static_cast<const char*>(weight.data) + std::max<int64_t>(row.top, 0) * weight.stride * bytes_of(type);
    kernels_.combine_row(parts, beta, used, pivot, static_cast<float>(scale * at_pivot), p_.policy.width, type,
                         static_cast<char*>(out_.dhidden) + at * p_.policy.width * bytes_of(type));
  }

  const Problem& p_;
  const Outputs& out_;
  const TileKernels& kernels_;
  const TileKernels& ref_kernels_;
  int64_t h2_, r2_, ldd_;
  std::vector<GroupMemory> groups_;
  std::vector<ThreadMemory> threads_;
  std::vector<Sums> sums_;
};

}  // namespace

Plan four_products_plan(const Problem& p, bool gradient, int threads) {
  const int64_t h2 = k_dwords(tile_kernels(p.policy.weight.type), p.policy.width);
  const int64_t r2 = k_dwords(tile_kernels(p.ref.weight.type), p.ref.width);
  Plan plan = make_plan(p.num_rows, p.V, gradient ? 2 * round_up(p.policy.width, kColPad) * 4 : 0,
                        (h2 * (gradient ? 2 : 1) + r2) * 5, threads);
  // The gradient has room for whole tiles: equal ones.
  const int64_t rows = plan.block_rows, tiles = (rows + plan.tile_rows - 1) / plan.tile_rows;
  plan.tile_rows = round_up((rows + tiles - 1) / tiles, kRowPad);
  return plan;
}

void forward_four_products(const Problem& p, const Outputs& out, const Plan& plan) { Forward(p, out, plan).run(); }

}  // namespace tk::linear_kl
