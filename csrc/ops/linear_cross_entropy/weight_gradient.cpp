// dz of the head's gradient. It needs p, whose normalisers are known after a pass over the whole vocabulary only. So
// either the forward has left its p in the memory of dweight itself, which has room for H rows of them, and each tile
// is overwritten by its own gradient (3 products in all); or the logits of the row are computed again, transposed:
// [v, t], which needs no transposition of p (4 products).
#include <algorithm>
#include <vector>

#include "common/head_gradient.h"
#include "ops/linear_cross_entropy/problem.h"

namespace tk::linear_cross_entropy {
namespace {

class Gradient final : public HeadGradient {
 public:
  Gradient(const Problem& p, const WeightGradient& out, int threads)
      : HeadGradient({p.hidden, p.num_rows, p.H, p.V, p.weight.type, out.dweight, out.dbias, out.num_stashed,
                      2 * k_dwords(tile_kernels(p.weight.type), p.H)},
                     threads),
        p_(p),
        out_(out) {
    const bool computes = p.num_rows > out.num_stashed;
    a_size_ = computes ? packed_a_dwords(h2_, tile_) : 0;
    bt_ = memory_.add<uint32_t>(computes ? h2_ * chunk_ : 0);
    for (int i = 0; i < threads_; ++i)
      own_.push_back(
          {memory_.add<uint32_t>(wave_tiles_ * a_size_), memory_.add<float>(computes ? tile_ * kScoreStride : 0)});
    memory_.allocate();
  }

 private:
  struct ThreadMemory {
    int64_t a, s;
  };

  uint32_t* packed_columns(const Tile& tile) const {
    return memory_.at<uint32_t>(own_[tile.thread].a) + tile.local * a_size_;
  }

  void begin_wave(const Tile& tile) override {
    if (a_size_ > 0)
      kernels_.pack_a(rows_from(p_.weight, tile.v0), tile.cols, round_up(tile.cols, kRowPad), p_.H, tile_,
                      packed_columns(tile));
  }

  // In pieces of kColPad rows, which are panels of bt.
  void pack_chunk(const Range& rows, int thread, int of) override {
    if (rows.begin < out_.num_stashed) return;
    const int64_t n = rows.end - rows.begin;
    const Range panels = split((n + kColPad - 1) / kColPad, thread, of);
    const int64_t first = panels.begin * kColPad, last = std::min(panels.end * kColPad, n);
    if (first < last)
      kernels_.pack_bt(rows_from(p_.hidden, rows.begin + first), last - first, p_.H,
                       memory_.at<uint32_t>(bt_) + first * h2_);
  }

  void gradient_of(const Range& rows, const Tile& tile, uint32_t* dz, float* dbias) override {
    rows.begin < out_.num_stashed ? restore(rows, tile, dz, dbias) : compute(rows, tile, dz, dbias);
  }

  // From the stash.
  void restore(const Range& rows, const Tile& tile, uint32_t* dz, float* dbias) {
    const int64_t n = rows.end - rows.begin;
    for (int64_t c = 0; c < tile.cols; c += kColPad) {
      int part = 0;  // which thread stashed the unit
      while (member_columns(p_.V, part, out_.parts).end <= tile.v0 + c) ++part;
      kernels_.unstash(out_.stash.at(rows.begin, tile.v0 + c), out_.stash.type, n, std::min(kColPad, tile.cols - c),
                       out_.coefficient + part * out_.num_stashed + rows.begin, dz + c * kKS, tile_, 0,
                       dbias == nullptr ? nullptr : dbias + c);
    }
    kernels_.set_targets(p_.targets.classes + rows.begin, out_.target_value + rows.begin, tile.v0, tile.cols, n, dz,
                         tile_, 0, dbias);
  }

  // From the logits, computed again.
  void compute(const Range& rows, const Tile& tile, uint32_t* dz, float* dbias) {
    auto* s = memory_.at<float>(own_[tile.thread].s);
    for (int64_t at = rows.begin; at < rows.end; at += kScoreCols) {
      const int64_t c0 = at - rows.begin, width = std::min(kScoreCols, rows.end - at);
      kernels_.gemm(packed_columns(tile), tile_, memory_.at<uint32_t>(bt_) + c0 * h2_, s, kScoreStride, tile.cols,
                    width, h2_, false);
      kernels_.gradient_tile(s, kScoreStride, tile.cols, width, tile.v0, p_.targets.from(at), p_.map,
                             out_.rows.from(at, p_.targets.count), dz, tile_, c0, dbias);
    }
  }

  const Problem& p_;
  const WeightGradient& out_;
  int64_t a_size_, bt_;
  std::vector<ThreadMemory> own_;
};

}  // namespace

void weight_gradient(const Problem& problem, const WeightGradient& out, int num_threads) {
  Gradient(problem, out, num_threads).form();
}

}  // namespace tk::linear_cross_entropy
