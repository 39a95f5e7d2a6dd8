#pragma once
#include "common/arithmetic.h"

namespace cges {

// What a step does with one tensor, by what it has; core/hyperparameters.py has the same numbers.
enum class Phase {
  skipped = -1,    // no gradient: left alone
  prox_alone = 0,  // no update: z is w
  stateless = 1,   // the rule keeps no state of it: SGD without momentum
  first = 2,       // the state is written, but holds nothing yet
  running = 3,     // the state is read and written
};

// What a step of a tensor that is not skipped reads and writes beside the weight.
CGES_FN constexpr bool reads_grad(Phase phase) { return phase != Phase::prox_alone; }
CGES_FN constexpr bool reads_state(Phase phase) { return phase == Phase::running; }
CGES_FN constexpr bool writes_state(Phase phase) { return phase >= Phase::first; }

}  // namespace cges
