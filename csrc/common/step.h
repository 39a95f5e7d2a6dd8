// What a step is told, in plain C++: no torch, no CUDA. The owner of hyperparameters in C++, as
// core/hyperparameters.py is in Python; docs/design/a-step.md follows them to a kernel.
#pragma once
#include "common/adamw.h"
#include "common/layout.h"
#include "common/rule.h"
#include "common/sgd.h"
#include "common/shrinkage.h"

namespace cges {

enum class DType { f32, f64, bf16, f16 };

inline int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// A tensor as a step knows it for good.
struct TensorShape {
  Layout layout;
  bool has_groups;  // whether a, b and group-wise freezing apply
  DType dtype;
  int device;           // the index of its GPU; the host's memory: -1
  int64_t param_group;  // whose hyperparameters it takes
};

// What one step finds of it: where all lies, in the layout's memory order and null where there is none, and
// the count of its steps, this one included. Kernels read and write one that lies on the device themselves:
// there it is a float, without this step.
struct TensorInStep {
  void* w = nullptr;
  const void* grad = nullptr;
  std::array<void*, kMostStates> states{};
  Phase phase = Phase::skipped;
  double count = 0;
  float* count_on_device = nullptr;
  bool as_left = false;  // nobody has written w or the states since the last step of the same executor
};

// What stays zero: nothing, groups that are all zero, or every zero.
enum class Freeze { none, group, element };

// Where the step size and coefficients lie that a kernel is to read itself: one float each in its device's
// memory, null for those that have a value. Schedulers change such tensors in place, under a captured graph.
struct DeviceScalars {
  const float *lr = nullptr, *group_lasso = nullptr, *exclusive_lasso = nullptr, *l1 = nullptr;
  CGES_FN bool any() const {
    return lr != nullptr || group_lasso != nullptr || exclusive_lasso != nullptr || l1 != nullptr;
  }
};

// A param group's.
struct Hyperparameters {
  Rule rule = Rule::sgd;
  SgdScalars<double> sgd{0, 0, 1, 0, 1};  // the rule's: one of these two
  bool nesterov = false;
  AdamwOptions adamw{};
  bool step_on_device = false;  // where a tensor's count of steps begins
  // the prox's
  Coefficients<double> coefficients{0, 0, 0};
  bool exact = false;
  Freeze freeze = Freeze::none;
  bool skip_dead = false;  // groups that `freeze` held at zero in the last step need no more

  DeviceScalars device{};

  double lr() const { return rule == Rule::sgd ? sgd.lr : adamw.lr; }

  // Whether the rule has a state to keep of a parameter: SGD with momentum.
  bool keeps_state() const { return rule != Rule::sgd || sgd.momentum != 0; }

  // Gradients are to be divided by `scale`.
  void unscale(double scale) {
    sgd.grad_sign /= scale;
    adamw.grad_sign /= scale;
  }

  // Of numbers that the host knows; those that it does not count as 0.
  Thresholds<double> thresholds() const { return form_thresholds(lr(), coefficients); }

  // Whether groups may have to be swept until their t is found, not just once.
  bool searches() const {
    if (!device.any()) return exact && thresholds().b != 0;
    return exact && (coefficients.exclusive_lasso != 0 || device.exclusive_lasso != nullptr);
  }
};

// What a gradient scaler leaves to the step, in the executor's memory, or null: a number that gradients are to
// be divided by, and one that, if it is not 0, keeps the step from changing anything.
struct LossScale {
  const float *grad_scale = nullptr, *found_inf = nullptr;
};

}  // namespace cges
