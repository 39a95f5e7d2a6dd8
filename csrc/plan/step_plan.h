// StepPlan: the parameters of an optimizer's fused param groups, held so that a step costs Python two calls:
// gather, which may fail and writes nothing, and run. Between the two, an optimizer of several executors
// gathers the others. backends/gathering.py does the same in Python, for installs without this.
//
// Nothing is trusted from one step to the next. Each step compares the param groups' own lists, the
// optimizer's state, every data pointer, shape and stride with what the plan was built from, and reads .grad
// itself.
#pragma once
#include <ATen/ATen.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "plan/executor.h"

namespace cges {

namespace py = pybind11;

// (K1, R1, K2, R2, has_groups), as core/groups.py works it out.
using LayoutTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, bool>;

TensorShape shape_of(const at::Tensor& x, const LayoutTuple& layout, int64_t param_group);

class StepPlan {
 public:
  // params[i] is param group i's own "params" list, or empty where another executor serves the group;
  // layouts[i][j] belongs to params[i][j]. `executor` is "cpu", "cuda", or "" where `run` is told what to
  // launch.
  StepPlan(const std::vector<py::list>& params, const std::vector<std::vector<LayoutTuple>>& layouts,
           const std::string& executor);

  void set_hyperparameters(int64_t group, const Hyperparameters& h) { hyperparameters_.at(group) = h; }

  // Checks every gradient and every momentum buffer in `state`, copies those whose memory order is not the
  // parameter's, and allocates the buffers that are missing. False where the plan no longer matches `params`
  // and must be built again. Nothing is written; what is gathered is held until `run`.
  bool gather(const std::vector<py::list>& params, const py::dict& state);

  // The step that was gathered, once: the executor's or, where `launch` is not None, launch(table), which sees to
  // the gradient scaler itself. `table` is an int64 tensor [n, 4] on the CPU: of each parameter its addresses
  // (w, gradient, buffer; 0 where there is none) and phase. Then new buffers go into `state`, as torch.optim.SGD
  // keeps them, and versions move on; if it throws, neither. Where buffers are new, found_inf is looked at here,
  // so that a step that overflowed leaves no state at all.
  void run(const py::object& launch, const ScalerTensors& scaler);

 private:
  // One parameter: its shape, its place when the plan was made, and what the last step found of it.
  struct Slot {
    py::object object;  // the parameter as Python holds it
    at::Tensor param;
    TensorShape shape;
    int64_t index;  // param_groups[shape.param_group]["params"][index]
    void* data;
    c10::ScalarType dtype;
    at::DimVector sizes, strides;
    py::object entry;       // state[param], a dict; null until there is one
    py::object buf_object;  // state[param]["momentum_buffer"]; null until there is one
    at::Tensor buf;
  };

  struct Gathered {
    py::dict state;
    std::vector<TensorAddresses> addresses;
    std::vector<Phase> phases;
    std::vector<at::Tensor> grads, bufs;
  };

  bool matches(const std::vector<py::list>& params) const;
  void follow_state(const py::dict& state);
  at::Tensor find_buffer(const Slot& slot) const;
  void* settle(const Slot& slot, const char* what, at::Tensor& x) const;
  [[noreturn]] void refuse(const Slot& slot, const char* what, py::handle x) const;
  void check_distinct(const std::vector<at::Tensor>& bufs) const;
  void keep_buffer(Slot& slot, const at::Tensor& buf, const py::dict& state) const;
  std::string name(const Slot& slot) const;

  std::vector<Slot> slots_;
  std::vector<int64_t> group_sizes_;
  std::vector<Hyperparameters> hyperparameters_;
  std::vector<std::pair<py::object, py::object>> state_entries_;  // what `state` held when last followed
  std::optional<Gathered> gathered_;
  std::unique_ptr<Executor> executor_;  // null where `run` is told what to launch
};

}  // namespace cges
