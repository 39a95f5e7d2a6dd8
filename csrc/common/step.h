// The arguments of a step, tensors and hyperparameters, in plain C++ without torch or CUDA headers.
// bindings.cpp and StepPlan fill these structs in, and both executors read them. core/hyperparameters.py has
// the same in Python; docs/design/a-step.md follows a hyperparameter from the param group to a kernel.
#pragma once
#include "common/adamw.h"
#include "common/layout.h"
#include "common/rule.h"
#include "common/sgd.h"
#include "common/shrinkage.h"

namespace cges {

enum class DType { f32, f64, bf16, f16 };

inline int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// The properties of a tensor that stay the same from step to step.
struct TensorShape {
  Layout layout;
  bool has_groups;  // whether group lasso, exclusive lasso and freezing by groups apply to it
  DType dtype;
  int device;           // index of its GPU, or -1 if it is in the host's memory
  int64_t param_group;  // index of the param group whose hyperparameters it takes
};

// The properties of a tensor in one step. The address of an array that does not exist is null; all arrays
// lie in the memory order of the layout. If the host knows the number of the tensor's steps, it is in
// `count`, this step included. If the count lies on the device, count_on_device is its address: a float
// that does not include this step yet, and that the kernels read and increment themselves.
struct TensorInStep {
  void* w = nullptr;
  const void* grad = nullptr;
  std::array<void*, kMostStates> states{};
  Phase phase = Phase::skipped;
  double count = 0;
  float* count_on_device = nullptr;
  bool as_left = false;  // nobody has written w or the states since this executor's last step
};

// The zeros that a step keeps at zero: none, those of all-zero groups, or all.
enum class Freeze { none, group, element };

// The addresses of the learning rate and coefficients that a kernel has to read itself, one float each in the
// memory of its device. They are null for values that the host knows. A scheduler can change such a tensor in
// place, and a captured graph then sees the new value.
struct DeviceScalars {
  const float *lr = nullptr, *group_lasso = nullptr, *exclusive_lasso = nullptr, *l1 = nullptr;
  CGES_FN bool any() const {
    return lr != nullptr || group_lasso != nullptr || exclusive_lasso != nullptr || l1 != nullptr;
  }
};

// The hyperparameters of one param group.
struct Hyperparameters {
  // The hyperparameters of the update. `rule` says whether SGD's options or AdamW's are used.
  Rule rule = Rule::sgd;
  SgdScalars<double> sgd{0, 0, 1, 0, 1};
  bool nesterov = false;
  AdamwOptions adamw{};
  bool step_on_device = false;  // whether new counts of steps are made on the parameter's device
  // The hyperparameters of the prox.
  Coefficients<double> coefficients{0, 0, 0};
  bool exact = false;
  Freeze freeze = Freeze::none;
  bool skip_dead = false;  // whether groups that `freeze` held at zero in the last step may be passed over

  DeviceScalars device{};

  double lr() const { return rule == Rule::sgd ? sgd.lr : adamw.lr; }

  // Whether the update keeps states. SGD does so only with momentum.
  bool keeps_state() const { return rule != Rule::sgd || sgd.momentum != 0; }

  // Makes the update divide gradients by `scale`.
  void unscale(double scale) {
    sgd.grad_sign /= scale;
    adamw.grad_sign /= scale;
  }

  // The thresholds from the numbers that the host knows; numbers on the device count as 0.
  Thresholds<double> thresholds() const { return form_thresholds(lr(), coefficients); }

  // Whether a group's t may have to be searched for, so that its sums are needed more than once.
  bool searches() const {
    if (!device.any()) return exact && thresholds().b != 0;
    return exact && (coefficients.exclusive_lasso != 0 || device.exclusive_lasso != nullptr);
  }
};

// The two numbers of a gradient scaler, as addresses in the memory of the executor's device, or null.
// Gradients are divided by *grad_scale. If *found_inf is not 0, the step must change nothing.
struct LossScale {
  const float *grad_scale = nullptr, *found_inf = nullptr;
};

}  // namespace cges
