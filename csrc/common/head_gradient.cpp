#include "common/head_gradient.h"

#include <algorithm>

namespace tk {

HeadGradient::HeadGradient(const Shape& shape, int num_threads) : shape_(shape), kernels_(tile_kernels(shape.type)) {
  h2_ = k_dwords(kernels_, shape.H);
  ldd_ = c_stride(shape.H);
  // Columns of the vocabulary. With few rows the fp32 gradient of the tile is what must stay in the cache.
  tile_ =
      shape.num_rows > 256 ? 256 : std::clamp((int64_t{1} << 17) / shape.H / kColPad * kColPad, kColPad, int64_t{256});
  // Where there are more rows than one chunk, a thread keeps the gradients of several tiles (a wave) while the chunks
  // pass, so that packing a chunk again for every wave costs little.
  constexpr int64_t kBytes = int64_t{8} << 20;
  chunk_ = std::min(round_up(shape.num_rows, kColPad),
                    std::clamp(kBytes / (4 * shape.shared_dwords) / kColPad * kColPad, kColPad, int64_t{1024}));
  for (int64_t t0 = 0; t0 < shape.num_rows; t0 = chunks_.back().end)
    chunks_.push_back({t0, std::min(t0 + chunk_, t0 < shape.boundary ? shape.boundary : shape.num_rows)});
  wave_tiles_ = chunks_.size() == 1 ? 1 : std::clamp(kBytes / (tile_ * ldd_ * 4), int64_t{1}, int64_t{16});
  threads_ = static_cast<int>(std::clamp<int64_t>((shape.V + kColPad - 1) / kColPad, 1, num_threads));
  const int64_t t2 = k_dwords(kernels_, chunk_);
  b_ = memory_.add<uint32_t>(t2 * ldd_);
  for (int i = 0; i < threads_; ++i)
    own_.push_back({memory_.add<uint32_t>(packed_a_dwords(t2, tile_)), memory_.add<float>(wave_tiles_ * tile_ * ldd_),
                    memory_.add<float>(wave_tiles_ * tile_)});
}

void HeadGradient::form() {
  parallel(threads_, [&](int thread, int of) { run(thread, of); });
}

void HeadGradient::run(int thread, int of) {
  const FlushDenormals flush;
  const int64_t num_units = (shape_.V + kColPad - 1) / kColPad, step = wave_tiles_ * tile_;
  const Range units = split(num_units, thread, of);
  const int64_t begin = units.begin * kColPad, end = std::min(units.end * kColPad, shape_.V);
  // All threads take the same number of waves: they pack together. The first part of a split is the largest.
  const int64_t num_waves = (split(num_units, 0, of).end * kColPad + step - 1) / step;
  for (int64_t wave = 0; wave < num_waves; ++wave)
    run_wave({std::min(begin + wave * step, end), std::min(begin + (wave + 1) * step, end)}, wave == 0, thread, of);
}

void HeadGradient::run_wave(const Range& columns, bool first, int thread, int of) {
  const ThreadMemory& mine = own_[thread];
  auto* dz = memory_.at<uint32_t>(mine.dz);
  auto* acc = memory_.at<float>(mine.acc);
  auto* dbias = memory_.at<float>(mine.dbias);
  const auto tile_at = [&](int64_t v0) {
    return Tile{v0, std::min(tile_, columns.end - v0), thread, (v0 - columns.begin) / tile_};
  };
  std::fill(dbias, dbias + wave_tiles_ * tile_, 0.0f);
  for (int64_t v0 = columns.begin; v0 < columns.end; v0 += tile_) begin_wave(tile_at(v0));
  for (const Range& rows : chunks_) {
    const int64_t n = rows.end - rows.begin;
    if (chunks_.size() > 1 || first) {
      barrier_.wait(of);  // nobody reads the last chunk any more
      pack_chunk(rows, thread, of);
      if (thread == of - 1)
        kernels_.pack_b(rows_from(shape_.hidden, rows.begin), n, shape_.H, memory_.at<uint32_t>(b_));
      barrier_.wait(of);
    }
    for (int64_t v0 = columns.begin; v0 < columns.end; v0 += tile_) {
      const Tile tile = tile_at(v0);
      gradient_of(rows, tile, dz, shape_.dbias == nullptr ? nullptr : dbias + tile.local * tile_);
      kernels_.gemm(dz, tile_, memory_.at<uint32_t>(b_), acc + tile.local * tile_ * ldd_, ldd_, tile.cols, shape_.H,
                    k_dwords(kernels_, n), rows.begin > 0);
    }
  }
  if (columns.begin >= columns.end) return;
  kernels_.store_rows(acc, ldd_, columns.end - columns.begin, shape_.H, shape_.type,
                      static_cast<char*>(shape_.dweight) + columns.begin * shape_.H * bytes_of(shape_.type), shape_.H);
  if (shape_.dbias != nullptr) std::copy_n(dbias, columns.end - columns.begin, shape_.dbias + columns.begin);
}

}  // namespace tk
