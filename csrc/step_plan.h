// StepPlan: the parameters of an optimizer's fused param groups, held so that a step costs Python one call.
//
// Nothing is trusted from one step to the next. Each step compares the param groups' own lists, the
// optimizer's state, every data pointer, shape and stride with what the plan was built from, and reads .grad
// itself.
#pragma once
#include <torch/extension.h>

#include <string>
#include <utility>
#include <vector>

#include "cpu_step.h"

namespace cges {

namespace py = pybind11;

// (K1, R1, K2, R2, has_groups), as groups.py works it out.
using LayoutTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, bool>;

class StepPlan {
 public:
  // params[i] is param group i's own "params" list, or empty where another executor serves the group;
  // layouts[i][j] belongs to params[i][j].
  StepPlan(const std::vector<py::list>& params, const std::vector<std::vector<LayoutTuple>>& layouts);

  void set_hyperparameters(int64_t group, const Hyperparameters& h) { hyperparameters_.at(group) = h; }

  // One step of every parameter that has a gradient; momentum buffers live in `state`, as torch.optim.SGD
  // keeps them. False, with nothing written, where the plan no longer matches and must be built again.
  bool step(const std::vector<py::list>& params, const py::dict& state);

 private:
  struct Slot {
    py::object object;  // the parameter as Python holds it
    at::Tensor param;
    const void* data;
    c10::ScalarType dtype;
    at::DimVector sizes, strides;
    Layout layout;
    bool has_groups;
    int64_t group, index;   // param_groups[group]["params"][index]
    py::object entry;       // state[param], a dict; null until there is one
    py::object buf_object;  // state[param]["momentum_buffer"]; null until there is one
    at::Tensor buf;
  };

  bool matches(const std::vector<py::list>& params) const;
  void follow_state(const py::dict& state);
  at::Tensor checked_grad(const Slot& slot) const;
  at::Tensor checked_buffer(const Slot& slot) const;
  void keep_buffer(Slot& slot, const at::Tensor& buf, const py::dict& state) const;
  std::string name(const Slot& slot) const;

  std::vector<Slot> slots_;
  std::vector<int64_t> group_sizes_;
  std::vector<Hyperparameters> hyperparameters_;
  std::vector<std::pair<py::object, py::object>> state_entries_;  // what `state` held when last followed
};

// In place, the proximal map of each tensor; layouts[i] belongs to tensors[i].
void prox_(const std::vector<at::Tensor>& tensors, const std::vector<LayoutTuple>& layouts,
           const Hyperparameters& h);

}  // namespace cges
