// The phase of a tensor in a step. StepPlan::gather (plan/step_plan.cpp) settles it for each tensor. The
// functions below tell the executors which arrays they have to read and write.
#pragma once
#include "common/arithmetic.h"

namespace cges {

// The kind of a tensor's step. core/hyperparameters.py has the same numbers.
enum class Phase {
  skipped = -1,    // the tensor has no gradient and is left as it is
  prox_alone = 0,  // there is no update: z is w
  stateless = 1,   // the update keeps no state: SGD without momentum
  first = 2,       // the states are written, but hold nothing yet that could be read
  running = 3,     // the states are read and written
};

// The arrays that the step of a tensor that is not skipped reads and writes, apart from the weight.
CGES_FN constexpr bool reads_grad(Phase phase) { return phase != Phase::prox_alone; }
CGES_FN constexpr bool reads_state(Phase phase) { return phase == Phase::running; }
CGES_FN constexpr bool writes_state(Phase phase) { return phase >= Phase::first; }

}  // namespace cges
