// The row kernels of router_topk. Every score goes through whole vectors, so that equal logits get equal scores
// wherever they stand in a row.
#include "ops/router_topk/lanes.h"
#include "ops/router_topk/router.h"

namespace tk {
namespace TK_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int kRowsAhead = 8;
constexpr int32_t kLowest = INT32_MIN;  // below every number's `ordered`

TK_INLINE int32_t min_lanes(vi v) {
#if defined(__AVX512F__)
  return _mm512_reduce_min_epi32(reinterpret_cast<__m512i>(v));
#else
  int32_t lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i + half] < lanes[i] ? lanes[i + half] : lanes[i];
  return lanes[0];
#endif
}

// Bit i: lane i of x is at least `low`.
TK_INLINE uint32_t at_least_mask(vi x, int32_t low) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epi32_mask(reinterpret_cast<__m512i>(x), _mm512_set1_epi32(low));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(x >= splat_int(low))));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(x >= splat_int(low))));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(x[i] >= low) << i;
  return mask;
#endif
}

// Integers in torch.sort's order of the numbers: NaN above all, -0 equal to +0.
TK_INLINE vi to_ordered(vf x) {
  const vi bits = reinterpret_cast<vi>(x + 0.0f);  // -0 becomes +0
  const vi ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  return x == x ? ordered : splat_int(INT32_MAX);
}

template <Type T>
void load_row(const Router& p, int64_t t, float* z) {
  const int64_t E = p.num_experts;
  const int size = size_of(T);
  const char* row = static_cast<const char*>(p.logits) + t * p.stride_t * size;
  int64_t e = 0;
  if (p.stride_e == 1) {
    for (; e + kLanes <= E; e += kLanes) store(z + e, load_as_float<T>(row, e));
  }
  for (; e < E; ++e) {
    char raw[kLanes * 4] = {};
    __builtin_memcpy(raw, row + e * p.stride_e * size, size);
    z[e] = load_as_float<T>(raw, 0)[0];
  }
  for (; e % kLanes != 0; ++e) z[e] = -kInfinity;  // the rest of the last vector
}

// ---- scores

// The row's maximum and sum of e^(z - maximum). A row with a NaN or +inf, or of -inf only, ends in a NaN sum.
void softmax_stats(const float* z, int64_t n, float stats[2]) {
  vf top = splat(-kInfinity), sum = {};
  for (int64_t e = 0; e < n; e += kLanes) {
    const vf x = load<vf>(z + e);
    top = x > top ? x : top;
  }
  const float maximum = max_lanes(top);
  for (int64_t e = 0; e < n; e += kLanes) {
    vf term = exp_vec(load<vf>(z + e) - maximum);
    if (e + kLanes > n) term = iota() < static_cast<int32_t>(n - e) ? term : vf{};
    sum += term;
  }
  stats[0] = maximum;
  stats[1] = sum_lanes(sum);
}

TK_INLINE vf square_root(vf x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#else
  vf out;
  for (int i = 0; i < kLanes; ++i) out[i] = __builtin_sqrtf(x[i]);
  return out;
#endif
}

template <Score S>
TK_INLINE vf score_of(vf z, const float stats[2]) {
  if constexpr (S == Score::softmax) {
    return exp_vec(z - stats[0]) / stats[1];
  } else if constexpr (S == Score::softmax_topk) {
    return z;
  } else {
    const vf e = exp_vec(z > vf{} ? -z : z);  // e^-|z|
    if constexpr (S == Score::sigmoid) return (z > vf{} ? splat(1.0f) : e) / (1.0f + e);
    // log(1 + e) = 2 atanh(e / (2 + e)), a series in at most 1/3.
    const vf s = e / (2.0f + e), s2 = s * s;
    vf series = splat(1.0f / 17.0f);
    for (int n = 15; n >= 1; n -= 2) series = series * s2 + 1.0f / static_cast<float>(n);
    return square_root((z > vf{} ? z : vf{}) + 2.0f * s * series);
  }
}

template <Score S>
void scores_with(const float* z, int64_t n, const float stats[2], float* out) {
  for (int64_t e = 0; e < n; e += kLanes) store(out + e, score_of<S>(load<vf>(z + e), stats));
}

void scores(Score function, const float* z, int64_t n, const float stats[2], float* out) {
  switch (function) {
    case Score::softmax:
      return scores_with<Score::softmax>(z, n, stats, out);
    case Score::sigmoid:
      return scores_with<Score::sigmoid>(z, n, stats, out);
    case Score::sqrtsoftplus:
      return scores_with<Score::sqrtsoftplus>(z, n, stats, out);
    case Score::softmax_topk:
      return scores_with<Score::softmax_topk>(z, n, stats, out);
  }
}

// ---- selection

// Ranks the candidates [n] (in the order of their indices) by counting what is before each, and puts the k first in
// order. Arrays are padded to whole vectors.
void rank(const int32_t* values, const int32_t* index, int64_t n, int64_t k, int32_t* best) {
  int32_t ranks[64 + kLanes], ordered[64 + kLanes];
  for (int64_t i = 0; i < n; i += kLanes) {
    const vi mine = load<vi>(values + i), lane = iota() + static_cast<int32_t>(i);
    vi before = {};
    for (int64_t j = 0; j < n; ++j) {
      // An equal one is before when its index is lower; no real value is INT32_MIN, so that the -1 does not wrap.
      before -= splat_int(values[j]) > mine + (lane > static_cast<int32_t>(j));
    }
    store(ranks + i, before);
  }
  for (int64_t i = 0; i < n; ++i) ordered[ranks[i]] = index[i];
  for (int64_t j = 0; j < k; ++j) best[j] = ordered[j];
}

// Insertion behind a threshold. `keys` are value and index; the arrays in scratch are not used.
void insert(const int32_t* values, const int32_t* index, int64_t n, int64_t k, int32_t* best) {
  int32_t top[16];
  int64_t have = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (have == k && values[i] <= top[k - 1]) continue;
    int64_t j = have < k ? have++ : k - 1;
    for (; j > 0 && top[j - 1] < values[i]; --j) {
      top[j] = top[j - 1];
      best[j] = best[j - 1];
    }
    top[j] = values[i];
    best[j] = index[i];
  }
}

// The indices of the k largest of x[n] into scratch.best, best first, the lowest index first among equals.
//
// The maxima of 16 interleaved slices of the row are 16 different elements, so their k-th largest bounds the k-th
// largest of the row from below. About k + 3 elements pass this bound; only they are ranked. No branch depends on the
// values but the number that passed.
void select(const float* x, int64_t n, int64_t k, const RouterScratch& scratch, int32_t* best) {
  constexpr int kSlices = 16, kVectors = kSlices / kLanes;
  int32_t* ordered = scratch.ordered;
  const int64_t padded = round_up(n, kSlices);
  vi maxima[kVectors];
  for (vi& maximum : maxima) maximum = splat_int(kLowest);
  for (int64_t e = 0; e < padded; e += kSlices) {
    for (int v = 0; v < kVectors; ++v) {
      vi value = to_ordered(load<vf>(x + e + v * kLanes));
      const int64_t left = n - e - v * kLanes;
      if (left < kLanes) value = iota() < static_cast<int32_t>(left < 0 ? 0 : left) ? value : splat_int(kLowest);
      store(ordered + e + v * kLanes, value);
      maxima[v] = value > maxima[v] ? value : maxima[v];
    }
  }
  if (k > kSlices) return scratch.select_many(ordered, n, k, best);

  int32_t slices[kSlices];
  for (int v = 0; v < kVectors; ++v) store(slices + v * kLanes, maxima[v]);
  int32_t bound = INT32_MAX;
  for (int v = 0; v < kVectors; ++v) {
    vi above = {};
    for (int j = 0; j < kSlices; ++j) above -= splat_int(slices[j]) > maxima[v];
    const vi kept = above < static_cast<int32_t>(k) ? maxima[v] : splat_int(INT32_MAX);
    const int32_t least = min_lanes(kept);
    bound = least < bound ? least : bound;
  }
  if (bound == kLowest) bound = kLowest + 1;  // keeps the padding out

  int64_t found = 0;
  for (int64_t e = 0; e < padded; e += kLanes) {
    const vi value = load<vi>(ordered + e);
    uint32_t mask = at_least_mask(value, bound);
#if defined(__AVX512F__)
    const __m512i index = _mm512_add_epi32(reinterpret_cast<__m512i>(iota()), _mm512_set1_epi32(static_cast<int>(e)));
    _mm512_storeu_si512(scratch.candidates + found,
                        _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), reinterpret_cast<__m512i>(value)));
    _mm512_storeu_si512(scratch.candidate_index + found,
                        _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), index));
    found += __builtin_popcount(mask);
#else
    for (; mask != 0; mask &= mask - 1) {
      const int lane = __builtin_ctz(mask);
      scratch.candidates[found] = ordered[e + lane];
      scratch.candidate_index[found++] = static_cast<int32_t>(e) + lane;
    }
#endif
  }
  const auto order = found <= 64 ? &rank : &insert;
  order(scratch.candidates, scratch.candidate_index, found, k, best);
}

// What the experts are ranked by when there is a bias or groups, into scratch.choice, from scratch.scores.
void make_choice(const Router& p, const RouterScratch& scratch) {
  const int64_t E = p.num_experts;
  float* choice = scratch.choice;
  for (int64_t e = 0; e < E; ++e) choice[e] = scratch.scores[e] + (p.bias == nullptr ? 0.0f : p.bias[e]);
  if (p.num_groups == 1) return;
  const int64_t size = E / p.num_groups;
  float* group_scores = scratch.scores;  // read for the last time above
  for (int64_t g = 0; g < p.num_groups; ++g) {
    float first = -kInfinity, second = -kInfinity;
    bool nan = false;
    for (int64_t i = g * size; i < (g + 1) * size; ++i) {
      const float x = choice[i], low = x < first ? x : first;
      nan |= x != x;
      second = low > second ? low : second;
      first = x > first ? x : first;
    }
    group_scores[g] = nan ? __builtin_nanf("") : p.sum_top2 ? first + second : first;
  }
  if (p.topk_groups == p.num_groups) return;
  select(group_scores, p.num_groups, p.topk_groups, scratch, scratch.groups);
  int32_t* kept = scratch.ordered;
  for (int64_t g = 0; g < p.num_groups; ++g) kept[g] = 0;
  for (int64_t j = 0; j < p.topk_groups; ++j) kept[scratch.groups[j]] = 1;
  for (int64_t g = 0; g < p.num_groups; ++g) {
    if (kept[g]) continue;
    for (int64_t e = g * size; e < (g + 1) * size; ++e) choice[e] = p.masked_group_value;
  }
}

// ---- forward

template <Type In, Type Out>
void forward(const Router& p, const Range& tokens, const RouterScratch& scratch) {
  const int64_t E = p.num_experts, k = p.top_k;
  const bool by_logits = p.bias == nullptr && p.num_groups == 1;
  // A renormalised softmax is the softmax over the chosen; with eps its full sum matters.
  const bool over_chosen = p.score_function == Score::softmax_topk ||
                           (p.score_function == Score::softmax && by_logits && p.renormalize && p.eps == 0.0f);
  const bool in_place = In == Type::f32 && p.stride_e == 1 && E % 16 == 0;
  int32_t* best = scratch.best;
  float* chosen = scratch.scores;  // [k]: the scores of all experts are not needed once the choice is made
  float stats[2] = {0.0f, 1.0f};
  const int64_t row_bytes = p.stride_t * size_of(In), used_bytes = p.stride_e == 1 ? E * size_of(In) : 0;
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    // The hardware's prefetch stops at every page, and a row may be as long as one.
    const char* ahead = static_cast<const char*>(p.logits) + (t + kRowsAhead) * row_bytes;
    for (int64_t i = 0; i < used_bytes; i += 64) __builtin_prefetch(ahead + i);
    const float* z = scratch.logits;
    if (in_place) {
      z = static_cast<const float*>(p.logits) + t * p.stride_t;
    } else {
      load_row<In>(p, t, scratch.logits);
    }
    if (p.score_function == Score::softmax && !over_chosen) softmax_stats(z, E, stats);
    if (!by_logits) {
      scores(p.score_function, z, E, stats, scratch.scores);
      make_choice(p, scratch);
    }
    select(by_logits ? z : scratch.choice, E, k, scratch, best);

    float sum = 0.0f;
    float* picked = scratch.choice;  // [k] logits
    float top = -kInfinity;
    for (int64_t j = 0; j < k; ++j) {
      picked[j] = z[best[j]];
      top = picked[j] > top ? picked[j] : top;
    }
    if (over_chosen) {
      vf total = {};
      for (int64_t j = 0; j < k; j += kLanes) {
        vf e = exp_vec(load<vf>(picked + j) - top);
        if (j + kLanes > k) e = iota() < static_cast<int32_t>(k - j) ? e : vf{};
        store(chosen + j, e);
        total += e;
      }
      const vf inverse = splat(1.0f / sum_lanes(total));
      for (int64_t j = 0; j < k; j += kLanes) store(chosen + j, load<vf>(chosen + j) * inverse);
      sum = 1.0f;
    } else {
      scores(p.score_function, picked, k, stats, chosen);
      for (int64_t j = 0; j < k; ++j) sum += chosen[j];
    }
    const vf factor = splat(p.renormalize ? p.scale / (sum + p.eps) : p.scale);
    for (int64_t j = 0; j < k; j += kLanes) {
      const vf value = load<vf>(chosen + j);
      store_part<Out>(p.weights, t * k + j, value * factor, k - j, tokens.end * k);
      if (p.chosen != nullptr) store_part<Type::f32>(p.chosen, t * k + j, value, k - j, tokens.end * k);
    }
    if (p.stats != nullptr) {
      p.stats[t * 2] = stats[0];
      p.stats[t * 2 + 1] = stats[1];
    }
    int64_t* indices = p.indices + t * k;
    for (int64_t j = 0; j < k; ++j) indices[j] = best[j];
    if (p.counts != nullptr && (p.mask == nullptr || p.mask[t * p.mask_stride])) {
      for (int64_t j = 0; j < k; ++j) ++scratch.counts[best[j]];
    }
    if (p.score != nullptr) {
      float token_score = 0.0f;
      for (int64_t j = 0; j < k; ++j) token_score += p.table[best[j]];
      p.score[t] = token_score;
    }
  }
}

template <Type In>
void forward_from(const Router& p, const Range& tokens, const RouterScratch& scratch) {
  switch (p.weights_type) {
    case Type::f32:
      return forward<In, Type::f32>(p, tokens, scratch);
    case Type::bf16:
      return forward<In, Type::bf16>(p, tokens, scratch);
    case Type::f16:
      return forward<In, Type::f16>(p, tokens, scratch);
  }
}

void forward_rows(const Router& p, const Range& tokens, const RouterScratch& scratch) {
  switch (p.logits_type) {
    case Type::f32:
      return forward_from<Type::f32>(p, tokens, scratch);
    case Type::bf16:
      return forward_from<Type::bf16>(p, tokens, scratch);
    case Type::f16:
      return forward_from<Type::f16>(p, tokens, scratch);
  }
}

}  // namespace

extern const RouterForward kRouterForward;
const RouterForward kRouterForward = &forward_rows;

}  // namespace TK_ISA
}  // namespace tk
