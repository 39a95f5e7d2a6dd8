// StepPlan::gather, see step_plan.h: finds the gradients and states of a step and checks them. Nothing that
// the user can see is written here.
#include <torch/csrc/autograd/python_variable.h>

#include "common/text.h"
#include "plan/step_plan.h"

namespace cges {
namespace {

// Whether the elements of x lie in memory as in a dense tensor of these sizes and strides. The stride of a
// dim of size 1 does not matter, nor does any stride of an empty tensor. A lazily negated view does not
// count, because its memory holds the negated numbers.
bool same_memory_order(const at::Tensor& x, at::IntArrayRef sizes, at::IntArrayRef strides) {
  if (x.is_neg()) return false;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && x.stride(d) != strides[d] && x.numel() != 0) return false;
  return true;
}

// Uninitialised memory in the parameter's memory order, as a plain tensor even where the parameter is of a
// subclass. Torch's function for plain sizes would use an output stream (common/text.h), so this takes the
// one for symbolic sizes.
at::Tensor new_like(const at::Tensor& param, at::TensorOptions options) {
  return at::empty_strided_symint(c10::fromIntArrayRefUnchecked(param.sizes()),
                                  c10::fromIntArrayRefUnchecked(param.strides()), options);
}

at::Tensor in_memory_order_of(const at::Tensor& param, const at::Tensor& x) {
  return new_like(param, x.options()).copy_(x.detach());
}

// A function of core/checks.py. Where a check here fails, Python checks once more and raises the error, so
// that all executors have the same messages.
py::object python_check(const char* name) {
  return py::module_::import("cges_kernels.core.checks").attr(name);
}

// A parameter's count of steps is a tensor of one element; this is for one that lies on the host.
double read_step(const at::Tensor& step) {
  return step.scalar_type() == at::kFloat ? double(*step.const_data_ptr<float>())
                                          : *step.const_data_ptr<double>();
}

}  // namespace

std::string StepPlan::name(const Slot& slot) const {
  return text("param_groups[", slot.shape.param_group, "]['params'][", slot.index, "]");
}

// When `state` has changed since the last step, finds each parameter's dict in it again. Comparing all
// entries costs nanoseconds for each.
void StepPlan::follow_state(const py::dict& state) {
  size_t n = 0;
  bool same = size_t(PyDict_Size(state.ptr())) == state_entries_.size();
  PyObject *key, *value;
  for (Py_ssize_t position = 0; same && PyDict_Next(state.ptr(), &position, &key, &value); ++n)
    same = state_entries_[n].first.ptr() == key && state_entries_[n].second.ptr() == value;
  if (same) return;
  state_entries_.clear();
  for (Py_ssize_t position = 0; PyDict_Next(state.ptr(), &position, &key, &value);)
    state_entries_.emplace_back(py::reinterpret_borrow<py::object>(key),
                                py::reinterpret_borrow<py::object>(value));
  for (Slot& slot : slots_)
    slot.entry = py::reinterpret_borrow<py::object>(PyDict_GetItem(state.ptr(), slot.object.ptr()));
}

// The tensor that `state` holds for this parameter under `key`; undefined if there is none yet. `last` is the
// one that the last step left there: if it is still the same Python object, it need not be unpacked again.
at::Tensor StepPlan::find(const Slot& slot, const py::object& key, const Kept& last) const {
  PyObject* const found = slot.entry ? PyDict_GetItem(slot.entry.ptr(), key.ptr()) : nullptr;
  if (found == nullptr || found == Py_None) return {};
  if (found == last.object.ptr()) return last.tensor;
  if (!THPVariable_Check(found)) refuse_states(slot);
  return THPVariable_Unpack(found);
}

// Checks a gradient or state and returns its address. If its memory order is not the parameter's, x is
// replaced by a copy that has that order.
void* StepPlan::settle(const Slot& slot, const char* what, at::Tensor& x) const {
  const at::Tensor& param = slot.param;
  if (x.layout() != at::kStrided || x.scalar_type() != param.scalar_type() || x.device() != param.device() ||
      x.sizes() != param.sizes())
    refuse(slot, what, py::cast(x));
  void* const at = x.data_ptr();
  if (at == nullptr && x.numel() != 0) refuse(slot, what, py::cast(x));  // a wrapper of other tensors
  if (same_memory_order(x, slot.sizes, slot.strides)) return at;
  x = in_memory_order_of(param, x);
  return x.data_ptr();
}

// The check in Python raises. The TORCH_CHECK after it is for a tensor that the check lets pass.
[[noreturn]] void StepPlan::refuse(const Slot& slot, const char* what, py::handle x) const {
  python_check("check_companion")(what, name(slot), slot.object, x, slot.object.attr("dtype"));
  TORCH_CHECK(false, text(name(slot), ": expected a ", what, " that holds memory, got none").c_str());
}

[[noreturn]] void StepPlan::refuse_states(const Slot& slot) const {
  python_check("check_begun")(kept_.rule, name(slot), slot.object, slot.entry, slot.object.attr("dtype"));
  TORCH_CHECK(false, text(name(slot), ": expected its ", kStep, " in float32 where kernels are to read it, ",
                          "got another type")
                         .c_str());
}

// A count of steps has one element: a float or double on the host, or a float on the parameter's device.
void StepPlan::check_step(const Slot& slot, const at::Tensor& step) const {
  const bool here = step.defined() && step.numel() == 1 && step.layout() == at::kStrided;
  const auto type = here ? step.scalar_type() : at::kByte;
  if (!(here && (step.is_cpu() ? type == at::kFloat || type == at::kDouble
                               : type == at::kFloat && step.device() == slot.param.device())))
    refuse_states(slot);
}

// Checks that no state shares memory with another or with a parameter: the step would write to it from two
// places at once.
void StepPlan::check_distinct(const std::vector<Inputs>& inputs) const {
  py::list names, tensors;
  for (const Slot& slot : slots_) {
    names.append(name(slot));
    tensors.append(slot.object);
  }
  for (size_t i = 0; i < slots_.size(); ++i)
    for (int s = 0; s < kept_.n; ++s) {
      if (!inputs[i].states[s].defined()) continue;
      names.append(text("the ", kept_.names[s], " of ", name(slots_[i])));
      tensors.append(inputs[i].states[s]);
    }
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (!inputs[i].step.defined()) continue;
    names.append(text("the ", kStep, " of ", name(slots_[i])));
    tensors.append(inputs[i].step);
  }
  python_check("check_distinct")(names, tensors);
}

// Allocates the states that torch.optim creates at a parameter's first gradient. The executor writes to them
// without reading them, so only the count of steps is set to zero.
void StepPlan::begin_states(const Slot& slot, Inputs& inputs) const {
  for (int s = 0; s < kept_.n; ++s) inputs.states[s] = new_like(slot.param, slot.param.options());
  if (!kept_.counts) return;
  // If the options say so, the count lies on the parameter's device, and then in float32, as kernels read it.
  const bool with_param = hyperparameters_[slot.shape.param_group].step_on_device;
  const bool is_float = with_param || c10::get_default_dtype_as_scalartype() != at::kDouble;
  const auto type = is_float ? at::kFloat : at::kDouble;
  const auto device = with_param ? slot.param.device() : c10::Device(c10::kCPU);
  inputs.step = at::zeros_symint({}, at::TensorOptions().dtype(type).device(device));
}

// Finds a parameter's states and checks them, or allocates them if there are none, and settles its phase.
// Returns whether some are newcomers: states that were loaded or replaced since this plan's last step.
bool StepPlan::gather_states(const Slot& slot, Inputs& inputs, TensorInStep& at) const {
  int there = 0;
  for (int s = 0; s < kept_.n; ++s) {
    inputs.states[s] = find(slot, state_keys_[s], slot.states[s]);
    there += inputs.states[s].defined();
  }
  if (there == 0 && kept_.counts && find(slot, step_key_, slot.step).defined()) refuse_states(slot);
  at.phase = there == 0 ? Phase::first : Phase::running;
  bool newcomers = false;
  if (there == 0) {
    begin_states(slot, inputs);
    for (int s = 0; s < kept_.n; ++s) at.states[s] = inputs.states[s].data_ptr();
  } else {
    if (there < kept_.n) refuse_states(slot);
    for (int s = 0; s < kept_.n; ++s) {
      at.states[s] = settle(slot, kept_.names[s], inputs.states[s]);
      newcomers |= !inputs.states[s].is_same(slot.states[s].tensor);
    }
    if (kept_.counts) inputs.step = find(slot, step_key_, slot.step);
  }
  if (!kept_.counts) return newcomers;
  if (!inputs.step.defined() || !inputs.step.is_same(slot.step.tensor)) {
    check_step(slot, inputs.step);
    newcomers |= at.phase == Phase::running;
  }
  if (inputs.step.is_cpu())
    at.count = read_step(inputs.step) + 1;
  else
    at.count_on_device = inputs.step.mutable_data_ptr<float>();
  return newcomers;
}

// torch's version counter, which rises with everything that torch writes to the tensor.
int64_t StepPlan::version_of(const at::Tensor& x) { return x.is_inference() ? kUnknown : x._version(); }

// Whether the parameter and its states are those of the last step, and torch has not written to them since.
bool StepPlan::is_as_left(const Slot& slot, const Inputs& inputs, const TensorInStep& at) const {
  bool same = slot.version != kUnknown && version_of(slot.param) == slot.version;
  for (int s = 0; same && writes_state(at.phase) && s < kept_.n; ++s) {
    const Kept& last = slot.states[s];
    same = inputs.states[s].is_same(last.tensor) && at.states[s] == last.data &&
           version_of(inputs.states[s]) == last.version;
  }
  return same;
}

bool StepPlan::gather(const std::vector<py::list>& params, const py::dict& state) {
  gathered_.reset();
  if (!matches(params)) return false;
  follow_state(state);

  const size_t n = slots_.size();
  Gathered all{state, std::vector<TensorInStep>(n), std::vector<Inputs>(n)};
  bool newcomers = false;
  for (size_t i = 0; i < n; ++i) {
    const Slot& slot = slots_[i];
    Inputs& inputs = all.inputs[i];
    TensorInStep& at = all.tensors[i];
    at.w = slot.data;
    inputs.grad = slot.param.grad();
    if (!inputs.grad.defined()) continue;
    at.grad = settle(slot, "gradient", inputs.grad);
    at.phase = Phase::stateless;
    const Hyperparameters& h = hyperparameters_[slot.shape.param_group];
    if (h.keeps_state()) newcomers |= gather_states(slot, inputs, at);
    if (h.skip_dead) at.as_left = is_as_left(slot, inputs, at);
  }
  if (newcomers) check_distinct(all.inputs);
  gathered_ = std::move(all);
  return true;
}

}  // namespace cges
