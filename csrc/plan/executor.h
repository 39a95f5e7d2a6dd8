// The one interface that StepPlan and bindings.cpp use for the CPU and the CUDA executor.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "common/step.h"
#include "plan/loss_scale.h"

namespace cges {

// An executor is made for tensors of certain shapes. Their addresses and hyperparameters come with each step.
class Executor {
 public:
  virtual ~Executor() = default;

  // Steps all tensors that are not skipped. tensors[i] belongs to the i-th shape, and hyperparameters are
  // indexed by its param_group. Returns false where the host knows that an overflow (LossScale::found_inf)
  // kept everything as it was.
  virtual bool step(const std::vector<TensorInStep>& tensors,
                    const std::vector<Hyperparameters>& hyperparameters, const ScalerTensors& scaler) = 0;
};

// `name` is "cpu" or, in builds with CUDA, "cuda". Any other name is a ValueError.
std::unique_ptr<Executor> make_executor(const std::string& name, Rule rule, std::vector<TensorShape> shapes);

}  // namespace cges
