// record_routing_ on the CPU: expert counts and token scores from indices that the model chose.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "common/parallel.h"
#include "common/registry.h"

namespace tk {
namespace {

struct RecordRouting {
  int64_t num_tokens, top_k, num_experts;
  int64_t indices_stride_t, indices_stride_k;  // in elements
  int64_t counts_stride, mask_stride, score_stride;
  int64_t* counts;     // [E], added to
  const bool* mask;    // [T] or null: tokens that count
  const float* table;  // [E] contiguous, or null
  float* score;        // [T], added to, or null
};

// Counts the tokens of `range` in `bins` and adds their scores. Skipped entries go to bin E, of value 0 in `table`: no
// branch on data. K: top_k, with indices side by side; 0: whatever p says.
template <int K, typename Index>
void record_tokens(const Index* indices, const RecordRouting& p, const Range& range, const float* table,
                   int64_t* bins) {
  const int64_t skipped = p.num_experts;
  // In registers: the counts might alias p.
  const int64_t top_k = K > 0 ? K : p.top_k, stride = K > 0 ? 1 : p.indices_stride_k;
  for (int64_t t = range.begin; t < range.end; ++t) {
    const Index* row = indices + t * p.indices_stride_t;
    __builtin_prefetch(row + 128 * p.indices_stride_t);  // the hardware's prefetch stops at every page
    const int64_t counted = p.mask == nullptr || p.mask[t * p.mask_stride] ? 1 : 0;
    // Two histograms in turn: tokens in a row that choose the same expert do not wait for each other's store.
    int64_t* mine = bins + (t & 1) * (skipped + 1);
    float sum = 0.0f;
    for (int64_t j = 0; j < top_k; ++j) {
      // Negative and too large entries (identity experts, sentinels) both fail this one comparison.
      const auto index = static_cast<uint64_t>(static_cast<int64_t>(row[j * stride]));
      const uint64_t e = std::min(index, static_cast<uint64_t>(skipped));
      mine[e] += counted;
      sum += table[e];
    }
    if (p.score != nullptr) p.score[t * p.score_stride] += sum;
  }
}

// Returns how many entries of the table are NaN or infinite, and adds nothing when there are any. A token has one
// writer and its slots are summed in order, so scores do not depend on the number of threads.
template <typename Index>
int64_t record(const Index* indices, const RecordRouting& p, int num_threads) {
  constexpr int64_t kGrain = 4096;  // tokens below which a thread costs more than it saves
  const int64_t useful = (p.num_tokens + kGrain - 1) / kGrain;
  const int threads = static_cast<int>(useful < num_threads ? (useful < 1 ? 1 : useful) : num_threads);
  const int64_t skipped = p.num_experts;
  std::vector<float> table;
  if (p.table != nullptr) table.assign(p.table, p.table + skipped);
  table.resize(skipped + 1);
  const int64_t bad = std::count_if(table.begin(), table.end(), [](float x) { return !std::isfinite(x); });
  if (bad != 0) return bad;
  std::vector<std::vector<int64_t>> partial(threads);
  parallel(threads, [&](int thread, int of) {
    std::vector<int64_t> bins(2 * (skipped + 1), 0);
    // Most models choose 8: a loop of known length.
    const auto tokens = p.top_k == 8 && p.indices_stride_k == 1 ? &record_tokens<8, Index> : &record_tokens<0, Index>;
    tokens(indices, p, split(p.num_tokens, thread, of), table.data(), bins.data());
    std::vector<int64_t>& local = partial[thread];
    local.resize(skipped);
    for (int64_t e = 0; e < skipped; ++e) local[e] = bins[e] + bins[skipped + 1 + e];
  });
  for (const std::vector<int64_t>& local : partial) {
    for (size_t e = 0; e < local.size(); ++e) p.counts[e * p.counts_stride] += local[e];
  }
  return 0;
}

int64_t record_routing_cpu(uintptr_t indices, int index_bytes, bool index_signed, int64_t num_tokens, int64_t top_k,
                           int64_t indices_stride_t, int64_t indices_stride_k, uintptr_t counts, int64_t num_experts,
                           int64_t counts_stride, uintptr_t mask, int64_t mask_stride, uintptr_t table, uintptr_t score,
                           int64_t score_stride, int num_threads) {
  const RecordRouting p{num_tokens,
                        top_k,
                        num_experts,
                        indices_stride_t,
                        indices_stride_k,
                        counts_stride,
                        mask_stride,
                        score_stride,
                        reinterpret_cast<int64_t*>(counts),
                        reinterpret_cast<const bool*>(mask),
                        reinterpret_cast<const float*>(table),
                        reinterpret_cast<float*>(score)};
  const int code = index_bytes * (index_signed ? 1 : -1);
  switch (code) {
    case 8:
      return record(reinterpret_cast<const int64_t*>(indices), p, num_threads);
    case 4:
      return record(reinterpret_cast<const int32_t*>(indices), p, num_threads);
    case 2:
      return record(reinterpret_cast<const int16_t*>(indices), p, num_threads);
    case 1:
      return record(reinterpret_cast<const int8_t*>(indices), p, num_threads);
    case -2:
      return record(reinterpret_cast<const uint16_t*>(indices), p, num_threads);
    case -1:
      return record(reinterpret_cast<const uint8_t*>(indices), p, num_threads);
    default:
      throw std::invalid_argument("record_routing_cpu: unsupported index type");
  }
}

void bind(pybind11::module_& module) {
  module.def("record_routing_cpu", &record_routing_cpu, pybind11::call_guard<pybind11::gil_scoped_release>());
}
TK_REGISTER(bind);

}  // namespace
}  // namespace tk
