// StepPlan holds the parameters of an optimizer's fused param groups in C++, so that a step costs Python only
// two calls: gather, which checks everything and may fail but writes nothing, and run. Between the two, an
// optimizer with several executors gathers for the others. The planner in Python (backends/planner.py) makes
// and calls it through bindings.cpp. backends/gathering.py does the same in Python for installs without this
// extension.
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

// (K1, R1, K2, R2, has_groups), as core/groups.py determines them.
using LayoutTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, bool>;

TensorShape shape_of(const at::Tensor& x, const LayoutTuple& layout, int64_t param_group);

class StepPlan {
 public:
  // params[i] is the "params" list of param group i itself, or an empty list where another executor serves
  // the group. layouts[i][j] belongs to params[i][j]. `executor` is "cpu", "cuda", or "" if each run is told
  // what to launch.
  StepPlan(const std::vector<py::list>& params, const std::vector<std::vector<LayoutTuple>>& layouts,
           const std::string& rule, const std::string& executor);

  void set_hyperparameters(int64_t group, const Hyperparameters& h) { hyperparameters_.at(group) = h; }

  // Checks every gradient and the rule's states in `state`, the optimizer's. Copies those whose memory order
  // is not their parameter's, and allocates missing states. Returns false if the plan no longer matches
  // `params` and must be built again. No parameter and no state is written; what is gathered is held until
  // run().
  bool gather(const std::vector<py::list>& params, const py::dict& state);

  // Runs the step that was gathered, once. It is the executor's or, if `launch` is not None, launch(table),
  // which takes the gradient scaler into account itself. `table` is an int64 tensor on the CPU with one row
  // per parameter, whose columns are the fields of Row in backends/gathering.py. Afterwards new states go
  // into the optimizer's state as torch.optim keeps them, steps are counted and version counters rise; none
  // of this happens if the step throws. Where states are new or the host counts steps, the host reads
  // found_inf, because a step that overflowed must leave no state and does not count.
  void run(const py::object& launch, const ScalerTensors& scaler);

 private:
  // The version of a tensor before the first step, and of inference tensors, which have none.
  static constexpr int64_t kUnknown = -1;

  // One of a parameter's states as the last step left it in `entry`, as a Python object and as a tensor; both
  // are null before there is one.
  struct Kept {
    py::object object;
    at::Tensor tensor;
    int64_t version = kUnknown;
    void* data = nullptr;
  };

  // One parameter: its properties when the plan was made, and the states that the last step left.
  struct Slot {
    py::object object;  // the parameter as a Python object
    at::Tensor param;
    TensorShape shape;
    int64_t index;  // it is param_groups[shape.param_group]["params"][index]
    void* data;
    c10::ScalarType dtype;
    at::DimVector sizes, strides;
    py::object entry{};  // the dict state[param], null before there is one
    std::array<Kept, kMostStates> states{};
    Kept step{};
    int64_t version = kUnknown;  // the parameter's version after the last step
  };

  // The tensors that one step uses of a parameter. They are held until it is done, since some may be copies.
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
  const RuleStates& kept_;  // the states that the rule keeps
  std::vector<py::object> state_keys_;
  py::object step_key_;
  std::vector<Slot> slots_;
  std::vector<int64_t> group_sizes_;
  std::vector<Hyperparameters> hyperparameters_;
  std::vector<std::pair<py::object, py::object>> state_entries_;  // the items of `state` at follow_state
  std::optional<Gathered> gathered_;
  std::unique_ptr<Executor> executor_;  // null if each run is told what to launch
};

}  // namespace cges
