// The gradient of the head for linear_kl.
#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/streaming.h"
#include "common/workspace.h"
#include "ops/linear_kl/problem.h"

namespace tk::linear_kl {
namespace {

// dweight = sum_t g_t d kl_t / d W with known normalisers, transposed as in linear_cross_entropy: three products. As
// there, threads share the packings of a chunk of rows, and keep the gradients of a wave of tiles while chunks pass.
class Weight {
 public:
  Weight(const Problem& p, const Known& known, void* dweight, int threads)
      : p_(p),
        known_(known),
        dweight_(dweight),
        kernels_(tile_kernels(p.policy.weight.type)),
        ref_kernels_(tile_kernels(p.ref.weight.type)),
        H_(p.policy.width),
        R_(p.ref.width) {
    constexpr int64_t kBytes = int64_t{8} << 20;
    h2_ = k_dwords(kernels_, H_);
    r2_ = k_dwords(ref_kernels_, R_);
    ldd_ = c_stride(H_);
    chunk_ = std::min(round_up(p.num_rows, kColPad),
                      std::clamp(kBytes / (4 * (2 * h2_ + r2_)) / kColPad * kColPad, kColPad, int64_t{1024}));
    t2_ = k_dwords(kernels_, chunk_);
    wave_tiles_ = chunk_ >= p.num_rows ? 1 : std::clamp(kBytes / (kTile * ldd_ * 4), int64_t{1}, int64_t{16});
    threads_ = static_cast<int>(std::clamp<int64_t>((p.V + kRowPad - 1) / kRowPad, 1, threads));
    bt_ = memory_.add<uint32_t>(h2_ * chunk_);
    ref_bt_ = memory_.add<uint32_t>(r2_ * chunk_);
    b_ = memory_.add<uint32_t>(t2_ * ldd_);
    for (int i = 0; i < threads_; ++i)
      own_.push_back({memory_.add<uint32_t>(packed_a_dwords(h2_, kTile)),
                      memory_.add<uint32_t>(packed_a_dwords(r2_, kTile)), memory_.add<float>(kTile * kScoreStride),
                      memory_.add<float>(kTile * kScoreStride), memory_.add<uint32_t>(packed_a_dwords(t2_, kTile)),
                      memory_.add<float>(wave_tiles_ * kTile * ldd_)});
    memory_.allocate();
  }

  int num_threads() const { return threads_; }

  void run(int thread, int of) {
    const FlushDenormals flush;
    const int64_t num_units = (p_.V + kRowPad - 1) / kRowPad, step = wave_tiles_ * kTile;
    const Range units = split(num_units, thread, of);
    const int64_t begin = units.begin * kRowPad, end = std::min(units.end * kRowPad, p_.V);
    // All threads take the same number of waves: they pack together. The first part of a split is the largest.
    const int64_t num_waves = (split(num_units, 0, of).end * kRowPad + step - 1) / step;
    for (int64_t wave = 0; wave < num_waves; ++wave) {
      const Range columns{std::min(begin + wave * step, end), std::min(begin + (wave + 1) * step, end)};
      auto* acc = memory_.at<float>(own_[thread].acc);
      for (int64_t t0 = 0; t0 < p_.num_rows; t0 += chunk_) {
        const int64_t n = std::min(chunk_, p_.num_rows - t0);
        if (chunk_ < p_.num_rows || wave == 0) pack_rows(t0, n, thread, of);
        for (int64_t v0 = columns.begin; v0 < columns.end; v0 += kTile)
          tile(t0, n, v0, std::min(kTile, columns.end - v0), acc + (v0 - columns.begin) * ldd_, own_[thread]);
      }
      const Type type = p_.policy.weight.type;
      if (columns.begin < columns.end)
        kernels_.store_rows(acc, ldd_, columns.end - columns.begin, H_, type,
                            static_cast<char*>(dweight_) + columns.begin * H_ * bytes_of(type), H_);
    }
  }

 private:
  static constexpr int64_t kTile = 256;  // columns of the vocabulary
  struct ThreadMemory {
    int64_t a, ref_a, s, ref_s, dz, acc;
  };

  void pack_rows(int64_t t0, int64_t n, int thread, int of) {
    barrier_.wait(of);  // nobody reads the last chunk any more
    const Rows rows = rows_from(p_.policy.hidden, t0);
    for (int item = thread; item < 3; item += of) {
      if (item == 0) kernels_.pack_bt(rows, n, H_, memory_.at<uint32_t>(bt_));
      if (item == 1) kernels_.pack_b(rows, n, H_, memory_.at<uint32_t>(b_));
      if (item == 2) ref_kernels_.pack_bt(rows_from(p_.ref.hidden, t0), n, R_, memory_.at<uint32_t>(ref_bt_));
    }
    barrier_.wait(of);
  }

  void tile(int64_t t0, int64_t n, int64_t v0, int64_t cols, float* acc, const ThreadMemory& mine) {
    auto* a = memory_.at<uint32_t>(mine.a);
    auto* ref_a = memory_.at<uint32_t>(mine.ref_a);
    auto* s = memory_.at<float>(mine.s);
    auto* ref_s = memory_.at<float>(mine.ref_s);
    auto* dz = memory_.at<uint32_t>(mine.dz);
    kernels_.pack_a(rows_from(p_.policy.weight, v0), cols, round_up(cols, kRowPad), H_, kTile, a);
    ref_kernels_.pack_a(rows_from(p_.ref.weight, v0), cols, round_up(cols, kRowPad), R_, kTile, ref_a);
    for (int64_t c0 = 0; c0 < n; c0 += kScoreCols) {
      const int64_t at = t0 + c0, width = std::min(kScoreCols, n - c0);
      kernels_.gemm(a, kTile, memory_.at<uint32_t>(bt_) + c0 * h2_, s, kScoreStride, cols, width, h2_, false);
      ref_kernels_.gemm(ref_a, kTile, memory_.at<uint32_t>(ref_bt_) + c0 * r2_, ref_s, kScoreStride, cols, width, r2_,
                        false);
      kernels_.kl_gradient_tile({s,
                                 ref_s,
                                 kScoreStride,
                                 cols,
                                 width,
                                 p_.map,
                                 v0,
                                 {known_.lse.high + at, known_.lse.low + at},
                                 {known_.ref_lse.high + at, known_.ref_lse.low + at},
                                 known_.pivot + at,
                                 known_.difference + at,
                                 known_.g + at,
                                 dz,
                                 kTile,
                                 c0});
    }
    kernels_.gemm(dz, kTile, memory_.at<uint32_t>(b_), acc, ldd_, cols, H_, k_dwords(kernels_, n), t0 > 0);
  }

  const Problem& p_;
  const Known& known_;
  void* dweight_;
  const TileKernels& kernels_;
  const TileKernels& ref_kernels_;
  int64_t H_, R_, h2_, r2_, ldd_, chunk_, t2_, wave_tiles_;
  int threads_;
  int64_t bt_, ref_bt_, b_;
  std::vector<ThreadMemory> own_;
  Workspace memory_;
  Barrier barrier_;
};

}  // namespace

void weight_gradient(const Problem& problem, const Known& known, void* dweight, int num_threads) {
  Weight weight(problem, known, dweight, num_threads);
  parallel(weight.num_threads(), [&](int thread, int of) { weight.run(thread, of); });
}

}  // namespace tk::linear_kl
