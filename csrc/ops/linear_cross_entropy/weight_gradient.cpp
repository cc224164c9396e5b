// The gradient of the head, a tile of columns at a time in fp32. It needs p, whose normalisers are known after a pass
// over the whole vocabulary only. So either the forward has left its p in the memory of dweight itself, which has room
// for H rows of them, and each tile is overwritten by its own gradient (3 products in all); or the logits of the row
// are computed again, transposed: [v, t], which needs no transposition of p (4 products).
#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/streaming.h"
#include "common/workspace.h"
#include "ops/linear_cross_entropy/problem.h"

namespace tk::linear_cross_entropy {
namespace {

class Weight {
 public:
  Weight(const Problem& p, const WeightGradient& out, int threads)
      : p_(p), out_(out), kernels_(tile_kernels(p.weight.type)), bytes_(bytes_of(p.weight.type)) {
    const int64_t stashed = out.num_stashed, computed = p.num_rows - stashed;
    h2_ = k_dwords(kernels_, p.H);
    ldd_ = c_stride(p.H);
    // Columns of the vocabulary. With few rows the fp32 gradient of the tile is what must stay in the cache.
    tile_ = p.num_rows > 256 ? 256 : std::clamp((int64_t{1} << 17) / p.H / kColPad * kColPad, kColPad, int64_t{256});
    // Rows whose two packings all threads share. Where there are more rows than one chunk, a thread keeps the gradients
    // of several tiles (a wave) while the chunks pass, so that packing a chunk again for every wave costs little.
    constexpr int64_t kBytes = int64_t{8} << 20;
    chunk_ = std::min(round_up(p.num_rows, kColPad),
                      std::clamp(kBytes / (8 * h2_) / kColPad * kColPad, kColPad, int64_t{1024}));
    for (int64_t t0 = 0; t0 < p.num_rows; t0 = chunks_.back().end)
      chunks_.push_back({t0, std::min(t0 + chunk_, t0 < stashed ? stashed : p.num_rows)});
    wave_tiles_ = chunks_.size() == 1 ? 1 : std::clamp(kBytes / (tile_ * ldd_ * 4), int64_t{1}, int64_t{16});
    threads_ = static_cast<int>(std::clamp<int64_t>((p.V + kColPad - 1) / kColPad, 1, threads));
    t2_ = k_dwords(kernels_, chunk_);
    a_size_ = computed > 0 ? packed_a_dwords(h2_, tile_) : 0;
    bt_ = memory_.add<uint32_t>(computed > 0 ? h2_ * chunk_ : 0);
    b_ = memory_.add<uint32_t>(t2_ * ldd_);
    for (int i = 0; i < threads_; ++i)
      own_.push_back({memory_.add<uint32_t>(wave_tiles_ * a_size_),
                      memory_.add<float>(computed > 0 ? tile_ * kScoreStride : 0),
                      memory_.add<uint32_t>(packed_a_dwords(t2_, tile_)),
                      memory_.add<float>(wave_tiles_ * tile_ * ldd_), memory_.add<float>(wave_tiles_ * tile_)});
    memory_.allocate();
  }

  int num_threads() const { return threads_; }

  void run(int thread, int of) {
    const FlushDenormals flush;
    const int64_t num_units = (p_.V + kColPad - 1) / kColPad, step = wave_tiles_ * tile_;
    const Range units = split(num_units, thread, of);
    const int64_t begin = units.begin * kColPad, end = std::min(units.end * kColPad, p_.V);
    // All threads take the same number of waves: they pack together. The first part of a split is the largest.
    const int64_t num_waves = (split(num_units, 0, of).end * kColPad + step - 1) / step;
    for (int64_t wave = 0; wave < num_waves; ++wave)
      run_wave({std::min(begin + wave * step, end), std::min(begin + (wave + 1) * step, end)}, wave == 0, thread, of);
  }

 private:
  struct ThreadMemory {
    int64_t a, s, dz, acc, dbias;
  };

  void run_wave(Range columns, bool first, int thread, int of) {
    const ThreadMemory& mine = own_[thread];
    auto* acc = memory_.at<float>(mine.acc);
    auto* dbias = memory_.at<float>(mine.dbias);
    std::fill(dbias, dbias + wave_tiles_ * tile_, 0.0f);
    if (a_size_ > 0)
      for (int64_t v0 = columns.begin; v0 < columns.end; v0 += tile_) {
        const int64_t cols = std::min(tile_, columns.end - v0);
        kernels_.pack_a(rows_from(p_.weight, v0), cols, round_up(cols, kRowPad), p_.H, tile_,
                        memory_.at<uint32_t>(mine.a) + (v0 - columns.begin) / tile_ * a_size_);
      }
    for (const Range& rows : chunks_) {
      if (chunks_.size() > 1 || first) pack_rows(rows, thread, of);
      for (int64_t v0 = columns.begin; v0 < columns.end; v0 += tile_) {
        const int64_t cols = std::min(tile_, columns.end - v0), local = v0 - columns.begin;
        float* tile_dbias = out_.dbias == nullptr ? nullptr : dbias + local;
        if (rows.begin < out_.num_stashed) {
          restore(rows, v0, cols, mine, tile_dbias);
        } else {
          compute(rows, v0, cols, memory_.at<uint32_t>(mine.a) + local / tile_ * a_size_, mine, tile_dbias);
        }
        kernels_.gemm(memory_.at<uint32_t>(mine.dz), tile_, memory_.at<uint32_t>(b_), acc + local * ldd_, ldd_, cols,
                      p_.H, k_dwords(kernels_, rows.end - rows.begin), rows.begin > 0);
      }
    }
    if (columns.begin >= columns.end) return;
    kernels_.store_rows(acc, ldd_, columns.end - columns.begin, p_.H, p_.weight.type,
                        static_cast<char*>(out_.dweight) + columns.begin * p_.H * bytes_, p_.H);
    if (out_.dbias != nullptr)
      for (int64_t v = columns.begin; v < columns.end; ++v) out_.dbias[v] = dbias[v - columns.begin];
  }

  // In pieces of kColPad rows: panels of bt, and dwords of b, which is one thread's.
  void pack_rows(const Range& rows, int thread, int of) {
    const int64_t n = rows.end - rows.begin;
    barrier_.wait(of);  // nobody reads the last chunk any more
    if (rows.begin >= out_.num_stashed) {
      const Range panels = split((n + kColPad - 1) / kColPad, thread, of);
      const int64_t first = panels.begin * kColPad, last = std::min(panels.end * kColPad, n);
      if (first < last)
        kernels_.pack_bt(rows_from(p_.hidden, rows.begin + first), last - first, p_.H,
                         memory_.at<uint32_t>(bt_) + first * h2_);
    }
    if (thread == of - 1) kernels_.pack_b(rows_from(p_.hidden, rows.begin), n, p_.H, memory_.at<uint32_t>(b_));
    barrier_.wait(of);
  }

  // dz of a tile from the stash.
  void restore(const Range& rows, int64_t v0, int64_t cols, const ThreadMemory& mine, float* dbias) {
    const int64_t n = rows.end - rows.begin;
    auto* dz = memory_.at<uint32_t>(mine.dz);
    for (int64_t c = 0; c < cols; c += kColPad) {
      int part = 0;  // which thread stashed the unit
      while (member_columns(p_.V, part, out_.parts).end <= v0 + c) ++part;
      kernels_.unstash(out_.stash.at(rows.begin, v0 + c), out_.stash.type, n, std::min(kColPad, cols - c),
                       out_.coefficient + part * out_.num_stashed + rows.begin, dz + c * kKS, tile_, 0,
                       dbias == nullptr ? nullptr : dbias + c);
    }
    kernels_.set_targets(p_.targets.classes + rows.begin, out_.target_value + rows.begin, v0, cols, n, dz, tile_, 0,
                         dbias);
  }

  // dz of a tile from the logits, computed again.
  void compute(const Range& rows, int64_t v0, int64_t cols, const uint32_t* a, const ThreadMemory& mine, float* dbias) {
    auto* s = memory_.at<float>(mine.s);
    auto* dz = memory_.at<uint32_t>(mine.dz);
    for (int64_t at = rows.begin; at < rows.end; at += kScoreCols) {
      const int64_t c0 = at - rows.begin, width = std::min(kScoreCols, rows.end - at);
      kernels_.gemm(a, tile_, memory_.at<uint32_t>(bt_) + c0 * h2_, s, kScoreStride, cols, width, h2_, false);
      kernels_.gradient_tile(s, kScoreStride, cols, width, v0, p_.targets.from(at), p_.map,
                             out_.rows.from(at, p_.targets.count), dz, tile_, c0, dbias);
    }
  }

  const Problem& p_;
  const WeightGradient& out_;
  const TileKernels& kernels_;
  int64_t bytes_, h2_, ldd_, tile_, chunk_, t2_, wave_tiles_, a_size_;
  int threads_;
  int64_t bt_, b_;
  std::vector<Range> chunks_;
  std::vector<ThreadMemory> own_;
  Workspace memory_;
  Barrier barrier_;
};

}  // namespace

void weight_gradient(const Problem& problem, const WeightGradient& out, int num_threads) {
  Weight weight(problem, out, num_threads);
  parallel(weight.num_threads(), [&](int thread, int of) { weight.run(thread, of); });
}

}  // namespace tk::linear_cross_entropy
