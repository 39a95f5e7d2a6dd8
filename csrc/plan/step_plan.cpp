// The bodies of StepPlan, see step_plan.h: comparing the parameters with the plan, gathering gradients and
// states with their checks, running the executor, and keeping the states.
#include "plan/step_plan.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <array>

#include "common/text.h"

namespace cges {
namespace {

DType to_dtype(c10::ScalarType dtype) {
  switch (dtype) {
    case c10::kFloat:
      return DType::f32;
    case c10::kDouble:
      return DType::f64;
    case c10::kBFloat16:
      return DType::bf16;
    case c10::kHalf:
      return DType::f16;
    default:
      TORCH_CHECK(false,
                  text("expected float32, float64, bfloat16 or float16, got ", c10::toString(dtype)).c_str());
  }
}

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

py::object interned(const char* name) {
  return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name));
}

bool on_host(const at::Tensor& step) { return step.is_cpu(); }

// A parameter's count of steps is a tensor of one element. These two are for counts that lie on the host.
double read_step(const at::Tensor& step) {
  return step.scalar_type() == at::kFloat ? double(*step.const_data_ptr<float>())
                                          : *step.const_data_ptr<double>();
}
void write_step(const at::Tensor& step, double count) {
  if (step.scalar_type() == at::kFloat)
    *step.mutable_data_ptr<float>() = float(count);
  else
    *step.mutable_data_ptr<double>() = count;
}

// The table that `launch` takes (see StepPlan::run): rows with the fields of Row in backends/gathering.py.
at::Tensor table_of(const std::vector<TensorInStep>& tensors) {
  std::vector<std::array<int64_t, 7>> rows;
  const auto address = [](const void* p) { return reinterpret_cast<int64_t>(p); };
  for (const TensorInStep& x : tensors)
    rows.push_back({address(x.w), address(x.grad), address(x.states[0]), address(x.states[1]),
                    int64_t(x.phase), int64_t(x.count), address(x.count_on_device)});
  return at::from_blob(rows.data(), {int64_t(rows.size()), 7}, at::kLong).clone();
}

void bump_version(const at::Tensor& x) {
  if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TensorShape shape_of(const at::Tensor& x, const LayoutTuple& layout, int64_t param_group) {
  const auto& [K1, R1, K2, R2, has_groups] = layout;
  const int device = x.is_cpu() ? -1 : x.device().has_index() ? x.device().index() : 0;
  return {{K1, R1, K2, R2}, has_groups, to_dtype(x.scalar_type()), device, param_group};
}

StepPlan::StepPlan(const std::vector<py::list>& params, const std::vector<std::vector<LayoutTuple>>& layouts,
                   const std::string& rule, const std::string& executor)
    : rule_(rule_named(rule)),
      kept_(states_of(rule_)),
      step_key_(interned(kStep)),
      hyperparameters_(params.size()) {
  for (int s = 0; s < kept_.n; ++s) state_keys_.push_back(interned(kept_.names[s]));
  for (Hyperparameters& h : hyperparameters_) h.rule = rule_;
  TORCH_CHECK_VALUE(
      params.size() == layouts.size(),
      text("StepPlan: expected layouts for ", params.size(), " param groups, got ", layouts.size()).c_str());
  for (size_t g = 0; g < params.size(); ++g) {
    group_sizes_.push_back(params[g].size());
    TORCH_CHECK_VALUE(params[g].size() == layouts[g].size(),
                      text("StepPlan: expected ", params[g].size(), " layouts in param group ", g, ", got ",
                           layouts[g].size())
                          .c_str());
    for (size_t i = 0; i < params[g].size(); ++i) {
      const py::object object = params[g][i];
      const auto param = object.cast<at::Tensor>();
      const TensorShape shape = shape_of(param, layouts[g][i], int64_t(g));
      TORCH_CHECK_VALUE(
          shape.layout.numel() == param.numel(),
          text("StepPlan: expected a layout of ", param.numel(), " elements, got ", shape.layout.numel())
              .c_str());
      slots_.push_back({.object = object,
                        .param = param,
                        .shape = shape,
                        .index = int64_t(i),
                        .data = param.data_ptr(),
                        .dtype = param.scalar_type(),
                        .sizes = at::DimVector(param.sizes()),
                        .strides = at::DimVector(param.strides())});
    }
  }
  if (executor.empty()) return;
  std::vector<TensorShape> shapes;
  for (const Slot& slot : slots_) shapes.push_back(slot.shape);
  executor_ = make_executor(executor, rule_, std::move(shapes));
}

std::string StepPlan::name(const Slot& slot) const {
  return text("param_groups[", slot.shape.param_group, "]['params'][", slot.index, "]");
}

bool StepPlan::matches(const std::vector<py::list>& params) const {
  if (params.size() != group_sizes_.size()) return false;
  auto slot = slots_.begin();
  for (size_t g = 0; g < params.size(); ++g) {
    if (PyList_GET_SIZE(params[g].ptr()) != group_sizes_[g]) return false;
    for (int64_t i = 0; i < group_sizes_[g]; ++i, ++slot)
      if (PyList_GET_ITEM(params[g].ptr(), i) != slot->object.ptr()) return false;
  }
  return std::all_of(slots_.begin(), slots_.end(), [](const Slot& x) {
    return x.param.data_ptr() == x.data && x.param.sizes() == x.sizes && x.param.strides() == x.strides &&
           x.param.scalar_type() == x.dtype;
  });
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
  if (!(here && (on_host(step) ? type == at::kFloat || type == at::kDouble
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

// Makes x the parameter's state under `key`, here and in the optimizer's dict.
void StepPlan::keep(Slot& slot, const py::object& key, const at::Tensor& x, Kept& last) const {
  if (x.is_same(last.tensor)) return;
  last.tensor = x;
  last.object = py::reinterpret_steal<py::object>(THPVariable_Wrap(x));
  if (PyDict_SetItem(slot.entry.ptr(), key.ptr(), last.object.ptr()) != 0) throw py::error_already_set();
}

void StepPlan::keep_states(Slot& slot, const Inputs& inputs, const py::dict& state) const {
  if (!slot.entry) {
    slot.entry = py::dict();
    if (PyDict_SetItem(state.ptr(), slot.object.ptr(), slot.entry.ptr()) != 0) throw py::error_already_set();
  }
  if (inputs.step.defined()) keep(slot, step_key_, inputs.step, slot.step);
  for (int s = 0; s < kept_.n; ++s) {
    keep(slot, state_keys_[s], inputs.states[s], slot.states[s]);
    bump_version(inputs.states[s]);
    slot.states[s].version = version_of(inputs.states[s]);
    slot.states[s].data = inputs.states[s].data_ptr();
  }
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
  if (on_host(inputs.step))
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

void StepPlan::run(const py::object& launch, const ScalerTensors& scaler) {
  TORCH_CHECK(gathered_, "StepPlan.run: expected a gather that succeeded before it, got none");
  const Gathered all = *std::exchange(gathered_, std::nullopt);  // so it is released even if this throws
  // Kernels never see a tensor without elements, so the host counts its steps even where the count lies on
  // the device.
  const auto counted_by_host = [&](size_t i) {
    return all.tensors[i].count > 0 ||
           (all.tensors[i].count_on_device != nullptr && slots_[i].param.numel() == 0);
  };
  bool host_must_know = false;  // whether the host must find out now if the step overflowed
  for (size_t i = 0; i < slots_.size(); ++i)
    host_must_know |= all.tensors[i].phase == Phase::first || counted_by_host(i);
  if (host_must_know && scaler.overflowed()) return;
  if (!launch.is_none()) {
    launch(table_of(all.tensors));
  } else {
    TORCH_CHECK(executor_, "StepPlan.run: expected a launch, as the plan has no executor, got None");
    if (!executor_->step(all.tensors, hyperparameters_, scaler)) return;
  }
  for (size_t i = 0; i < slots_.size(); ++i) {
    const TensorInStep& at = all.tensors[i];
    const Inputs& inputs = all.inputs[i];
    if (at.phase == Phase::skipped) continue;
    bump_version(slots_[i].param);
    slots_[i].version = version_of(slots_[i].param);
    if (!writes_state(at.phase)) continue;
    keep_states(slots_[i], inputs, all.state);
    if (!inputs.step.defined()) continue;
    if (on_host(inputs.step)) write_step(inputs.step, at.count);
    if (!on_host(inputs.step) && counted_by_host(i)) inputs.step.add_(1);
    bump_version(inputs.step);
  }
}

}  // namespace cges
