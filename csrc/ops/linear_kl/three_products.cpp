// linear_kl's forward pass in three products. Logits of a block of rows first, whose p~ - c q~ and q~ (KlTile) wait in
// scratch memory until the block's normalisers are known; then p - q in one product. Both halves need the head packed,
// so a pass over the vocabulary ends one block and begins the next: each tile is combined and multiplied, and its
// memory takes the same columns of the next rows.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/parallel.h"
#include "common/workspace.h"
#include "ops/linear_kl/problem.h"

namespace tk::linear_kl {
namespace {

class Forward {
 public:
  Forward(const Problem& p, const Outputs& out, const Plan& plan)
      : p_(p),
        out_(out),
        kernels_(tile_kernels(p.policy.weight.type)),
        ref_kernels_(tile_kernels(p.ref.weight.type)),
        plan_(plan) {
    h2_ = k_dwords(kernels_, p_.policy.width);
    r2_ = k_dwords(ref_kernels_, p_.ref.width);
    ldd_ = c_stride(p_.policy.width);
    const int64_t rows = plan_.block_rows, cols = plan_.tile_cols, c2 = k_dwords(kernels_, cols);
    const int64_t slots = p_.V / cols + plan_.members;
    slot_size_ = packed_a_dwords(c2, 2 * rows);
    a_ = memory_.add<uint32_t>(packed_a_dwords(h2_, rows));
    ref_a_ = memory_.add<uint32_t>(packed_a_dwords(r2_, rows));
    lse_ = memory_.add<double>(2 * rows);
    kept_ = memory_.add<uint32_t>(slots * slot_size_);
    kept_sums_ = memory_.add<float>(slots * 3 * rows);
    for (int m = 0; m < plan_.members; ++m)
      threads_.push_back({memory_.add<uint32_t>(h2_ * cols), memory_.add<uint32_t>(p_.one_head() ? 0 : r2_ * cols),
                          memory_.add<uint32_t>(c2 * ldd_), memory_.add<float>(plan_.tile_rows * kScoreStride),
                          memory_.add<float>(plan_.tile_rows * kScoreStride), memory_.add<float>(rows * ldd_),
                          memory_.add<float>(2 * rows), memory_.add<float>(Sums::kFloats * rows),
                          memory_.add<double>(rows), memory_.add<int64_t>(rows)});
    memory_.allocate();
    pivots_.resize(rows);
    for (const ThreadMemory& thread : threads_)
      sums_.push_back(Sums::at(memory_.at<float>(thread.sums), memory_.at<double>(thread.cross),
                               memory_.at<int64_t>(thread.top), rows));
  }

  void run(int member, int members) {
    const FlushDenormals flush;
    const Range range = member_columns(p_.V, member, members);
    Block last{0, 0};
    for (int64_t r0 = 0; r0 < p_.num_rows || last.rows > 0; r0 += plan_.block_rows) {
      const Block next{r0, std::clamp<int64_t>(p_.num_rows - r0, 0, plan_.block_rows)};
      if (next.rows > 0) {
        pack_share(kernels_, p_.policy.hidden, r0, next.rows, p_.policy.width, plan_.block_rows,
                   memory_.at<uint32_t>(a_), member, members);
        pack_share(ref_kernels_, p_.ref.hidden, r0, next.rows, p_.ref.width, plan_.block_rows,
                   memory_.at<uint32_t>(ref_a_), member, members);
        sums_[member].reset(next.rows);
      }
      barrier_.wait(members);
      // The parts of the members begin anywhere: each has one slot more than it fills whole.
      int64_t slot = range.begin / plan_.tile_cols + member;
      for (int64_t v0 = range.begin; v0 < range.end; v0 += plan_.tile_cols, ++slot)
        tile(last, next, v0, std::min(plan_.tile_cols, range.end - v0), slot, v0 == range.begin, member);
      barrier_.wait(members);
      finish_rows(last, member, members);
      begin_rows(next, member, members);
      barrier_.wait(members);
      last = next;
    }
  }

 private:
  struct Block {
    int64_t begin, rows;
  };
  // Of a row of the block that waits: its pivot, and dz there without the scale.
  struct Pivot {
    int64_t column = -1;
    float dz = 0.0f;
  };
  struct ThreadMemory {
    int64_t bt, ref_bt, b, s, ref_s, d, factors, sums, cross, top;
  };

  void tile(const Block& last, const Block& next, int64_t v0, int64_t cols, int64_t slot, bool first, int member) {
    const ThreadMemory& mine = threads_[member];
    const Rows weight = rows_from(p_.policy.weight, v0);
    auto* bt = memory_.at<uint32_t>(mine.bt);
    auto* b = memory_.at<uint32_t>(mine.b);
    if (last.rows > 0 && next.rows > 0) {
      kernels_.pack_both(weight, cols, p_.policy.width, bt, b);
    } else if (next.rows > 0) {
      kernels_.pack_bt(weight, cols, p_.policy.width, bt);
    } else {
      kernels_.pack_b(weight, cols, p_.policy.width, b);
    }
    if (last.rows > 0) multiply(last, v0, cols, slot, first, mine);
    if (next.rows == 0) return;
    auto* ref_bt = p_.one_head() ? bt : memory_.at<uint32_t>(mine.ref_bt);
    if (!p_.one_head()) ref_kernels_.pack_bt(rows_from(p_.ref.weight, v0), cols, p_.ref.width, ref_bt);
    score_rows(next, v0, cols, slot, bt, ref_bt, member);
  }

  void score_rows(const Block& block, int64_t v0, int64_t cols, int64_t slot, const uint32_t* bt,
                  const uint32_t* ref_bt, int member) {
    const ThreadMemory& mine = threads_[member];
    const Sums& sums = sums_[member];
    const int64_t height = plan_.block_rows;
    auto* kept = memory_.at<uint32_t>(kept_) + slot * slot_size_;
    std::fill_n(sums.ratio, block.rows, 0.0f);  // nothing has been added up: each tile takes the best so far
    for (int64_t t0 = 0; t0 < block.rows; t0 += plan_.tile_rows) {
      const int64_t n = std::min(plan_.tile_rows, block.rows - t0);
      KlTile scored = sums.tile(t0, n, memory_.at<float>(mine.s), memory_.at<float>(mine.ref_s), v0, p_.map);
      scored.p = kept + t0 * kKS;
      scored.rows_p = 2 * height;
      scored.ref_row = height;
      score({kernels_, memory_.at<uint32_t>(a_) + t0 * kKS, bt, h2_},
            {ref_kernels_, memory_.at<uint32_t>(ref_a_) + t0 * kKS, ref_bt, r2_}, height, cols, scored);
    }
    float* remembered = memory_.at<float>(kept_sums_) + slot * 3 * height;
    std::copy_n(sums.max, block.rows, remembered);
    std::copy_n(sums.ref_max, block.rows, remembered + height);
    std::copy_n(sums.ratio, block.rows, remembered + 2 * height);
  }

  void multiply(const Block& block, int64_t v0, int64_t cols, int64_t slot, bool first, const ThreadMemory& mine) {
    const int64_t height = plan_.block_rows;
    auto* kept = memory_.at<uint32_t>(kept_) + slot * slot_size_;
    const auto* remembered = memory_.at<float>(kept_sums_) + slot * 3 * height;
    const auto *lse = memory_.at<double>(lse_), *ref_lse = lse + height;
    auto *of_difference = memory_.at<float>(mine.factors), *of_ref = of_difference + height;
    for (int64_t r = 0; r < block.rows; ++r) {
      const double p = part_factor(remembered[r], lse[r]), q = part_factor(remembered[height + r], ref_lse[r]);
      of_difference[r] = static_cast<float>(p);
      of_ref[r] = static_cast<float>(p * remembered[2 * height + r] - q);
    }
    kernels_.kl_combine(kept, 2 * height, height, block.rows, cols, of_difference, of_ref);
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t column = pivots_[r].column - v0;
      if (column >= 0 && column < cols) set_packed_value(kernels_.pairs, kept, 2 * height, r, column, pivots_[r].dz);
    }
    kernels_.gemm(kept, 2 * height, memory_.at<uint32_t>(mine.b), memory_.at<float>(mine.d), ldd_, block.rows,
                  p_.policy.width, k_dwords(kernels_, cols), !first);
  }

  void begin_rows(const Block& block, int member, int members) {
    const Range mine = split(block.rows, member, members);
    auto *lse = memory_.at<double>(lse_), *ref_lse = lse + plan_.block_rows;
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      const RowSums row = merge(sums_.data(), members, r);
      write_row(p_, out_, block.begin + r, row);
      lse[r] = row.max + std::log(row.total);
      ref_lse[r] = row.ref_max + std::log(row.ref_total);
      pivots_[r] = {row.top, static_cast<float>(row.slope * row.difference())};
    }
  }

  void finish_rows(const Block& block, int member, int members) {
    const Range rows = split(block.rows, member, members);
    const float* parts[kMaxParts];
    float beta[kMaxParts];
    const Type type = p_.policy.weight.type;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      int used = 0;
      for (int m = 0; m < members; ++m) {
        const Range columns = member_columns(p_.V, m, members);
        if (columns.begin >= columns.end) continue;
        beta[used] = p_.map.scale;
        parts[used++] = memory_.at<float>(threads_[m].d) + r * ldd_;
      }
      const int64_t row = block.begin + r, at = p_.policy.hidden.index ? p_.policy.hidden.index[row] : row;
      kernels_.combine_row(parts, beta, used, nullptr, 0.0f, p_.policy.width, type,
                           static_cast<char*>(out_.dhidden) + at * p_.policy.width * bytes_of(type));
    }
  }

  const Problem& p_;
  const Outputs& out_;
  const TileKernels& kernels_;
  const TileKernels& ref_kernels_;
  const Plan& plan_;
  int64_t h2_, r2_, ldd_, slot_size_;
  int64_t a_, ref_a_;
  int64_t lse_;        // [2, block_rows] of policy and reference, of the block that waits
  int64_t kept_;       // [slots]: packed A of [2 block_rows, tile_cols]
  int64_t kept_sums_;  // [slots, 3, block_rows]: the maxima and the ratio that a slot's numbers are relative to
  std::vector<ThreadMemory> threads_;
  std::vector<Sums> sums_;
  std::vector<Pivot> pivots_;
  Workspace memory_;
  Barrier barrier_;
};

}  // namespace

Plan three_products_plan(const Problem& p, int threads) {
  constexpr int64_t kBytes = int64_t{44} << 20;  // of all scratch memory with two threads; others add their own
  const TileKernels &kernels = tile_kernels(p.policy.weight.type), &ref_kernels = tile_kernels(p.ref.weight.type);
  const int64_t h2 = k_dwords(kernels, p.policy.width), r2 = k_dwords(ref_kernels, p.ref.width);
  Plan plan{};
  plan.groups = 1;
  plan.members = static_cast<int>(std::clamp<int64_t>((p.V + kScoreCols - 1) / kScoreCols, 1, threads));
  plan.tile_rows = kScoreCols;
  plan.tile_cols = kernels.pairs ? 2 * kKC : kKC;  // one slab of packed A
  const int64_t ldd = c_stride(p.policy.width), columns = (p.V / plan.tile_cols + 2) * 2 * kKS;
  const int64_t fixed =
      2 * ((h2 + (p.one_head() ? 0 : r2)) * plan.tile_cols + kKC * ldd + 2 * kScoreCols * kScoreStride);
  const int64_t per_row = columns + 2 * ldd + packed_a_dwords(h2, 1) + packed_a_dwords(r2, 1);
  const int64_t most = std::min<int64_t>((kBytes / 4 - fixed) / per_row / kRowPad * kRowPad, 2048);
  if (most < kRowPad) return plan;
  const int64_t blocks = (p.num_rows + most - 1) / most;
  plan.block_rows = round_up((p.num_rows + blocks - 1) / blocks, kRowPad);
  return plan;
}

void forward_three_products(const Problem& p, const Outputs& out, const Plan& plan) {
  Forward forward(p, out, plan);
  parallel(plan.members, [&](int member, int of) { forward.run(member, of); });
}

}  // namespace tk::linear_kl
