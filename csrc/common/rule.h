// The names of the update rules and of their states. StepPlan, the bindings and the executors' host sides use
// this; they need no formula of a rule.
#pragma once
#include <array>
#include <stdexcept>
#include <string>

namespace cges {

enum class Rule { sgd, adamw };

constexpr int kMostStates = 2;  // the most states that a rule keeps

// The n state tensors that a rule keeps for each parameter, by their keys in torch.optim's state. `counts`:
// the rule also keeps a count of the parameter's steps, under the key kStep.
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
