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

namespace tk {
namespace {

struct Problem {
  Rows hidden, weight;
  int64_t num_rows, H, V;  // rows that count
  const int64_t* target;   // [num_rows]; outside [0, V): no class, which takes part in nothing
  LogitMap map;
};

struct Outputs {
  float *logp, *lse;  // [T]
  float* lse_low;     // [num_rows] what rounding lse lost, or null
  void* dhidden;      // [T, H] contiguous in hidden's type, or null
};

class Forward {
 public:
  Forward(const Problem& p, const Outputs& out, int threads)
      : p_(p),
        out_(out),
        kernels_(tile_kernels(p.weight.type)),
        plan_(make_plan(p.num_rows, p.V, out.dhidden == nullptr ? 0 : round_up(p.H, kColPad) * 4,
                        k_dwords(kernels_, p.H) * (out.dhidden == nullptr ? 4 : 8), threads)) {
    const bool gradient = out_.dhidden != nullptr;
    h2_ = k_dwords(kernels_, p_.H);
    ldd_ = round_up(p_.H, kColPad);
    const int64_t rows = plan_.block_rows;
    cols_ = plan_.tile_cols;
    c2_ = k_dwords(kernels_, cols_);
    for (int g = 0; g < plan_.groups; ++g) {
      groups_.push_back(
          {memory_.add<uint32_t>(packed_a_dwords(h2_, rows)), memory_.add<float>(rows), memory_.add<float>(rows)});
      for (int m = 0; m < plan_.members; ++m) {
        threads_.push_back({memory_.add<uint32_t>(h2_ * cols_), memory_.add<uint32_t>(gradient ? c2_ * ldd_ : 0),
                            memory_.add<float>(plan_.tile_rows * kScoreCols),
                            memory_.add<uint32_t>(gradient ? packed_a_dwords(c2_, plan_.tile_rows) : 0),
                            memory_.add<float>(gradient ? rows * ldd_ : 0), memory_.add<float>(rows),
                            memory_.add<float>(rows)});
      }
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
      tile(r0, rows, v0, std::min(cols_, range.end - v0), v0 == range.begin, shared, mine);
    barrier.wait(members);

    const Range merged = split(rows, member, members);
    for (int64_t r = merged.begin; r < merged.end; ++r) merge(r0, r, group, members);
    barrier.wait(members);
  }

  void tile(int64_t r0, int64_t rows, int64_t v0, int64_t cols, bool first, const GroupMemory& shared,
            const ThreadMemory& mine) {
    const bool gradient = out_.dhidden != nullptr;
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
        kernels_.gemm(a + t0 * kKS, block_rows, bt + c0 * h2_, s, kScoreCols, n, width, h2_, false);
        kernels_.softmax_tile(s, kScoreCols, n, width, v0 + c0, p_.target + r0 + t0, p_.map, state, packed_p,
                              plan_.tile_rows, c0, accumulated, ldd_);
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
      beta[used] = static_cast<float>(factor);
      parts[used++] = memory_.at<float>(part.d) + r * ldd_;
    }
    const double own = std::exp(logit - top), total = own + others;
    const int64_t at = p_.hidden.index ? p_.hidden.index[r0 + r] : r0 + r;
    const double lse = top + std::log(total);
    out_.lse[at] = static_cast<float>(lse);
    if (out_.lse_low != nullptr) out_.lse_low[r0 + r] = static_cast<float>(lse - out_.lse[at]);
    out_.logp[at] = static_cast<float>(own > 0 ? -std::log1p(others / own) : logit - lse);
    if (out_.dhidden == nullptr) return;
    const double scale = p_.map.scale;
    for (int i = 0; i < used; ++i) beta[i] = static_cast<float>(-scale * beta[i] / total);
    const float alpha = static_cast<float>(scale * others / total * memory_.at<float>(shared.target_slope)[r]);
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
  const TileKernels& kernels_;
  Plan plan_;
  int64_t h2_, ldd_, cols_, c2_;
  std::vector<GroupMemory> groups_;
  std::vector<ThreadMemory> threads_;
  Workspace memory_;
  std::vector<Barrier> barriers_;
};

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
                 double softcap, double scale, uintptr_t logp, uintptr_t lse, uintptr_t lse_low, uintptr_t dhidden,
                 int num_threads) {
  if (num_rows == 0) return;
  const Problem p = problem_of(hidden, weight, type, num_rows, H, V, hidden_stride, weight_stride, index, bias, target,
                               softcap, scale);
  const Outputs out{reinterpret_cast<float*>(logp), reinterpret_cast<float*>(lse), reinterpret_cast<float*>(lse_low),
                    reinterpret_cast<void*>(dhidden)};
  Forward forward(p, out, std::clamp(num_threads, 1, Forward::kMaxParts));
  parallel(forward.num_threads(), [&](int thread, int of) { forward.run(thread, of); });
}

// dweight[v] = sum_t g_t d logp_t / d W[v] with known lse: the logits are recomputed transposed, [v, t], so that a
// tile of dweight stays in cache while all rows pass by, and needs no transposition of p.
void backward_weight_cpu(uintptr_t hidden, uintptr_t weight, int type, int64_t num_rows, int64_t H, int64_t V,
                         int64_t hidden_stride, int64_t weight_stride, uintptr_t index, uintptr_t bias,
                         uintptr_t target, double softcap, double scale, uintptr_t lse, uintptr_t lse_low,
                         uintptr_t row_grad, uintptr_t dweight, uintptr_t dbias, int num_threads) {
  const Problem p = problem_of(hidden, weight, type, num_rows, H, V, hidden_stride, weight_stride, index, bias, target,
                               softcap, scale);
  const TileKernels& kernels = tile_kernels(p.weight.type);
  // Columns of the vocabulary. With few rows the fp32 gradient of the tile is what must stay in the cache.
  const int64_t tile =
      num_rows > 256 ? 256 : std::clamp<int64_t>((int64_t{1} << 17) / H / kRowPad * kRowPad, kRowPad, 256);
  const int64_t h2 = k_dwords(kernels, H), ldd = round_up(H, kColPad);
  // Rows whose two packings all threads share. Where there are more rows than one chunk, a thread keeps the gradients
  // of several tiles (a wave) while the chunks pass, so that packing a chunk again for every wave costs little.
  constexpr int64_t kBytes = int64_t{8} << 20;
  const int64_t chunk =
      std::min(round_up(num_rows, kColPad), std::clamp<int64_t>(kBytes / (8 * h2) / kColPad * kColPad, kColPad, 1024));
  const int64_t num_chunks = (num_rows + chunk - 1) / chunk, t2 = k_dwords(kernels, chunk);
  const int64_t wave_tiles = num_chunks == 1 ? 1 : std::clamp<int64_t>(kBytes / (tile * ldd * 4), 1, 16);
  const int threads = static_cast<int>(std::clamp<int64_t>((V + kRowPad - 1) / kRowPad, 1, num_threads));
  const int64_t a_size = packed_a_dwords(h2, tile);
  Workspace memory;
  const int64_t bt_at = memory.add<uint32_t>(h2 * chunk), b_at = memory.add<uint32_t>(t2 * ldd);
  struct ThreadMemory {
    int64_t a, s, dz, acc, dbias;
  };
  std::vector<ThreadMemory> own;
  for (int i = 0; i < threads; ++i)
    own.push_back({memory.add<uint32_t>(wave_tiles * a_size), memory.add<float>(tile * kScoreCols),
                   memory.add<uint32_t>(packed_a_dwords(t2, tile)), memory.add<float>(wave_tiles * tile * ldd),
                   memory.add<float>(wave_tiles * tile)});
  memory.allocate();
  Barrier barrier;
  const int64_t bytes = bytes_of(p.weight.type), num_units = (V + kRowPad - 1) / kRowPad;
  parallel(threads, [&](int thread, int of) {
    const FlushDenormals flush;
    const ThreadMemory& mine = own[thread];
    auto* bt = memory.at<uint32_t>(bt_at);
    auto* b = memory.at<uint32_t>(b_at);
    auto* s = memory.at<float>(mine.s);
    auto* dz = memory.at<uint32_t>(mine.dz);
    auto* acc = memory.at<float>(mine.acc);
    auto* bias_sums = memory.at<float>(mine.dbias);
    const Range units = split(num_units, thread, of);
    const int64_t begin = units.begin * kRowPad, end = std::min(units.end * kRowPad, V), step = wave_tiles * tile;
    // All threads take the same number of waves: they pack together. The first part of a split is the largest.
    const int64_t num_waves = (split(num_units, 0, of).end * kRowPad + step - 1) / step;
    for (int64_t wave = 0; wave < num_waves; ++wave) {
      const int64_t wave_begin = begin + wave * step, wave_end = std::min(wave_begin + step, end);
      for (int64_t v0 = wave_begin; v0 < wave_end; v0 += tile) {
        const int64_t cols = std::min(tile, wave_end - v0);
        kernels.pack_a(rows_from(p.weight, v0), cols, round_up(cols, kRowPad), H, tile,
                       memory.at<uint32_t>(mine.a) + (v0 - wave_begin) / tile * a_size);
      }
      std::fill(bias_sums, bias_sums + step, 0.0f);
      for (int64_t i = 0; i < num_chunks; ++i) {
        const int64_t t0 = i * chunk, n = std::min(chunk, num_rows - t0);
        if (num_chunks > 1 || wave == 0) {
          barrier.wait(of);  // nobody reads the last chunk any more
          // In pieces of kColPad rows: panels of bt, and dwords of b, which is one thread's.
          const Range panels = split((n + kColPad - 1) / kColPad, thread, of);
          const int64_t first = panels.begin * kColPad, last = std::min(panels.end * kColPad, n);
          if (first < last) kernels.pack_bt(rows_from(p.hidden, t0 + first), last - first, H, bt + first * h2);
          if (thread == of - 1) kernels.pack_b(rows_from(p.hidden, t0), n, H, b);
          barrier.wait(of);
        }
        for (int64_t v0 = wave_begin; v0 < wave_end; v0 += tile) {
          const int64_t cols = std::min(tile, wave_end - v0), local = v0 - wave_begin;
          const auto* a = memory.at<uint32_t>(mine.a) + local / tile * a_size;
          for (int64_t c0 = 0; c0 < n; c0 += kScoreCols) {
            const int64_t at = t0 + c0, width = std::min(kScoreCols, n - c0);
            kernels.gemm(a, tile, bt + c0 * h2, s, kScoreCols, cols, width, h2, false);
            const LogSumExp sums{reinterpret_cast<const float*>(lse) + at,
                                 reinterpret_cast<const float*>(lse_low) + at};
            kernels.gradient_tile(s, kScoreCols, cols, width, v0, p.target + at, p.map, sums,
                                  reinterpret_cast<const float*>(row_grad) + at, dz, tile, c0, bias_sums + local);
          }
          kernels.gemm(dz, tile, b, acc + local * ldd, ldd, cols, H, k_dwords(kernels, n), i > 0);
        }
      }
      if (wave_begin >= wave_end) continue;
      kernels.store_rows(acc, ldd, wave_end - wave_begin, H, p.weight.type,
                         reinterpret_cast<char*>(dweight) + wave_begin * H * bytes, H);
      if (dbias != 0)
        std::copy(bias_sums, bias_sums + (wave_end - wave_begin), reinterpret_cast<float*>(dbias) + wave_begin);
    }
  });
}

void bind(pybind11::module_& module) {
  module.def("linear_cross_entropy_forward_cpu", &forward_cpu, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("linear_cross_entropy_backward_weight_cpu", &backward_weight_cpu,
             pybind11::call_guard<pybind11::gil_scoped_release>());
}
TK_REGISTER(bind);

}  // namespace
}  // namespace tk
