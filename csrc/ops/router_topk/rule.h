// How a router turns logits into weights: the constants of a call, on every device.
#pragma once

#include <tuple>

namespace tk {

enum class Score : int { softmax = 0, sigmoid = 1, sqrtsoftplus = 2, softmax_topk = 3 };

struct RouterRule {
  int top_k;
  Score score_function;
  bool renormalize;
  float scale, eps;
  int num_groups, topk_groups;
  int group_best;  // a group's score is the sum of so many of its best
  float masked_group_value;

  // As Python's Rule.compiled passes it.
  using Tuple = std::tuple<int, int, bool, float, float, int, int, int, float>;
  static RouterRule of(const Tuple& rule) {
    return std::apply([](int top_k, int score_function,
                         auto... rest) { return RouterRule{top_k, static_cast<Score>(score_function), rest...}; },
                      rule);
  }
};

}  // namespace tk
