// The row kernel of router_topk's gradient.
#include "ops/router_topk/lanes.h"
#include "ops/router_topk/router.h"

namespace tk {
namespace TK_ISA {
namespace {

constexpr int kRowsAhead = 8;
constexpr int64_t kLeastPage = 4096;

template <Type T>
TK_INLINE float load_one(const void* p, int64_t at) {
  if constexpr (T == Type::f32) return static_cast<const float*>(p)[at];
  const uint16_t raw = static_cast<const uint16_t*>(p)[at];
  if constexpr (T == Type::f16) return half_to_float(raw);
  const uint32_t bits = static_cast<uint32_t>(raw) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

// d log score / d logit from the score; for the softmaxes without the part that runs along all of them.
TK_INLINE vf slope(Score function, vf s) {
  if (function == Score::sigmoid) return 1.0f - s;
  if (function != Score::sqrtsoftplus) return splat(1.0f);
  // s^2 = log(1 + e^z), so ds/dz = (1 - e^(-s^2)) / (2 s); near 0 by its series.
  const vf x = s * s;
  vf series = splat(1.0f);
  for (int n = 9; n >= 2; --n) series = 1.0f - series * x * (1.0f / static_cast<float>(n));
  const vf small = 0.5f * series, large = (1.0f - exp_vec(-x)) / (2.0f * x);
  return x < splat(0.35f) ? small : large;
}

// e^x as exactly as a T can tell.
template <Type T>
TK_INLINE vf exp_to(vf x) {
  return T == Type::bf16 ? exp_for_bf16(x) : exp_vec(x);
}

// out[e] = -e^(z[e] - top) * factor
template <Type T>
void dense_row(const RouterGradient& p, int64_t t, float top, float factor, char* out) {
  const int size = size_of(T);
  const char* row = static_cast<const char*>(p.logits) + t * p.stride_t * size;
  int64_t e = 0;
  if (p.stride_e == 1) {
    // The hardware's prefetch stops at every page.
    const char* ahead = row + kRowsAhead * p.stride_t * size;
    for (int64_t i = 0; i < p.num_experts * size; i += 64) __builtin_prefetch(ahead + i);
    for (; e + kLanes <= p.num_experts; e += kLanes)
      store_float<T>(out, e, exp_to<T>(load_as_float<T>(row, e) - top) * -factor);
  }
  for (; e < p.num_experts; e += kLanes) {
    const int64_t left = p.num_experts - e;
    vf z = {};
    for (int i = 0; i < kLanes && i < left; ++i) z[i] = load_one<T>(row, (e + i) * p.stride_e);
    store_part<T>(out, e, exp_to<T>(z - top) * -factor, left, p.num_experts);
  }
}

// A call to memset for every row costs more than the stores.
TK_INLINE void clear(char* out, size_t bytes) {
  size_t i = 0;
  for (; i + sizeof(vf) <= bytes; i += sizeof(vf)) store(out + i, vf{});
  for (; i < bytes; ++i) out[i] = 0;
}

// What eps has of a denominator. V: float, or a vector of rows beside each other.
template <typename V>
TK_INLINE V share_of_eps(const RouterGradient& p, V denominator) {
  return p.eps == 0.0f ? V{} : p.eps / denominator;
}

// Whether the mean of the upstream gradients is corrected by that of what they differ from it. Where one score is
// nearly the sum of all, its own difference would be what rounding left of both: an error seen in a T of 32 bits only.
template <Type T>
TK_INLINE bool corrects_mean() {
  return T == Type::f32;
}

template <Type T>
TK_INLINE void scatter(const int64_t* indices, const char* values, int64_t count, char* out) {
#pragma GCC unroll 8
  for (int64_t i = 0; i < count; ++i)
    __builtin_memcpy(out + indices[i] * size_of(T), values + i * size_of(T), size_of(T));
}

// Neighbouring lanes of a vector that a row of k takes: rows lie close where k is a power of two, and else have one
// each.
TK_INLINE int64_t lanes_of_row(int64_t k) { return (k & (k - 1)) == 0 ? k : kLanes; }

// Every lane gets the sum of its row.
TK_INLINE vf sum_rows(vf v, int64_t lanes) {
  if (lanes > 1) v += __builtin_shuffle(v, iota() ^ 1);
  if (lanes > 2) v += __builtin_shuffle(v, iota() ^ 2);
  if constexpr (kLanes > 4)
    if (lanes > 4) v += __builtin_shuffle(v, iota() ^ 4);
  if constexpr (kLanes > 8)
    if (lanes > 8) v += __builtin_shuffle(v, iota() ^ 8);
  return v;
}

// The vector of rows that begins at element `at` of an array of `size`, zeros in lanes that no row has.
template <Type T>
TK_INLINE vf load_rows(const void* p, int64_t at, int64_t k, int64_t lanes, int64_t size) {
  if (lanes == k) return load_as_float<T>(p, at);
  const vf v = load_part<T>(p, at, size);
  return iota() < static_cast<int32_t>(k) ? v : vf{};
}

constexpr int kVectors = 8;

// `count` vectors' rows from t on, as many as a vector holds in each. First all arithmetic, then all writing: what
// waits in one row does not hold up the next. K: top_k, or 0 for one that is not known here.
template <Type T, Type G, int K>
TK_INLINE void gradient_of_vectors(const RouterGradient& p, int64_t t, int64_t count, char* out) {
  const int64_t k = K > 0 ? K : p.top_k, lanes = lanes_of_row(k), size = p.num_tokens * k;
  const int64_t rows = count * (kLanes / lanes), row_bytes = p.num_experts * size_of(T);
  const bool softmax = p.score_function == Score::softmax_topk || p.logits != nullptr;
  char values[kVectors * kLanes * 4];
  float along[kVectors * kLanes];  // sum_j s_j d s_j without the cancellation
  for (int64_t v = 0; v < count; ++v) {
    const int64_t at = (t + v * (kLanes / lanes)) * k;
    const vf s = load_rows<Type::f32>(p.chosen, at, k, lanes, size);
    const vf upstream = load_rows<G>(p.grad_weights, at, k, lanes, size);
    // Each score over the denominator: one over it overflows where the sum is small.
    const vf denominator = p.renormalize ? sum_rows(s, lanes) + p.eps : splat(1.0f);
    const vf share = p.renormalize ? s / denominator : s;
    vf mean = sum_rows(share * upstream, lanes), difference = upstream, product = mean;
    if (p.renormalize) {
      const vf of_eps = share_of_eps(p, denominator);
      difference -= mean;
      if (corrects_mean<T>()) {
        const vf correction = sum_rows(share * difference, lanes) - mean * of_eps;
        difference -= correction;
        mean += correction;
      }
      product = mean * of_eps;
    }
    product *= p.scale;
    const vf back = softmax ? s * product : vf{};
    store_float<T>(values, v * kLanes, slope(p.score_function, s) * (share * difference * p.scale - back));
    store(along + v * kLanes, product);
  }
  if (p.logits == nullptr) {
    clear(out, static_cast<size_t>(rows * row_bytes));
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      const float* stats = p.stats + (t + r) * 2;
      dense_row<T>(p, t + r, stats[0], along[r * lanes] / stats[1], out + r * row_bytes);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    scatter<T>(p.indices + (t + r) * k, values + r * lanes * size_of(T), k, out + r * row_bytes);
}

// The gradient of row t into out [E].
template <Type T, Type G>
void gradient_row(const RouterGradient& p, int64_t t, float* upstream_row, char* out) {
  const int64_t k = p.top_k, chosen_size = p.num_tokens * k;
  const bool contiguous = p.grad_stride_k == 1 && p.grad_stride_t == k;
  const bool softmax = p.score_function == Score::softmax_topk || p.logits != nullptr;
  if (!contiguous) {
    for (int64_t j = 0; j < k; ++j)
      upstream_row[j] = load_one<G>(p.grad_weights, t * p.grad_stride_t + j * p.grad_stride_k);
  }
  const auto upstream = [&](int64_t j) {
    return contiguous ? load_part<G>(p.grad_weights, t * k + j, chosen_size) : load<vf>(upstream_row + j);
  };
  const auto scores = [&](int64_t j) { return load_part<Type::f32>(p.chosen, t * k + j, chosen_size); };
  const auto sum = [&](auto&& term) {
    vf total = {};
    for (int64_t j = 0; j < k; j += kLanes) {
      const auto mine = iota() < static_cast<int32_t>(k - j);  // the rest belongs to the next row
      total += mine ? term(j) : vf{};
    }
    return sum_lanes(total);
  };
  // As gradient_of_vectors, where the numbers have the same names.
  const float denominator = p.renormalize ? sum(scores) + p.eps : 1.0f;
  const auto share = [&](int64_t j) { return scores(j) / denominator; };
  const float mean = sum([&](int64_t j) { return share(j) * upstream(j); });
  float shift = 0.0f, correction = 0.0f, product = mean;
  if (p.renormalize) {
    const float of_eps = share_of_eps(p, denominator);
    shift = mean;
    if (corrects_mean<T>())
      correction = sum([&](int64_t j) { return share(j) * (upstream(j) - mean); }) - mean * of_eps;
    product = (mean + correction) * of_eps;
  }
  product *= p.scale;
  if (p.logits != nullptr) {
    dense_row<T>(p, t, p.stats[t * 2], product / p.stats[t * 2 + 1], out);
  } else {
    clear(out, static_cast<size_t>(p.num_experts) * size_of(T));
  }
  for (int64_t j = 0; j < k; j += kLanes) {
    const vf s = scores(j), difference = upstream(j) - shift - correction, back = softmax ? s * product : vf{};
    char values[kLanes * 4];
    store_float<T>(values, 0, slope(p.score_function, s) * (share(j) * difference * p.scale - back));
    scatter<T>(p.indices + t * k + j, values, k - j < kLanes ? k - j : kLanes, out);
  }
}

template <Type T, Type G>
void gradient_rows(const RouterGradient& p, const Range& tokens, const RouterGradientScratch& scratch) {
  const int64_t row_bytes = p.num_experts * size_of(T);
  const bool vectors = p.top_k <= kLanes && p.grad_stride_k == 1 && p.grad_stride_t == p.top_k;
  const int64_t rows_of_vector = vectors ? kLanes / lanes_of_row(p.top_k) : 1;
  const auto make = [&](int64_t t, int64_t end, char* out) {
    while (t < end) {
      const int64_t count = vectors ? (end - t) / rows_of_vector : 0;
      int64_t rows = 1;
      if (count == 0) {
        gradient_row<T, G>(p, t, scratch.upstream, out);
      } else {
        rows = (count < kVectors ? count : kVectors) * rows_of_vector;
        const auto make_vectors = p.top_k == 8 ? gradient_of_vectors<T, G, 8> : gradient_of_vectors<T, G, 0>;
        make_vectors(p, t, rows / rows_of_vector, out);
      }
      t += rows;
      out += rows * row_bytes;
    }
  };
  char* gradient = static_cast<char*>(p.gradient);
  if (scratch.block_rows == 0) return make(tokens.begin, tokens.end, gradient + tokens.begin * row_bytes);
  for (int64_t t = tokens.begin; t < tokens.end; t += scratch.block_rows) {
    const int64_t left = tokens.end - t, rows = left < scratch.block_rows ? left : scratch.block_rows;
    // The address of the next block's pages is looked up while this one is computed: 100 of 370 us for 8 MiB.
    for (int64_t i = 0; i < rows * row_bytes; i += kLeastPage)
      __builtin_prefetch(gradient + (t + rows) * row_bytes + i, 1);
    make(t, t + rows, scratch.block);
    stream(gradient + t * row_bytes, scratch.block, rows * row_bytes);
  }
  stream_fence();
}

template <Type T>
void gradient_to(const RouterGradient& p, const Range& tokens, const RouterGradientScratch& scratch) {
  switch (p.grad_type) {
    case Type::f32:
      return gradient_rows<T, Type::f32>(p, tokens, scratch);
    case Type::bf16:
      return gradient_rows<T, Type::bf16>(p, tokens, scratch);
    case Type::f16:
      return gradient_rows<T, Type::f16>(p, tokens, scratch);
  }
}

void backward_rows(const RouterGradient& p, const Range& tokens, const RouterGradientScratch& scratch) {
  switch (p.type) {
    case Type::f32:
      return gradient_to<Type::f32>(p, tokens, scratch);
    case Type::bf16:
      return gradient_to<Type::bf16>(p, tokens, scratch);
    case Type::f16:
      return gradient_to<Type::f16>(p, tokens, scratch);
  }
}

}  // namespace

extern const RouterBackward kRouterBackward;
const RouterBackward kRouterBackward = &backward_rows;

}  // namespace TK_ISA
}  // namespace tk
