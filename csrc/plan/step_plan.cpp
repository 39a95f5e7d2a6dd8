// The bodies of StepPlan, see step_plan.h: comparing the parameters with the plan, running the executor, and
// keeping the states. gather.cpp has the rest.
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

py::object interned(const char* name) {
  return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name));
}

// For a count that lies on the host.
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
    if (inputs.step.is_cpu()) write_step(inputs.step, at.count);
    if (!inputs.step.is_cpu() && counted_by_host(i)) inputs.step.add_(1);
    bump_version(inputs.step);
  }
}

}  // namespace cges
