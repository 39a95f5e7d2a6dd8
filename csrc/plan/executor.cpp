// The CPU executor for torch's tensors, and the choice of an executor by its name.
#include "plan/executor.h"

#include <torch/csrc/utils/pybind.h>

#include "cpu/cut.h"
#include "plan/cuda_executor.h"
#include "plan/held.h"

namespace cges {
namespace {

// Hands a step's tensors to cpu::step. Between steps it remembers which groups may be passed over.
class CpuExecutor : public Executor {
 public:
  explicit CpuExecutor(std::vector<TensorShape> shapes) : shapes_(std::move(shapes)), held_(shapes_.size()) {}

  bool step(const std::vector<TensorInStep>& tensors, const std::vector<Hyperparameters>& hyperparameters,
            const ScalerTensors& scaler) override {
    if (scaler.overflowed()) return false;
    for (const Hyperparameters& h : hyperparameters)
      TORCH_CHECK(!h.device.any(), "cpu executor: expected numbers, got addresses of some");
    std::vector<Hyperparameters> unscaling = hyperparameters;
    if (scaler.grad_scale.defined())
      for (Hyperparameters& h : unscaling) h.unscale(scaler.grad_scale.item<double>());
    std::vector<cpu::StepTensor> stepped;
    stepped.reserve(shapes_.size());
    for (size_t i = 0; i < shapes_.size(); ++i)
      if (tensors.at(i).phase != Phase::skipped) {
        stepped.push_back({shapes_[i], tensors[i], &unscaling.at(shapes_[i].param_group)});
        stepped.back().held = held_[i].before(stepped.back());
      }
    const pybind11::gil_scoped_release no_gil;
    cpu::step(stepped);
    return true;
  }

 private:
  // The groups of one tensor that the last step held at zero, if skip_dead asks for them.
  struct Held {
    HeldList list{};
    cpu::HeldGroups groups{};

    // The groups that the coming step may skip, and in which it records those that it holds at zero. Null if
    // it has no list.
    cpu::HeldGroups* before(const cpu::StepTensor& tensor) {
      const auto use = list.before(*tensor.h, tensor, cpu::can_pass_by(tensor));
      if (use == HeldList::Use::begin) groups.assign(tensor.layout.num_groups(), 0);
      return use == HeldList::Use::none ? nullptr : &groups;
    }
  };

  const std::vector<TensorShape> shapes_;
  std::vector<Held> held_;
};

}  // namespace

std::unique_ptr<Executor> make_executor(const std::string& name, [[maybe_unused]] Rule rule,
                                        std::vector<TensorShape> shapes) {
  if (name == "cpu") return std::make_unique<CpuExecutor>(std::move(shapes));
#if CGES_CUDA
  if (name == "cuda") return std::make_unique<CudaExecutor>(rule, std::move(shapes));
#endif
  TORCH_CHECK_VALUE(
      false, text("executor: expected one that this extension was built with, got '", name, "'").c_str());
}

}  // namespace cges
