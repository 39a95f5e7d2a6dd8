// The executors over torch's tensors, by one interface.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "common/step.h"
#include "plan/loss_scale.h"

namespace cges {

// It knows its tensors' shapes for good; addresses and hyperparameters come with each step.
class Executor {
 public:
  virtual ~Executor() = default;

  // One step of all tensors but the skipped; tensor i has addresses[i] and phases[i], and its param group's
  // hyperparameters. False where the host knows that an overflow kept everything as it was.
  virtual bool step(const std::vector<TensorAddresses>& addresses, const std::vector<Phase>& phases,
                    const std::vector<Hyperparameters>& hyperparameters, const ScalerTensors& scaler) = 0;
};

// "cpu" or, where it is built, "cuda"; ValueError for another name.
std::unique_ptr<Executor> make_executor(const std::string& name, std::vector<TensorShape> tensors);

}  // namespace cges
