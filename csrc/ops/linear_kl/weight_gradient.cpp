// dz of the head's gradient, transposed as in linear_cross_entropy: three products with known normalisers.
#include <algorithm>
#include <vector>

#include "common/head_gradient.h"
#include "ops/linear_kl/problem.h"

namespace tk::linear_kl {
namespace {

class Gradient final : public HeadGradient {
 public:
  Gradient(const Problem& p, const Known& known, void* dweight, int threads)
      : HeadGradient({p.policy.hidden, p.num_rows, p.policy.width, p.V, p.policy.weight.type, dweight, nullptr, 0,
                      2 * k_dwords(tile_kernels(p.policy.weight.type), p.policy.width) +
                          k_dwords(tile_kernels(p.ref.weight.type), p.ref.width)},
                     threads),
        p_(p),
        known_(known),
        ref_kernels_(tile_kernels(p.ref.weight.type)),
        r2_(k_dwords(ref_kernels_, p.ref.width)) {
    bt_ = memory_.add<uint32_t>(h2_ * chunk_);
    ref_bt_ = memory_.add<uint32_t>(r2_ * chunk_);
    for (int i = 0; i < threads_; ++i)
      own_.push_back({memory_.add<uint32_t>(packed_a_dwords(h2_, tile_)),
                      memory_.add<uint32_t>(packed_a_dwords(r2_, tile_)), memory_.add<float>(tile_ * kScoreStride),
                      memory_.add<float>(tile_ * kScoreStride)});
    memory_.allocate();
  }

 private:
  struct ThreadMemory {
    int64_t a, ref_a, s, ref_s;
  };

  void pack_chunk(const Range& rows, int thread, int of) override {
    const int64_t n = rows.end - rows.begin;
    if (thread == 0)
      kernels_.pack_bt(rows_from(p_.policy.hidden, rows.begin), n, p_.policy.width, memory_.at<uint32_t>(bt_));
    if (thread == std::min(1, of - 1))
      ref_kernels_.pack_bt(rows_from(p_.ref.hidden, rows.begin), n, p_.ref.width, memory_.at<uint32_t>(ref_bt_));
  }

  // Both heads are packed per tile: keeping two packings of a wave would double the scratch memory.
  void gradient_of(const Range& rows, const Tile& tile, uint32_t* dz, float*) override {
    const ThreadMemory& mine = own_[tile.thread];
    auto* a = memory_.at<uint32_t>(mine.a);
    auto* ref_a = memory_.at<uint32_t>(mine.ref_a);
    auto* s = memory_.at<float>(mine.s);
    auto* ref_s = memory_.at<float>(mine.ref_s);
    const int64_t cols = tile.cols, padded = round_up(cols, kRowPad);
    kernels_.pack_a(rows_from(p_.policy.weight, tile.v0), cols, padded, p_.policy.width, tile_, a);
    ref_kernels_.pack_a(rows_from(p_.ref.weight, tile.v0), cols, padded, p_.ref.width, tile_, ref_a);
    for (int64_t at = rows.begin; at < rows.end; at += kScoreCols) {
      const int64_t c0 = at - rows.begin, width = std::min(kScoreCols, rows.end - at);
      kernels_.gemm(a, tile_, memory_.at<uint32_t>(bt_) + c0 * h2_, s, kScoreStride, cols, width, h2_, false);
      ref_kernels_.gemm(ref_a, tile_, memory_.at<uint32_t>(ref_bt_) + c0 * r2_, ref_s, kScoreStride, cols, width, r2_,
                        false);
      kernels_.kl_gradient_tile({s,
                                 ref_s,
                                 kScoreStride,
                                 cols,
                                 width,
                                 p_.map,
                                 tile.v0,
                                 {known_.lse.high + at, known_.lse.low + at},
                                 {known_.ref_lse.high + at, known_.ref_lse.low + at},
                                 known_.pivot + at,
                                 known_.difference + at,
                                 known_.g + at,
                                 dz,
                                 tile_,
                                 c0});
    }
  }

  const Problem& p_;
  const Known& known_;
  const TileKernels& ref_kernels_;
  const int64_t r2_;
  int64_t bt_, ref_bt_;
  std::vector<ThreadMemory> own_;
};

}  // namespace

void weight_gradient(const Problem& problem, const Known& known, void* dweight, int num_threads) {
  Gradient(problem, known, dweight, num_threads).form();
}

}  // namespace tk::linear_kl
