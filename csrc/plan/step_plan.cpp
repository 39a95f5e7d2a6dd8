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

// Equal where it matters: the stride of a dim of size 1 (or of an empty tensor) moves nothing. A lazily
// negated view holds other numbers than its memory does.
bool same_memory_order(const at::Tensor& x, at::IntArrayRef sizes, at::IntArrayRef strides) {
  if (x.is_neg()) return false;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && x.stride(d) != strides[d] && x.numel() != 0) return false;
  return true;
}

// Uninitialised memory in the parameter's memory order, whatever its class. By torch's function of symbolic
// sizes: that of plain ones brings an output stream, see common/text.h.
at::Tensor new_like(const at::Tensor& param, at::TensorOptions options) {
  return at::empty_strided_symint(c10::fromIntArrayRefUnchecked(param.sizes()),
                                  c10::fromIntArrayRefUnchecked(param.strides()), options);
}

at::Tensor in_memory_order_of(const at::Tensor& param, const at::Tensor& x) {
  return new_like(param, x.options()).copy_(x.detach());
}

// Where something is wrong, Python finds it again and says so: one text for all executors.
py::object python_check(const char* name) {
  return py::module_::import("cges_kernels.core.checks").attr(name);
}

PyObject* state_key() {
  static PyObject* const key = PyUnicode_InternFromString(kSgdState);
  return key;
}

// As `launch` takes them.
at::Tensor table_of(const std::vector<TensorAddresses>& addresses, const std::vector<Phase>& phases) {
  std::vector<std::array<int64_t, 4>> rows;
  for (size_t i = 0; i < addresses.size(); ++i) {
    const TensorAddresses& at = addresses[i];
    rows.push_back({reinterpret_cast<int64_t>(at.w), reinterpret_cast<int64_t>(at.grad),
                    reinterpret_cast<int64_t>(at.buf), int64_t(phases[i])});
  }
  return at::from_blob(rows.data(), {int64_t(rows.size()), 4}, at::kLong).clone();
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
                   const std::string& executor)
    : hyperparameters_(params.size()) {
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
      slots_.push_back({object, param, shape, int64_t(i), param.data_ptr(), param.scalar_type(),
                        at::DimVector(param.sizes()), at::DimVector(param.strides()), py::object(),
                        py::object(), at::Tensor()});
    }
  }
  if (executor.empty()) return;
  std::vector<TensorShape> shapes;
  for (const Slot& slot : slots_) shapes.push_back(slot.shape);
  executor_ = make_executor(executor, std::move(shapes));
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

// The buffer that `state` holds for this parameter, undefined where there is none yet.
at::Tensor StepPlan::find_buffer(const Slot& slot) const {
  PyObject* const found = slot.entry ? PyDict_GetItem(slot.entry.ptr(), state_key()) : nullptr;
  if (found == nullptr || found == Py_None) return {};
  if (found == slot.buf_object.ptr()) return slot.buf;
  if (!THPVariable_Check(found)) refuse(slot, kSgdState, found);
  return THPVariable_Unpack(found);
}

// Checks a gradient or buffer and returns its address; where its memory order is not the parameter's, it
// becomes a copy.
void* StepPlan::settle(const Slot& slot, const char* what, at::Tensor& x) const {
  const at::Tensor& param = slot.param;
  if (x.layout() != at::kStrided || x.scalar_type() != param.scalar_type() || x.device() != param.device() ||
      x.sizes() != param.sizes())
    refuse(slot, what, py::cast(x));
  void* const at = x.data_ptr();
  if (at == nullptr && x.numel() != 0) refuse(slot, what, py::cast(x));  // it wraps other tensors
  if (same_memory_order(x, slot.sizes, slot.strides)) return at;
  x = in_memory_order_of(param, x);
  return x.data_ptr();
}

[[noreturn]] void StepPlan::refuse(const Slot& slot, const char* what, py::handle x) const {
  python_check("check_companion")(what, name(slot), slot.object, x, slot.object.attr("dtype"));
  TORCH_CHECK(false, text(name(slot), ": expected a ", what, " that holds memory, got none").c_str());
}

// A buffer that shares memory with another, or with a parameter, would be written twice at once.
void StepPlan::check_distinct(const std::vector<at::Tensor>& bufs) const {
  py::list names, tensors;
  for (const Slot& slot : slots_) {
    names.append(name(slot));
    tensors.append(slot.object);
  }
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (!bufs[i].defined()) continue;
    names.append(text("the ", kSgdState, " of ", name(slots_[i])));
    tensors.append(bufs[i]);
  }
  python_check("check_distinct")(names, tensors);
}

// Makes `buf` the parameter's momentum buffer, in `state` as well.
void StepPlan::keep_buffer(Slot& slot, const at::Tensor& buf, const py::dict& state) const {
  if (!slot.entry) {
    slot.entry = py::dict();
    if (PyDict_SetItem(state.ptr(), slot.object.ptr(), slot.entry.ptr()) != 0) throw py::error_already_set();
  }
  slot.buf = buf;
  slot.buf_object = py::reinterpret_steal<py::object>(THPVariable_Wrap(buf));
  if (PyDict_SetItem(slot.entry.ptr(), state_key(), slot.buf_object.ptr()) != 0)
    throw py::error_already_set();
}

bool StepPlan::gather(const std::vector<py::list>& params, const py::dict& state) {
  gathered_.reset();
  if (!matches(params)) return false;
  follow_state(state);

  const size_t n = slots_.size();
  Gathered all{state, {}, {}, std::vector<at::Tensor>(n), std::vector<at::Tensor>(n)};
  all.addresses.reserve(n);
  all.phases.reserve(n);
  bool newcomers = false;  // buffers that no earlier step of this plan has seen
  for (size_t i = 0; i < n; ++i) {
    const Slot& slot = slots_[i];
    at::Tensor &grad = all.grads[i], &buf = all.bufs[i];
    TensorAddresses& at = all.addresses.emplace_back(TensorAddresses{slot.data, nullptr, nullptr});
    Phase& phase = all.phases.emplace_back(Phase::skipped);
    grad = slot.param.grad();
    if (!grad.defined()) continue;
    at.grad = settle(slot, "gradient", grad);
    phase = Phase::stateless;
    if (!hyperparameters_[slot.shape.param_group].keeps_state()) continue;
    buf = find_buffer(slot);
    if (buf.defined()) {
      at.buf = settle(slot, kSgdState, buf);
      phase = Phase::running;
      newcomers |= !buf.is_same(slot.buf);
    } else {  // what torch.optim.SGD creates at a parameter's first gradient
      buf = new_like(slot.param, slot.param.options());
      at.buf = buf.data_ptr();
      phase = Phase::first;
    }
  }
  if (newcomers) check_distinct(all.bufs);
  gathered_ = std::move(all);
  return true;
}

void StepPlan::run(const py::object& launch, const ScalerTensors& scaler) {
  TORCH_CHECK(gathered_, "StepPlan.run: expected a gather that succeeded before it, got none");
  const Gathered all = *std::exchange(gathered_, std::nullopt);  // let go at the end, thrown or not
  const bool starts = std::count(all.phases.begin(), all.phases.end(), Phase::first) > 0;
  if (starts && scaler.overflowed()) return;
  if (!launch.is_none()) {
    launch(table_of(all.addresses, all.phases));
  } else {
    TORCH_CHECK(executor_, "StepPlan.run: expected a launch, as the plan has no executor, got None");
    if (!executor_->step(all.addresses, all.phases, hyperparameters_, scaler)) return;
  }
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (!all.grads[i].defined()) continue;
    bump_version(slots_[i].param);
    const at::Tensor& buf = all.bufs[i];
    if (!buf.defined()) continue;
    if (!buf.is_same(slots_[i].buf)) keep_buffer(slots_[i], buf, all.state);
    bump_version(buf);
  }
}

}  // namespace cges
