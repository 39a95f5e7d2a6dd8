#include "plan/executor.h"

#include <torch/csrc/utils/pybind.h>

#include "cpu/executor.h"
#include "plan/cuda_executor.h"

namespace cges {
namespace {

class CpuExecutor : public Executor {
 public:
  explicit CpuExecutor(std::vector<TensorShape> tensors) : tensors_(std::move(tensors)) {}

  bool step(const std::vector<TensorAddresses>& addresses, const std::vector<Phase>& phases,
            const std::vector<Hyperparameters>& hyperparameters, const ScalerTensors& scaler) override {
    if (scaler.overflowed()) return false;
    for (const Hyperparameters& h : hyperparameters)
      TORCH_CHECK(!h.device.any(), "cpu executor: expected numbers, got addresses of some");
    std::vector<Hyperparameters> unscaling = hyperparameters;
    if (scaler.grad_scale.defined())
      for (Hyperparameters& h : unscaling) h.sgd.grad_sign /= scaler.grad_scale.item<double>();
    std::vector<cpu::StepTensor> tensors;
    tensors.reserve(tensors_.size());
    for (size_t i = 0; i < tensors_.size(); ++i)
      if (phases.at(i) != Phase::skipped)
        tensors.push_back({tensors_[i], addresses.at(i), phases[i], &unscaling.at(tensors_[i].param_group)});
    const pybind11::gil_scoped_release no_gil;
    cpu::step(tensors);
    return true;
  }

 private:
  const std::vector<TensorShape> tensors_;
};

}  // namespace

std::unique_ptr<Executor> make_executor(const std::string& name, std::vector<TensorShape> tensors) {
  if (name == "cpu") return std::make_unique<CpuExecutor>(std::move(tensors));
#if CGES_CUDA
  if (name == "cuda") return std::make_unique<CudaExecutor>(std::move(tensors));
#endif
  TORCH_CHECK_VALUE(
      false, text("executor: expected one that this extension was built with, got '", name, "'").c_str());
}

}  // namespace cges
