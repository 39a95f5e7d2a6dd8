// What a step is told, in plain C++: no torch, no CUDA.
#pragma once
#include <cstdint>

#include "common/shrinkage.h"

namespace cges {

// What stays zero: nothing, groups that are all zero, or every zero.
enum class Freeze { none, group, element };

// Where the step size and coefficients lie that a kernel is to read itself: one float each in its device's
// memory, null for those that have a value. Schedulers change such tensors in place, under a captured graph.
struct DeviceScalars {
  const float *lr = nullptr, *a = nullptr, *b = nullptr, *c = nullptr;
  CGES_FN bool any() const { return lr != nullptr || a != nullptr || b != nullptr || c != nullptr; }
};

// The hyperparameters of one param group. The thresholds are multiplied by the learning rate already; but
// where `device` has any, they are bare coefficients, and the kernel multiplies.
struct Hyperparameters {
  SgdScalars<double> sgd{0, 0, 1, 0, 1};
  bool nesterov = false;
  Thresholds<double> thresholds{0, 0, 0};
  bool exact = false;
  Freeze freeze = Freeze::none;
  DeviceScalars device{};
};

// What a gradient scaler leaves to the step, in the executor's memory, or null: a number that gradients are to
// be divided by, and one that, if it is not 0, keeps the step from changing anything.
struct LossScale {
  const float *grad_scale = nullptr, *found_inf = nullptr;
};

// What one step does with one parameter: three addresses (0 where there is none), and its phase, a Momentum
// or -1 where it has no gradient and is left alone.
struct StepRow {
  int64_t w, grad, buf, phase;
};
static_assert(sizeof(StepRow) == 4 * sizeof(int64_t));

}  // namespace cges
