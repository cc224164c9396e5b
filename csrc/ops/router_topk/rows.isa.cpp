// The row kernels of router_topk. Every score goes through whole vectors, so that equal logits get equal scores
// wherever they stand in a row.
#include "ops/router_topk/lanes.h"
#include "ops/router_topk/router.h"
#include "ops/router_topk/select.h"

namespace tk {
namespace TK_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int kRowsAhead = 8;

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

// The `count` largest of x [n], added from the largest on; x holds no NaN.
float sum_of_best(const float* x, int64_t n, int64_t count) {
  float sum = 0.0f, last = kInfinity;
  for (int64_t taken = 0; taken < count;) {
    float next = -kInfinity;
    int64_t equal = 0;  // numbers that are `next`
    for (int64_t i = 0; i < n; ++i) {
      if (x[i] >= last && taken > 0) continue;
      equal = x[i] > next ? 1 : equal + (x[i] == next);
      next = x[i] > next ? x[i] : next;
    }
    for (; equal > 0 && taken < count; --equal, ++taken) sum = taken == 0 ? next : sum + next;
    last = next;
  }
  return sum;
}

// What the experts are ranked by when there is a bias or groups, into scratch.choice, from scratch.scores.
void make_choice(const Router& p, const RouterRow& scratch, SelectMany many) {
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
    float sum = p.group_best == 1 ? first : first + second;
    if (p.group_best > 2 && !nan) sum = sum_of_best(choice + g * size, size, p.group_best);
    group_scores[g] = nan ? __builtin_nanf("") : sum;
  }
  if (p.topk_groups == p.num_groups) return;
  Selection groups{group_scores, scratch.ordered, scratch.candidates, scratch.candidate_index, scratch.groups, 0};
  select(&groups, 1, p.num_groups, p.topk_groups, many);
  int32_t* kept = scratch.ordered;
  for (int64_t g = 0; g < p.num_groups; ++g) kept[g] = 0;
  for (int64_t j = 0; j < p.topk_groups; ++j) kept[scratch.groups[j]] = 1;
  for (int64_t g = 0; g < p.num_groups; ++g) {
    if (kept[g]) continue;
    for (int64_t e = g * size; e < (g + 1) * size; ++e) choice[e] = p.masked_group_value;
  }
}

// ---- forward

// What is the same for every row of a call.
struct Way {
  bool by_logits;    // the choice is by the logits themselves
  bool over_chosen;  // the softmax over the chosen only: with eps, or chosen by more than the logits, its full sum
                     // matters; and where stats are asked for, though a processor that flushes takes eps for 0
  bool in_place;     // rows of logits are read where they are
};

// The weights of row t, from its choice. `usual`: by_logits and over_chosen, k fits into a vector, all in registers.
template <Type Out, bool usual>
TK_INLINE void weigh(const Router& p, const Way& way, const RouterRow& row, const float* z, const float stats[2],
                     int64_t t, int64_t limit) {
  const int64_t k = p.top_k;
  const auto mine = [k](int64_t j) { return iota() < static_cast<int32_t>(k - j); };
  const auto write = [&](int64_t j, vf value, vf weight) {
    store_part<Out>(p.weights, t * k + j, weight, k - j, limit);
    if (p.chosen != nullptr) store_part<Type::f32>(p.chosen, t * k + j, value, k - j, limit);
  };
  if constexpr (usual) {
    const vf picked = from_ordered(load<vi>(row.candidates));
    const vf e = exp_vec(picked - picked[0]);
    const vf value = e * (1.0f / sum_lanes(mine(0) ? e : vf{}));
    return write(0, value, value * (p.renormalize ? p.scale / (1.0f + p.eps) : p.scale));
  }
  float *picked = row.choice, *chosen = row.scores;  // [k]: those of all experts are not needed any more
  float top = -kInfinity;
  for (int64_t j = 0; j < k; ++j) {
    picked[j] = z[row.best[j]];
    top = picked[j] > top ? picked[j] : top;
  }
  if (way.over_chosen) {
    for (int64_t j = 0; j < k; j += kLanes) store(chosen + j, exp_vec(load<vf>(picked + j) - top));
  } else {
    scores(p.score_function, picked, k, stats, chosen);
  }
  vf sums = {};
  for (int64_t j = 0; j < k; j += kLanes) sums += mine(j) ? load<vf>(chosen + j) : vf{};
  const float sum = way.over_chosen ? 1.0f : sum_lanes(sums);
  const vf inverse = splat(way.over_chosen ? 1.0f / sum_lanes(sums) : 1.0f);
  // Each score over their sum: scale over it overflows where the sum is small.
  const vf denominator = splat(p.renormalize ? sum + p.eps : 1.0f);
  for (int64_t j = 0; j < k; j += kLanes) {
    const vf value = load<vf>(chosen + j) * inverse;
    write(j, value, value / denominator * p.scale);
  }
  if (p.stats != nullptr) {
    p.stats[t * 2] = stats[0];
    p.stats[t * 2 + 1] = stats[1];
  }
}

// The indices of row t, and what is counted and summed of them.
TK_INLINE void record(const Router& p, const int32_t* best, int64_t* counts, int64_t t, int64_t limit) {
  typedef int64_t Wide __attribute__((vector_size(kLanes * 8)));
  const int64_t k = p.top_k;
  const auto each = [k](auto&& f) {
    if (k != 8) {
      for (int64_t j = 0; j < k; ++j) f(j);
      return;
    }
#pragma GCC unroll 8
    for (int64_t j = 0; j < 8; ++j) f(j);
  };
  int64_t* indices = p.indices + t * k;
  if (k <= kLanes && t * k + kLanes <= limit) {  // what lands in the next row is overwritten by it
    store(indices, __builtin_convertvector(load<vi>(best), Wide));
  } else {
    for (int64_t j = 0; j < k; ++j) indices[j] = best[j];
  }
  if (p.counts != nullptr) {
    const int64_t counted = p.mask == nullptr || p.mask[t * p.mask_stride] ? 1 : 0;
    each([=](int64_t j) { counts[best[j]] += counted; });
  }
  if (p.score != nullptr) {
    float token_score = 0.0f;
    const float* table = p.table;
    each([=, &token_score](int64_t j) { token_score += table[best[j]]; });
    p.score[t * p.score_stride] += token_score;
  }
}

template <Type In, Type Out>
void forward(const Router& p, const Range& tokens, const RouterScratch& scratch) {
  const int64_t E = p.num_experts, k = p.top_k;
  const bool by_logits = p.given != nullptr || (p.bias == nullptr && p.num_groups == 1);
  const Way way = {by_logits,
                   p.score_function == Score::softmax_topk || (p.score_function == Score::softmax && by_logits &&
                                                               p.renormalize && p.eps == 0.0f && p.stats == nullptr),
                   In == Type::f32 && p.stride_e == 1 && E % 16 == 0};
  const int64_t row_bytes = p.stride_t * size_of(In), used_bytes = p.stride_e == 1 ? E * size_of(In) : 0;
  const bool usual = way.by_logits && way.over_chosen && k <= kLanes && p.given == nullptr;
  const int64_t limit = tokens.end * k;
  const float* z[kRouterRows];
  float stats[kRouterRows][2];
  Selection selections[kRouterRows];
  for (int64_t t0 = tokens.begin; t0 < tokens.end; t0 += kRouterRows) {
    const int rows = tokens.end - t0 < kRouterRows ? static_cast<int>(tokens.end - t0) : kRouterRows;
    for (int r = 0; r < rows; ++r) {
      const RouterRow& row = scratch.rows[r];
      const int64_t t = t0 + r;
      // The hardware's prefetch stops at every page, and a row may be as long as one.
      const char* ahead = static_cast<const char*>(p.logits) + (t + kRowsAhead) * row_bytes;
      for (int64_t i = 0; i < used_bytes; i += 64) __builtin_prefetch(ahead + i);
      z[r] = row.logits;
      if (way.in_place) {
        z[r] = static_cast<const float*>(p.logits) + t * p.stride_t;
      } else {
        load_row<In>(p, t, row.logits);
      }
      stats[r][0] = 0.0f, stats[r][1] = 1.0f;
      if (p.score_function == Score::softmax && !way.over_chosen) softmax_stats(z[r], E, stats[r]);
      if (!by_logits) {
        scores(p.score_function, z[r], E, stats[r], row.scores);
        make_choice(p, row, scratch.select_many);
      }
      selections[r] = {by_logits ? z[r] : row.choice, row.ordered, row.candidates, row.candidate_index, row.best, 0};
    }
    if (p.given == nullptr) {
      select(selections, rows, E, k, scratch.select_many);
    } else {
      for (int r = 0; r < rows; ++r)
        for (int64_t j = 0; j < k; ++j) scratch.rows[r].best[j] = static_cast<int32_t>(p.given[(t0 + r) * k + j]);
    }
    if (usual) {
      for (int r = 0; r < rows; ++r) weigh<Out, true>(p, way, scratch.rows[r], z[r], stats[r], t0 + r, limit);
    } else {
      for (int r = 0; r < rows; ++r) weigh<Out, false>(p, way, scratch.rows[r], z[r], stats[r], t0 + r, limit);
    }
    for (int r = 0; r < rows; ++r) record(p, scratch.rows[r].best, scratch.counts, t0 + r, limit);
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
