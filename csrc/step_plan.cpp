#include "step_plan.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

namespace cges {
namespace {

Layout to_layout(const LayoutTuple& t) {
  return {std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

// Equal where it matters: the stride of a dim of size 1 (or of an empty tensor) moves nothing. A lazily
// negated view holds other numbers than its memory does.
bool same_memory_order(const at::Tensor& x, at::IntArrayRef sizes, at::IntArrayRef strides) {
  if (x.is_neg()) return false;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && x.stride(d) != strides[d] && x.numel() != 0) return false;
  return true;
}

at::Tensor in_memory_order_of(const at::Tensor& param, const at::Tensor& x) {
  return at::empty_strided(param.sizes(), param.strides(), x.options()).copy_(x);
}

PyObject* momentum_buffer_key() {
  static PyObject* const key = PyUnicode_InternFromString("momentum_buffer");
  return key;
}

void bump_version(const at::Tensor& x) {
  if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

StepPlan::StepPlan(const std::vector<py::list>& params, const std::vector<std::vector<LayoutTuple>>& layouts)
    : hyperparameters_(params.size()) {
  TORCH_CHECK_VALUE(params.size() == layouts.size(), "StepPlan: expected layouts for ", params.size(),
                    " param groups, got ", layouts.size());
  for (size_t g = 0; g < params.size(); ++g) {
    group_sizes_.push_back(params[g].size());
    TORCH_CHECK_VALUE(params[g].size() == layouts[g].size(), "StepPlan: expected ", params[g].size(),
                      " layouts in param group ", g, ", got ", layouts[g].size());
    for (size_t i = 0; i < params[g].size(); ++i) {
      const py::object object = params[g][i];
      const auto param = object.cast<at::Tensor>();
      const Layout layout = to_layout(layouts[g][i]);
      TORCH_CHECK_VALUE(layout.numel() == param.numel(), "StepPlan: expected a layout of ", param.numel(),
                        " elements, got ", layout.numel());
      slots_.push_back({object, param, param.data_ptr(), param.scalar_type(), at::DimVector(param.sizes()),
                        at::DimVector(param.strides()), layout, std::get<4>(layouts[g][i]), int64_t(g),
                        int64_t(i), py::object(), py::object(), at::Tensor()});
    }
  }
}

std::string StepPlan::name(const Slot& slot) const {
  return c10::str("param_groups[", slot.group, "]['params'][", slot.index, "] of shape ", slot.param.sizes());
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

// Finds each parameter's dict again when `state` has changed; comparing all of it costs nanoseconds an entry.
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

at::Tensor StepPlan::checked_grad(const Slot& slot) const {
  const at::Tensor& param = slot.param;
  at::Tensor grad = param.grad();
  if (!grad.defined()) return grad;
  TORCH_CHECK(grad.layout() == at::kStrided, name(slot), ": expected a dense gradient, got one of layout ",
              grad.layout(), "; sparse gradients are not supported");
  TORCH_CHECK(grad.scalar_type() == param.scalar_type() && grad.device() == param.device(), name(slot),
              ": expected a gradient of ", param.scalar_type(), " on ", param.device(), ", got ",
              grad.scalar_type(), " on ", grad.device());
  TORCH_CHECK(grad.sizes() == param.sizes(), name(slot), ": expected a gradient of the same shape, got ",
              grad.sizes());
  return same_memory_order(grad, slot.sizes, slot.strides) ? grad : in_memory_order_of(param, grad);
}

// The buffer that `state` holds for this parameter, undefined where there is none yet.
at::Tensor StepPlan::checked_buffer(const Slot& slot) const {
  PyObject* const found = slot.entry ? PyDict_GetItem(slot.entry.ptr(), momentum_buffer_key()) : nullptr;
  if (found == nullptr || found == Py_None) return {};
  at::Tensor buf = slot.buf;
  if (found != slot.buf_object.ptr()) {
    TORCH_CHECK_TYPE(THPVariable_Check(found), name(slot), ": expected a tensor as its momentum_buffer, got ",
                     Py_TYPE(found)->tp_name);
    buf = THPVariable_Unpack(found);
  }
  const at::Tensor& param = slot.param;
  TORCH_CHECK(buf.layout() == at::kStrided && buf.scalar_type() == param.scalar_type() &&
                  buf.device() == param.device() && buf.sizes() == param.sizes(),
              name(slot), ": expected a momentum_buffer of the same shape, dense, ", param.scalar_type(),
              " on ", param.device(), ", got ", buf.sizes(), ", ", buf.layout(), ", ", buf.scalar_type(),
              " on ", buf.device());
  return buf;
}

// Makes `buf` the parameter's momentum buffer, in `state` as well.
void StepPlan::keep_buffer(Slot& slot, const at::Tensor& buf, const py::dict& state) const {
  if (!slot.entry) {
    slot.entry = py::dict();
    if (PyDict_SetItem(state.ptr(), slot.object.ptr(), slot.entry.ptr()) != 0) throw py::error_already_set();
  }
  slot.buf = buf;
  slot.buf_object = py::reinterpret_steal<py::object>(THPVariable_Wrap(buf));
  if (PyDict_SetItem(slot.entry.ptr(), momentum_buffer_key(), slot.buf_object.ptr()) != 0)
    throw py::error_already_set();
}

bool StepPlan::step(const std::vector<py::list>& params, const py::dict& state) {
  if (!matches(params)) return false;
  follow_state(state);

  // Every check and every allocation comes before the first write.
  std::vector<at::Tensor> grads(slots_.size()), bufs(slots_.size());
  std::vector<bool> first(slots_.size(), false);
  for (size_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    grads[i] = checked_grad(slot);
    if (!grads[i].defined() || hyperparameters_[slot.group].sgd.momentum == 0) continue;
    bufs[i] = checked_buffer(slot);
    first[i] = !bufs[i].defined();
    if (first[i])  // what torch.optim.SGD creates at a parameter's first gradient
      bufs[i] = at::empty_strided(slot.sizes, slot.strides, slot.param.options());
    else if (!same_memory_order(bufs[i], slot.sizes, slot.strides))
      bufs[i] = in_memory_order_of(slot.param, bufs[i]);
  }

  std::vector<TensorStep> steps;
  steps.reserve(slots_.size());
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (!grads[i].defined()) continue;
    const Slot& slot = slots_[i];
    steps.push_back({slot.param.data_ptr(), grads[i].data_ptr(),
                     bufs[i].defined() ? bufs[i].data_ptr() : nullptr, first[i], slot.dtype, slot.layout,
                     slot.has_groups, &hyperparameters_[slot.group]});
  }
  {
    py::gil_scoped_release no_gil;
    cpu_step(steps);
  }
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (!grads[i].defined()) continue;
    bump_version(slots_[i].param);
    if (!bufs[i].defined()) continue;
    if (!bufs[i].is_same(slots_[i].buf)) keep_buffer(slots_[i], bufs[i], state);
    bump_version(bufs[i]);
  }
  return true;
}

void prox_(const std::vector<at::Tensor>& tensors, const std::vector<LayoutTuple>& layouts,
           const Hyperparameters& h) {
  std::vector<TensorStep> steps;
  for (size_t i = 0; i < tensors.size(); ++i) {
    steps.push_back({tensors[i].data_ptr(), nullptr, nullptr, false, tensors[i].scalar_type(),
                     to_layout(layouts.at(i)), std::get<4>(layouts[i]), &h});
    bump_version(tensors[i]);
  }
  py::gil_scoped_release no_gil;
  cpu_step(steps);
}

}  // namespace cges
