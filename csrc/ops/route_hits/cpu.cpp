// route_hits on the CPU: expert counts of every layer, and which of the selected experts each token activates, in one
// pass over the routes.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "common/parallel.h"
#include "common/registry.h"

namespace tk {
namespace {

struct RouteHits {
  int64_t num_tokens, num_layers, top_k, num_experts;
  const int64_t* selected;  // [M, 2] (layer, expert), in range and distinct
  int64_t num_selected;
  int64_t* counts;  // [L, E], written
  uint8_t* hits;    // [N, ceil(M / 8)], written; bit m is bit 7 - m % 8 of byte m / 8
};

constexpr int64_t kBlock = 64;        // tokens whose routes stay in L1 while the layers take turns
constexpr int64_t kSlots = 64;        // selected experts of a group: one bit each of a word
constexpr int64_t kFlush = 1 << 24;   // tokens after which 32-bit bins go to the 64-bit counts
constexpr int kCopies = 4;            // histograms in turn: equal experts in a row do not wait for each other's store
constexpr int64_t kLeastPart = 4096;  // tokens below which a thread costs more than it saves

// Up to 64 selected experts of one layer that follow one another in a row of hits.
struct Group {
  std::vector<uint64_t> mask;  // by expert: its slot's bit, the highest one for slot 0; or 0
  int64_t first, slots;        // the place of slot 0 in a row of hits, and how many there are
};

// By layer. The first group of a layer is there even if nothing is selected in it.
std::vector<std::vector<Group>> groups_of(const RouteHits& p, int64_t bins) {
  std::vector<std::vector<Group>> layers(p.num_layers);
  for (auto& groups : layers) groups.push_back({std::vector<uint64_t>(bins, 0), 0, 0});
  for (int64_t m = 0; m < p.num_selected; ++m) {
    std::vector<Group>& groups = layers[p.selected[2 * m]];
    if (groups.back().slots == 0) groups.back().first = m;
    if (groups.back().slots == kSlots || groups.back().first + groups.back().slots != m) {
      groups.push_back({std::vector<uint64_t>(bins, 0), m, 0});
    }
    Group& group = groups.back();
    group.mask[p.selected[2 * m + 1]] = (uint64_t{1} << 63) >> group.slots;
    ++group.slots;
  }
  return layers;
}

// Index -> bin; all that is no expert shares the last bin.
template <typename Index>
inline uint64_t bin_of(Index index, uint64_t last) {
  if constexpr (sizeof(Index) == 1 && static_cast<Index>(-1) > Index{0}) {
    return index;  // there is a bin for every uint8
  } else {
    return std::min(static_cast<uint64_t>(static_cast<int64_t>(index)), last);
  }
}

// K is top_k, or 0 when it is known at run time only.
template <typename Index, int K>
void block(const Index* routes, int64_t tokens, int64_t stride, int64_t top_k, uint64_t last, uint32_t* bins,
           int64_t num_bins, const uint64_t* mask, uint64_t* found) {
  const int64_t k = K > 0 ? K : top_k;
  for (int64_t t = 0; t < tokens; ++t) {
    const Index* row = routes + t * stride;
    uint64_t word = 0;
    for (int64_t j = 0; j < k; ++j) {
      const uint64_t e = bin_of(row[j], last);
      ++bins[(j % kCopies) * num_bins + static_cast<int64_t>(e)];
      word |= mask[e];
    }
    found[t] = word;
  }
}

// Moves a block's words of slots to their place in rows of `words` words. No branch on data.
void place(const Group& group, const uint64_t* found, int64_t tokens, int64_t words, uint64_t* rows) {
  const int64_t word = group.first / 64, shift = group.first % 64;
  const bool spills = shift + group.slots > 64;
  for (int64_t t = 0; t < tokens; ++t) {
    uint64_t* row = rows + t * words + word;
    row[0] |= found[t] >> shift;
    if (spills) row[1] |= found[t] << (64 - shift);
  }
}

// Words, highest bit first, to bytes.
void store(const uint64_t* rows, int64_t tokens, int64_t words, int64_t bytes, uint8_t* out) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t w = 0; w < words; ++w) {
      uint64_t word = rows[t * words + w];
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
      word = __builtin_bswap64(word);
#endif
      std::memcpy(out + t * bytes + 8 * w, &word, std::min<int64_t>(8, bytes - 8 * w));
    }
  }
}

template <typename Index>
void run(const Index* routes, const RouteHits& p, int num_threads) {
  const bool byte = sizeof(Index) == 1 && static_cast<Index>(-1) > Index{0};
  const int64_t num_bins = byte ? std::max<int64_t>(256, p.num_experts + 1) : p.num_experts + 1;
  const std::vector<std::vector<Group>> layers = groups_of(p, num_bins);
  const int64_t bytes = (p.num_selected + 7) / 8, stride = p.num_layers * p.top_k;
  const int64_t useful = std::max<int64_t>(1, (p.num_tokens + kLeastPart - 1) / kLeastPart);
  const int threads = static_cast<int>(std::min<int64_t>(useful, num_threads));
  const auto kernel = p.top_k == 8 ? &block<Index, 8> : p.top_k == 4 ? &block<Index, 4> : &block<Index, 0>;
  std::vector<std::vector<int64_t>> partial(threads);
  parallel(threads, [&](int thread, int of) {
    const Range range = split(p.num_tokens, thread, of);
    std::vector<int64_t>& total = partial[thread];
    total.assign(p.num_layers * p.num_experts, 0);
    std::vector<uint32_t> bins(p.num_layers * kCopies * num_bins, 0);
    const auto flush = [&] {
      for (int64_t l = 0; l < p.num_layers; ++l) {
        for (int c = 0; c < kCopies; ++c) {
          const uint32_t* from = bins.data() + (l * kCopies + c) * num_bins;
          for (int64_t e = 0; e < p.num_experts; ++e) total[l * p.num_experts + e] += from[e];
        }
      }
      std::fill(bins.begin(), bins.end(), 0u);
    };
    uint64_t found[kBlock];
    const int64_t words = (bytes + 7) / 8;
    std::vector<uint64_t> rows(kBlock * words);
    std::vector<uint32_t> unused(kCopies * num_bins);  // further groups of a layer see tokens that are counted already
    int64_t since = 0;
    for (int64_t begin = range.begin; begin < range.end; begin += kBlock) {
      const int64_t tokens = std::min(kBlock, range.end - begin);
      std::fill(rows.begin(), rows.end(), uint64_t{0});
      for (int64_t l = 0; l < p.num_layers; ++l) {
        const Index* first = routes + begin * stride + l * p.top_k;
        uint32_t* mine = bins.data() + l * kCopies * num_bins;
        for (const Group& group : layers[l]) {
          kernel(first, tokens, stride, p.top_k, static_cast<uint64_t>(p.num_experts), mine, num_bins,
                 group.mask.data(), found);
          mine = unused.data();
          if (group.slots > 0) place(group, found, tokens, words, rows.data());
        }
      }
      store(rows.data(), tokens, words, bytes, p.hits + begin * bytes);
      since += tokens;
      if (since >= kFlush) {
        flush();
        since = 0;
      }
    }
    flush();
  });
  std::fill(p.counts, p.counts + p.num_layers * p.num_experts, int64_t{0});
  for (const std::vector<int64_t>& part : partial) {
    for (size_t i = 0; i < part.size(); ++i) p.counts[i] += part[i];
  }
}

void route_hits_cpu(uintptr_t routes, int index_bytes, bool index_signed, int64_t num_tokens, int64_t num_layers,
                    int64_t top_k, int64_t num_experts, uintptr_t selected, int64_t num_selected, uintptr_t counts,
                    uintptr_t hits, int num_threads) {
  const RouteHits p{num_tokens,
                    num_layers,
                    top_k,
                    num_experts,
                    reinterpret_cast<const int64_t*>(selected),
                    num_selected,
                    reinterpret_cast<int64_t*>(counts),
                    reinterpret_cast<uint8_t*>(hits)};
  switch (index_bytes * (index_signed ? 1 : -1)) {
    case 8:
      return run(reinterpret_cast<const int64_t*>(routes), p, num_threads);
    case 4:
      return run(reinterpret_cast<const int32_t*>(routes), p, num_threads);
    case 2:
      return run(reinterpret_cast<const int16_t*>(routes), p, num_threads);
    case 1:
      return run(reinterpret_cast<const int8_t*>(routes), p, num_threads);
    case -2:
      return run(reinterpret_cast<const uint16_t*>(routes), p, num_threads);
    case -1:
      return run(reinterpret_cast<const uint8_t*>(routes), p, num_threads);
    default:
      throw std::invalid_argument("route_hits_cpu: unsupported index type");
  }
}

void bind(pybind11::module_& module) {
  module.def("route_hits_cpu", &route_hits_cpu, pybind11::call_guard<pybind11::gil_scoped_release>());
}
TK_REGISTER(bind);

}  // namespace
}  // namespace tk
