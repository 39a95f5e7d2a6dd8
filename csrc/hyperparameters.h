// What a step is told, in plain C++: no torch, no CUDA.
#pragma once
#include <cstdint>

#include "shrinkage.h"

namespace cges {

// What stays zero: nothing, groups that are all zero, or every zero.
enum class Freeze { none, group, element };

// The hyperparameters of one param group, already multiplied by the learning rate where the threshold is lr *
// coefficient.
struct Hyperparameters {
  SgdScalars<double> sgd{0, 0, 1, 0, 1};
  bool nesterov = false;
  Thresholds<double> thresholds{0, 0, 0};
  bool exact = false;
  Freeze freeze = Freeze::none;
};

// What one step does with one parameter: three addresses (0 where there is none), and its phase, a Momentum
// or -1 where it has no gradient and is left alone.
struct StepRow {
  int64_t w, grad, buf, phase;
};
static_assert(sizeof(StepRow) == 4 * sizeof(int64_t));

}  // namespace cges
