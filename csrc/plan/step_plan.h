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

#include <array>
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
           const std::string& rule, const std::string& executor);

  void set_hyperparameters(int64_t group, const Hyperparameters& h) { hyperparameters_.at(group) = h; }

  // Checks every gradient and all that `state` holds of the rule's, copies what has another memory order than
  // its parameter, and allocates the states that have not begun. False where the plan no longer matches `params`
  // and must be built again. Nothing is written; what is gathered is held until `run`.
  bool gather(const std::vector<py::list>& params, const py::dict& state);

  // The step that was gathered, once: the executor's or, where `launch` is not None, launch(table), which sees to
  // the gradient scaler itself. `table` is an int64 tensor on the CPU with a row per parameter, of Row's fields in
  // backends/gathering.py. Then new states go into `state`, as torch.optim keeps them, steps are counted and
  // versions move on; if it throws, none of it. Where states are new, or counted by the host, found_inf is looked
  // at here: a step that overflowed leaves no state, and does not count.
  void run(const py::object& launch, const ScalerTensors& scaler);

 private:
  static constexpr int64_t kUnknown = -1;  // version: before the first step, and in inference mode

  // One of a parameter's states as `entry` holds it, as a Python object and as a tensor; null until there is one.
  struct Kept {
    py::object object;
    at::Tensor tensor;
    int64_t version = kUnknown;  // of the tensor after the last step,
    void* data = nullptr;        // and where it lay
  };

  // One parameter: its shape, its place when the plan was made, and what the last step found of it.
  struct Slot {
    py::object object;  // the parameter as Python holds it
    at::Tensor param;
    TensorShape shape;
    int64_t index;  // param_groups[shape.param_group]["params"][index]
    void* data;
    c10::ScalarType dtype;
    at::DimVector sizes, strides;
    py::object entry{};  // state[param], a dict; null until there is one
    std::array<Kept, kMostStates> states{};
    Kept step{};
    int64_t version = kUnknown;  // of the parameter after the last step
  };

  // What a step takes of a parameter, held until it is done.
  struct Inputs {
    at::Tensor grad, step;
    std::array<at::Tensor, kMostStates> states;
  };
  struct Gathered {
    py::dict state;
    std::vector<TensorInStep> tensors;
    std::vector<Inputs> inputs;
  };

  bool matches(const std::vector<py::list>& params) const;
  void follow_state(const py::dict& state);
  at::Tensor find(const Slot& slot, const py::object& key, const Kept& last) const;
  bool gather_states(const Slot& slot, Inputs& inputs, TensorInStep& at) const;
  static int64_t version_of(const at::Tensor& x);
  bool is_as_left(const Slot& slot, const Inputs& inputs, const TensorInStep& at) const;
  void begin_states(const Slot& slot, Inputs& inputs) const;
  void* settle(const Slot& slot, const char* what, at::Tensor& x) const;
  void check_step(const Slot& slot, const at::Tensor& step) const;
  [[noreturn]] void refuse_states(const Slot& slot) const;
  [[noreturn]] void refuse(const Slot& slot, const char* what, py::handle x) const;
  void check_distinct(const std::vector<Inputs>& inputs) const;
  void keep(Slot& slot, const py::object& key, const at::Tensor& x, Kept& last) const;
  void keep_states(Slot& slot, const Inputs& inputs, const py::dict& state) const;
  std::string name(const Slot& slot) const;

  const Rule rule_;
  const RuleStates& kept_;  // of the rule
  std::vector<py::object> state_keys_;
  py::object step_key_;
  std::vector<Slot> slots_;
  std::vector<int64_t> group_sizes_;
  std::vector<Hyperparameters> hyperparameters_;
  std::vector<std::pair<py::object, py::object>> state_entries_;  // what `state` held when last followed
  std::optional<Gathered> gathered_;
  std::unique_ptr<Executor> executor_;  // null where `run` is told what to launch
};

}  // namespace cges
