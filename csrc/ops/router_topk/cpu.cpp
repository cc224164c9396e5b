// router_topk on the CPU: one pass over each row of logits gives weights, indices, counts and the token's score; the
// backward reads the k chosen scores only, unless the gradient is dense.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "common/parallel.h"
#include "common/registry.h"

namespace tk {
namespace {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class Score : int { softmax = 0, sigmoid = 1, sqrtsoftplus = 2, softmax_topk = 3 };

// Strides in elements; null where absent. Outputs are contiguous.
struct Router {
  const void* logits;
  Dtype logits_dtype;
  int64_t num_tokens, num_experts, stride_t, stride_e, top_k;
  Score score_function;
  bool renormalize;
  float scale, eps;
  const float* bias;  // [E] contiguous
  int64_t num_groups, topk_groups;
  bool sum_top2;
  float masked_group_value;
  const bool* mask;
  int64_t mask_stride;
  const float* table;  // [E] contiguous
  void* weights;       // [T, k]
  Dtype weights_dtype;
  int64_t* indices;  // [T, k]
  float* chosen;     // [T, k]
  float* stats;      // [T, 2]
  int64_t* counts;   // [E], added to
  float* score;      // [T]
};

float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, body = h & 0x7fffu;
  uint32_t bits;
  if (body >= 0x7c00u) {
    bits = sign | 0x7f800000u | ((body & 0x3ffu) << 13);
  } else if (body >= 0x400u) {
    bits = sign | ((body << 13) + (112u << 23));
  } else {
    const float tiny = static_cast<float>(body) * 0x1p-24f;
    memcpy(&bits, &tiny, 4);
    bits |= sign;
  }
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

uint16_t float_to_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u, body = bits & 0x7fffffffu;
  if (body > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (body >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (body < 0x38800000u) {                                               // subnormal: the addition rounds
    float magnitude;
    memcpy(&magnitude, &body, 4);
    magnitude += 0.5f;  // the ulp of [0.5, 1) is 2^-24, the subnormal step of half
    uint32_t shifted;
    memcpy(&shifted, &magnitude, 4);
    return static_cast<uint16_t>(sign | (shifted - 0x3f000000u));
  }
  const uint32_t rounded = body + 0xfffu + ((body >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

float load(const void* p, Dtype dtype, int64_t at) {
  if (dtype == Dtype::f32) return static_cast<const float*>(p)[at];
  const uint16_t raw = static_cast<const uint16_t*>(p)[at];
  if (dtype == Dtype::f16) return half_to_float(raw);
  const uint32_t bits = static_cast<uint32_t>(raw) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

void store(void* p, Dtype dtype, int64_t at, float x) {
  if (dtype == Dtype::f32) {
    static_cast<float*>(p)[at] = x;
  } else if (dtype == Dtype::f16) {
    static_cast<uint16_t*>(p)[at] = float_to_half(x);
  } else {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    static_cast<uint16_t*>(p)[at] = static_cast<uint16_t>(x == x ? rounded : (bits >> 16) | 0x40u);
  }
}

// A total order as torch.sort has it: NaN above all, -0 equal to +0; among equals the lower index is larger.
uint64_t pack(float x, int64_t index) {
  x += 0.0f;  // -0 becomes +0
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t ordered = x == x ? bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u) : 0xffffffffu;
  return static_cast<uint64_t>(ordered) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}

int64_t index_of(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

// The k largest of values[n] into best[k], largest first. `keys` is scratch of n.
void select(const float* values, int64_t n, int64_t k, uint64_t* best, std::vector<uint64_t>& keys) {
  constexpr int64_t kInsertion = 32;
  if (k > kInsertion) {
    keys.resize(n);
    for (int64_t i = 0; i < n; ++i) keys[i] = pack(values[i], i);
    const auto descending = [](uint64_t a, uint64_t b) { return a > b; };
    std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), descending);
    std::sort(keys.begin(), keys.begin() + k, descending);
    std::copy(keys.begin(), keys.begin() + k, best);
    return;
  }
  // Insertion behind a threshold: after the first few values nearly all fail the one comparison.
  std::fill(best, best + k, uint64_t{0});  // below every key: the index part of a key is never 0
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t key = pack(values[i], i);
    if (key <= best[k - 1]) continue;
    int64_t j = k - 1;
    for (; j > 0 && best[j - 1] < key; --j) best[j] = best[j - 1];
    best[j] = key;
  }
}

float sigmoid(float z) {
  const float e = std::exp(-std::fabs(z));
  return z >= 0 ? 1.0f / (1.0f + e) : e / (1.0f + e);
}

float sqrtsoftplus(float z) { return std::sqrt(std::max(z, 0.0f) + std::log1p(std::exp(-std::fabs(z)))); }

struct Scratch {
  std::vector<float> logits, scores, choice, group_scores;
  std::vector<uint64_t> best, best_groups, keys;
  std::vector<uint8_t> kept;
};

// The row's maximum and sum of e^(z - maximum). A NaN or infinite row ends in a NaN sum.
void softmax_stats(const float* z, int64_t n, float stats[2]) {
  float top = -std::numeric_limits<float>::infinity();
  for (int64_t e = 0; e < n; ++e) top = std::max(top, z[e]);
  float sum = 0.0f;
  for (int64_t e = 0; e < n; ++e) sum += std::exp(z[e] - top);
  stats[0] = top;
  stats[1] = sum;
}

// The score of groups [G] of `size` neighbours, as torch computes it: a NaN wins.
void score_groups(const float* choice, int64_t num_groups, int64_t size, bool sum_top2, float* out) {
  for (int64_t g = 0; g < num_groups; ++g) {
    const float* group = choice + g * size;
    uint64_t first = 0, second = 0;
    for (int64_t i = 0; i < size; ++i) {
      const uint64_t key = pack(group[i], i);
      second = std::max(second, std::min(first, key));
      first = std::max(first, key);
    }
    out[g] = group[index_of(first)] + (sum_top2 ? group[index_of(second)] : 0.0f);
  }
}

// What the experts are ranked by when there is a bias or groups, into scratch.choice; `scores` [E].
void make_choice(const Router& p, const float* scores, Scratch& scratch) {
  const int64_t E = p.num_experts;
  float* choice = scratch.choice.data();
  for (int64_t e = 0; e < E; ++e) choice[e] = scores[e] + (p.bias == nullptr ? 0.0f : p.bias[e]);
  if (p.num_groups == 1) return;
  const int64_t size = E / p.num_groups;
  score_groups(choice, p.num_groups, size, p.sum_top2, scratch.group_scores.data());
  select(scratch.group_scores.data(), p.num_groups, p.topk_groups, scratch.best_groups.data(), scratch.keys);
  std::fill(scratch.kept.begin(), scratch.kept.end(), uint8_t{0});
  for (int64_t j = 0; j < p.topk_groups; ++j) scratch.kept[index_of(scratch.best_groups[j])] = 1;
  for (int64_t e = 0; e < E; ++e) {
    if (!scratch.kept[e / size]) choice[e] = p.masked_group_value;
  }
}

void route_row(const Router& p, int64_t t, Scratch& scratch, int64_t* counts) {
  const int64_t E = p.num_experts, k = p.top_k;
  const bool by_logits = p.bias == nullptr && p.num_groups == 1;
  // A renormalised softmax is the softmax over the chosen; with eps the full sum matters.
  const bool over_chosen = p.score_function == Score::softmax_topk ||
                           (p.score_function == Score::softmax && by_logits && p.renormalize && p.eps == 0.0f);
  float* z = scratch.logits.data();
  for (int64_t e = 0; e < E; ++e) z[e] = load(p.logits, p.logits_dtype, t * p.stride_t + e * p.stride_e);
  float stats[2] = {0.0f, 1.0f};
  if (p.score_function == Score::softmax && (!over_chosen || p.stats != nullptr)) softmax_stats(z, E, stats);
  const auto score_of = [&](float x) {
    switch (p.score_function) {
      case Score::softmax:
        return std::exp(x - stats[0]) / stats[1];
      case Score::sigmoid:
        return sigmoid(x);
      case Score::sqrtsoftplus:
        return sqrtsoftplus(x);
      default:
        return x;
    }
  };
  uint64_t* best = scratch.best.data();
  if (by_logits) {
    select(z, E, k, best, scratch.keys);
  } else {
    for (int64_t e = 0; e < E; ++e) scratch.scores[e] = score_of(z[e]);
    make_choice(p, scratch.scores.data(), scratch);
    select(scratch.choice.data(), E, k, best, scratch.keys);
  }

  float* weights = scratch.scores.data();  // [k]: the scores of all experts are not needed any more
  if (over_chosen) {
    float top = -std::numeric_limits<float>::infinity(), sum = 0.0f;
    for (int64_t j = 0; j < k; ++j) top = std::max(top, z[index_of(best[j])]);
    for (int64_t j = 0; j < k; ++j) sum += weights[j] = std::exp(z[index_of(best[j])] - top);
    for (int64_t j = 0; j < k; ++j) weights[j] /= sum;
  } else {
    for (int64_t j = 0; j < k; ++j) weights[j] = score_of(z[index_of(best[j])]);
  }
  if (p.chosen != nullptr) std::copy(weights, weights + k, p.chosen + t * k);
  if (p.stats != nullptr) std::copy(stats, stats + 2, p.stats + t * 2);
  float sum = 0.0f;
  for (int64_t j = 0; j < k; ++j) sum += weights[j];
  const float factor = p.renormalize ? p.scale / (sum + p.eps) : p.scale;
  const bool counted = counts != nullptr && (p.mask == nullptr || p.mask[t * p.mask_stride]);
  float token_score = 0.0f;
  for (int64_t j = 0; j < k; ++j) {
    const int64_t e = index_of(best[j]);
    p.indices[t * k + j] = e;
    store(p.weights, p.weights_dtype, t * k + j, weights[j] * factor);
    if (counted) ++counts[e];
    if (p.table != nullptr) token_score += p.table[e];
  }
  if (p.score != nullptr) p.score[t] = token_score;
}

int useful_threads(int64_t num_tokens, int64_t num_experts, int num_threads) {
  constexpr int64_t kGrain = 32768;  // logits below which a thread costs more than it saves
  return static_cast<int>(std::clamp<int64_t>(num_tokens * num_experts / kGrain, 1, num_threads));
}

void forward(const Router& p, int num_threads) {
  const int threads = useful_threads(p.num_tokens, p.num_experts, num_threads);
  std::vector<std::vector<int64_t>> partial(threads);
  parallel(threads, [&](int thread, int of) {
    Scratch scratch;
    for (auto* row : {&scratch.logits, &scratch.scores, &scratch.choice}) row->resize(p.num_experts);
    scratch.best.resize(p.top_k);
    scratch.group_scores.resize(p.num_groups);
    scratch.best_groups.resize(p.topk_groups);
    scratch.kept.resize(p.num_groups);
    if (p.counts != nullptr) partial[thread].assign(p.num_experts, 0);
    const Range range = split(p.num_tokens, thread, of);
    for (int64_t t = range.begin; t < range.end; ++t)
      route_row(p, t, scratch, p.counts == nullptr ? nullptr : partial[thread].data());
  });
  for (const std::vector<int64_t>& local : partial) {
    for (size_t e = 0; e < local.size(); ++e) p.counts[e] += local[e];
  }
}

struct RouterGradient {
  const void* grad_weights;
  Dtype grad_dtype;
  int64_t grad_stride_t, grad_stride_k;
  const void* logits;  // null unless the gradient is dense
  Dtype dtype;         // of the logits and their gradient
  int64_t stride_t, stride_e;
  const int64_t* indices;  // [T, k] contiguous
  const float* chosen;     // [T, k] contiguous
  const float* stats;      // [T, 2] contiguous
  int64_t num_tokens, top_k, num_experts;
  Score score_function;
  bool renormalize;
  float scale, eps;
  void* gradient;  // [T, E] contiguous
};

// d score / d logit from the score; for the softmaxes without the part that runs along all of them.
float slope(Score function, float s) {
  switch (function) {
    case Score::sigmoid:
      return s * (1.0f - s);
    case Score::sqrtsoftplus:  // s^2 = log(1 + e^z)
      return s == 0.0f ? 0.0f : -std::expm1(-s * s) / (2.0f * s);
    default:
      return s;
  }
}

void gradient_row(const RouterGradient& p, int64_t t, float* row) {
  const int64_t E = p.num_experts, k = p.top_k;
  const float* chosen = p.chosen + t * k;
  const int64_t* indices = p.indices + t * k;
  const auto upstream = [&](int64_t j) {
    return load(p.grad_weights, p.grad_dtype, t * p.grad_stride_t + j * p.grad_stride_k);
  };
  float sum = 0.0f, weighted = 0.0f;
  for (int64_t j = 0; j < k; ++j) {
    sum += chosen[j];
    weighted += upstream(j) * chosen[j];
  }
  const float denominator = p.renormalize ? sum + p.eps : 1.0f;
  const float factor = p.scale / denominator;
  const float mean = p.renormalize ? weighted / denominator : 0.0f;
  // sum_j s_j d s_j without the cancellation.
  const float along = factor * weighted * (p.renormalize ? p.eps / denominator : 1.0f);
  if (p.logits != nullptr) {
    const float top = p.stats[t * 2], inverse = along / p.stats[t * 2 + 1];
    for (int64_t e = 0; e < E; ++e)
      row[e] = -std::exp(load(p.logits, p.dtype, t * p.stride_t + e * p.stride_e) - top) * inverse;
  } else {
    std::fill(row, row + E, 0.0f);
  }
  const float back = p.score_function == Score::softmax_topk ? along : 0.0f;
  for (int64_t j = 0; j < k; ++j)
    row[indices[j]] += slope(p.score_function, chosen[j]) * (factor * (upstream(j) - mean) - back);
  for (int64_t e = 0; e < E; ++e) store(p.gradient, p.dtype, t * E + e, row[e]);
}

void backward(const RouterGradient& p, int num_threads) {
  const int threads = useful_threads(p.num_tokens, p.num_experts, num_threads);
  parallel(threads, [&](int thread, int of) {
    std::vector<float> row(p.num_experts);
    const Range range = split(p.num_tokens, thread, of);
    for (int64_t t = range.begin; t < range.end; ++t) gradient_row(p, t, row.data());
  });
}

void router_topk_cpu(uintptr_t logits, int logits_dtype, int64_t num_tokens, int64_t num_experts, int64_t stride_t,
                     int64_t stride_e, int64_t top_k, int score_function, bool renormalize, float scale, float eps,
                     uintptr_t bias, int64_t num_groups, int64_t topk_groups, bool sum_top2, float masked_group_value,
                     uintptr_t mask, int64_t mask_stride, uintptr_t table, uintptr_t weights, int weights_dtype,
                     uintptr_t indices, uintptr_t chosen, uintptr_t stats, uintptr_t counts, uintptr_t score,
                     int num_threads) {
  forward({reinterpret_cast<const void*>(logits),
           static_cast<Dtype>(logits_dtype),
           num_tokens,
           num_experts,
           stride_t,
           stride_e,
           top_k,
           static_cast<Score>(score_function),
           renormalize,
           scale,
           eps,
           reinterpret_cast<const float*>(bias),
           num_groups,
           topk_groups,
           sum_top2,
           masked_group_value,
           reinterpret_cast<const bool*>(mask),
           mask_stride,
           reinterpret_cast<const float*>(table),
           reinterpret_cast<void*>(weights),
           static_cast<Dtype>(weights_dtype),
           reinterpret_cast<int64_t*>(indices),
           reinterpret_cast<float*>(chosen),
           reinterpret_cast<float*>(stats),
           reinterpret_cast<int64_t*>(counts),
           reinterpret_cast<float*>(score)},
          num_threads);
}

void router_topk_backward_cpu(uintptr_t grad_weights, int grad_dtype, int64_t grad_stride_t, int64_t grad_stride_k,
                              uintptr_t logits, int dtype, int64_t stride_t, int64_t stride_e, uintptr_t indices,
                              uintptr_t chosen, uintptr_t stats, int64_t num_tokens, int64_t top_k, int64_t num_experts,
                              int score_function, bool renormalize, float scale, float eps, uintptr_t gradient,
                              int num_threads) {
  backward({reinterpret_cast<const void*>(grad_weights), static_cast<Dtype>(grad_dtype), grad_stride_t, grad_stride_k,
            reinterpret_cast<const void*>(logits), static_cast<Dtype>(dtype), stride_t, stride_e,
            reinterpret_cast<const int64_t*>(indices), reinterpret_cast<const float*>(chosen),
            reinterpret_cast<const float*>(stats), num_tokens, top_k, num_experts, static_cast<Score>(score_function),
            renormalize, scale, eps, reinterpret_cast<void*>(gradient)},
           num_threads);
}

void bind(pybind11::module_& module) {
  module.def("router_topk_cpu", &router_topk_cpu, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("router_topk_backward_cpu", &router_topk_backward_cpu,
             pybind11::call_guard<pybind11::gil_scoped_release>());
}
TK_REGISTER(bind);

}  // namespace
}  // namespace tk
