// The executors over torch's tensors, by one interface.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "common/step.h"
#include "plan/loss_scale.h"

namespace cges {

// It knows its tensors' shapes for good; where they lie and hyperparameters come with each step.
class Executor {
 public:
  virtual ~Executor() = default;

  // One step of all tensors but the skipped; of each, tensors[i], and its param group's hyperparameters. False
  // where the host knows that an overflow kept everything as it was.
  virtual bool step(const std::vector<TensorInStep>& tensors,
                    const std::vector<Hyperparameters>& hyperparameters, const ScalerTensors& scaler) = 0;
};

// "cpu" or, where it is built, "cuda"; ValueError for another name.
std::unique_ptr<Executor> make_executor(const std::string& name, Rule rule, std::vector<TensorShape> shapes);

}  // namespace cges
