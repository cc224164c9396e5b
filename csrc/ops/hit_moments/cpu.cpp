// Sums over rows of packed hit bits: a score per row, weighted first and second moments of the bits, and the order that
// brings equal rows together. Work follows the bits that are set, not the width of a row.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/parallel.h"
#include "common/registry.h"

namespace tk {
namespace {

constexpr int64_t kLeastPart = 4096;             // rows below which a thread costs more than it saves
constexpr int64_t kSumBytes = int64_t{1} << 29;  // of the threads' own second moments, together

int useful_threads(int64_t rows, int num_threads) {
  return static_cast<int>(std::min<int64_t>(std::max<int64_t>(1, (rows + kLeastPart - 1) / kLeastPart), num_threads));
}

// Bytes [at, at + 8) of a row as a number whose highest bit is the first one; 0 beyond the row's end.
inline uint64_t word_at(const uint8_t* row, int64_t at, int64_t bytes) {
  uint64_t word = 0;
  if (at + 8 <= bytes) {
    std::memcpy(&word, row + at, 8);
  } else if (at < bytes) {
    std::memcpy(&word, row + at, bytes - at);
  }
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  word = __builtin_bswap64(word);
#endif
  return word;
}

// Calls visit(m) for every set bit of a row, in order; what is set beyond the row's bits is no bit of it.
template <typename F>
inline void for_bits(const uint8_t* row, int64_t num_bits, F&& visit) {
  const int64_t bytes = (num_bits + 7) / 8;
  for (int64_t at = 0; at < bytes; at += 8) {
    const int64_t left = num_bits - 8 * at;
    uint64_t word = word_at(row, at, bytes);
    if (left < 64) word &= ~(~uint64_t{0} >> left);
    while (word != 0) {
      const int lead = __builtin_clzll(word);
      visit(8 * at + lead);
      word &= ~(uint64_t{1} << (63 - lead));
    }
  }
}

void hit_scores_cpu(uintptr_t hits_at, int64_t rows, int64_t bytes, uintptr_t values_at, uintptr_t out_at,
                    int num_threads) {
  const auto* hits = reinterpret_cast<const uint8_t*>(hits_at);
  const auto* values = reinterpret_cast<const double*>(values_at);  // [8 * bytes], 0 for spare bits
  auto* out = reinterpret_cast<double*>(out_at);
  parallel(useful_threads(rows, num_threads), [&](int thread, int of) {
    const Range range = split(rows, thread, of);
    for (int64_t n = range.begin; n < range.end; ++n) {
      double sum = 0;
      for_bits(hits + n * bytes, 8 * bytes, [&](int64_t m) { sum += values[m]; });
      out[n] = sum;
    }
  });
}

// Each thread sums its own rows in order and the parts are added in order: the result depends on the number of threads
// and on nothing else.
template <typename F>
void summed(int threads, int64_t size, double* out, F&& body) {
  std::vector<std::vector<double>> partial(threads);
  parallel(threads, [&](int thread, int of) {
    partial[thread].assign(size, 0.0);
    body(thread, of, partial[thread].data());
  });
  std::fill(out, out + size, 0.0);
  for (const std::vector<double>& part : partial) {
    for (size_t i = 0; i < part.size(); ++i) out[i] += part[i];
  }
}

void hit_moments_cpu(uintptr_t hits_at, int64_t rows, int64_t bytes, uintptr_t weights_at, int64_t num_bits, int order,
                     uintptr_t out_at, int num_threads) {
  const auto* hits = reinterpret_cast<const uint8_t*>(hits_at);
  const auto* weights = reinterpret_cast<const double*>(weights_at);
  auto* out = reinterpret_cast<double*>(out_at);
  int threads = useful_threads(rows, num_threads);
  if (order == 1) {
    return summed(threads, num_bits, out, [&](int thread, int of, double* sums) {
      const Range range = split(rows, thread, of);
      for (int64_t n = range.begin; n < range.end; ++n) {
        const double weight = weights[n];
        for_bits(hits + n * bytes, num_bits, [&](int64_t m) { sums[m] += weight; });
      }
    });
  }
  const int64_t size = num_bits * num_bits;
  threads = static_cast<int>(std::clamp<int64_t>(kSumBytes / std::max<int64_t>(1, 8 * size), 1, threads));
  summed(threads, size, out, [&](int thread, int of, double* sums) {
    std::vector<int64_t> set(num_bits);
    const Range range = split(rows, thread, of);
    for (int64_t n = range.begin; n < range.end; ++n) {
      const double weight = weights[n];
      if (weight == 0) continue;
      int64_t count = 0;
      for_bits(hits + n * bytes, num_bits, [&](int64_t m) { set[count++] = m; });
      for (int64_t i = 0; i < count; ++i) {  // the upper triangle
        double* row = sums + set[i] * num_bits;
        for (int64_t j = i; j < count; ++j) row[set[j]] += weight;
      }
    }
  });
  for (int64_t i = 0; i < num_bits; ++i) {
    for (int64_t j = 0; j < i; ++j) out[i * num_bits + j] = out[j * num_bits + i];
  }
}

struct Key {
  uint64_t first;  // the first eight bytes of the row
  int64_t index;
};

void hit_order_cpu(uintptr_t hits_at, int64_t rows, int64_t bytes, uintptr_t out_at, int num_threads) {
  const auto* hits = reinterpret_cast<const uint8_t*>(hits_at);
  auto* out = reinterpret_cast<int64_t*>(out_at);
  std::vector<Key> keys(rows);
  const auto less = [&](const Key& a, const Key& b) {
    if (a.first != b.first) return a.first < b.first;
    if (bytes > 8) {
      const int rest = std::memcmp(hits + a.index * bytes + 8, hits + b.index * bytes + 8, bytes - 8);
      if (rest != 0) return rest < 0;
    }
    return a.index < b.index;  // a total order: the same result for any number of threads
  };
  const int parts = useful_threads(rows, num_threads);
  parallel(parts, [&](int thread, int of) {
    // The runtime may grant fewer threads than there are parts.
    for (int part = thread; part < parts; part += of) {
      const Range range = split(rows, part, parts);
      for (int64_t n = range.begin; n < range.end; ++n) keys[n] = {word_at(hits + n * bytes, 0, bytes), n};
      std::sort(keys.begin() + range.begin, keys.begin() + range.end, less);
    }
  });
  for (int width = 1; width < parts; width *= 2) {
    parallel(num_threads, [&](int thread, int of) {
      for (int low = 2 * width * thread; low + width < parts; low += 2 * width * of) {
        const int64_t begin = split(rows, low, parts).begin, middle = split(rows, low + width, parts).begin;
        const int64_t end = split(rows, std::min(low + 2 * width, parts) - 1, parts).end;
        std::inplace_merge(keys.begin() + begin, keys.begin() + middle, keys.begin() + end, less);
      }
    });
  }
  for (int64_t n = 0; n < rows; ++n) out[n] = keys[n].index;
}

void bind(pybind11::module_& module) {
  const auto release = pybind11::call_guard<pybind11::gil_scoped_release>();
  module.def("hit_scores_cpu", &hit_scores_cpu, release);
  module.def("hit_moments_cpu", &hit_moments_cpu, release);
  module.def("hit_order_cpu", &hit_order_cpu, release);
}
TK_REGISTER(bind);

}  // namespace
}  // namespace tk
