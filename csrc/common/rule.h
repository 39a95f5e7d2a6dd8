// The update rules, for all that only has to know which one it is, and what that keeps of a parameter.
#pragma once
#include <array>
#include <stdexcept>
#include <string>

namespace cges {

enum class Rule { sgd, adamw };

constexpr int kMostStates = 2;

// What torch.optim calls the tensors that a rule keeps of a parameter; and its count of steps, where it has one.
struct RuleStates {
  const char* rule;
  int n;
  std::array<const char*, kMostStates> names;
  bool counts;
};
constexpr RuleStates kRuleStates[] = {{"sgd", 1, {"momentum_buffer"}, false},
                                      {"adamw", 2, {"exp_avg", "exp_avg_sq"}, true}};
constexpr const char* kStep = "step";

constexpr const RuleStates& states_of(Rule rule) { return kRuleStates[int(rule)]; }

inline Rule rule_named(const std::string& name) {
  for (const Rule rule : {Rule::sgd, Rule::adamw})
    if (name == states_of(rule).rule) return rule;
  throw std::invalid_argument("rule: expected 'sgd' or 'adamw', got '" + name + "'");
}

}  // namespace cges
