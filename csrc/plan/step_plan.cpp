#include "plan/step_plan.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstring>

#include "common/text.h"

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
  return at::empty_strided(param.sizes(), param.strides(), x.options()).copy_(x.detach());
}

int64_t address(const at::Tensor& x) { return reinterpret_cast<int64_t>(x.data_ptr()); }

// Where something is wrong, Python finds it again and says so: one text for all executors.
py::object python_check(const char* name) { return py::module_::import("cges_kernels.checks").attr(name); }

PyObject* momentum_buffer_key() {
  static PyObject* const key = PyUnicode_InternFromString("momentum_buffer");
  return key;
}

void check_executor(const std::string& executor) {
  const bool known = executor.empty() || executor == "cpu" || (CGES_CUDA && executor == "cuda");
  TORCH_CHECK_VALUE(
      known, text("executor: expected one that this extension was built with, got '", executor, "'").c_str());
}

void bump_version(const at::Tensor& x) {
  if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
}

bool overflowed(const std::optional<at::Tensor>& found_inf) {
  return found_inf && found_inf->item<double>() != 0;
}

// What the CPU executor knows of a tensor beside its StepRow.
struct CpuTensor {
  c10::ScalarType dtype;
  Layout layout;
  bool has_groups;
  int64_t group;
};

template <typename TensorAt>
void cpu_run(const std::vector<StepRow>& table, std::vector<Hyperparameters> hyperparameters,
             const std::optional<at::Tensor>& grad_scale, TensorAt tensor_at) {
  if (grad_scale)
    for (Hyperparameters& h : hyperparameters) h.sgd.grad_sign /= grad_scale->item<double>();
  std::vector<TensorStep> steps;
  steps.reserve(table.size());
  for (size_t i = 0; i < table.size(); ++i) {
    const StepRow& row = table[i];
    if (row.phase < 0) continue;
    const CpuTensor x = tensor_at(i);
    steps.push_back({reinterpret_cast<void*>(row.w), reinterpret_cast<const void*>(row.grad),
                     reinterpret_cast<void*>(row.buf), row.phase == int64_t(Momentum::first), x.dtype,
                     x.layout, x.has_groups, &hyperparameters.at(x.group)});
  }
  py::gil_scoped_release no_gil;
  cpu_step(steps);
}

}  // namespace

StepPlan::StepPlan(const std::vector<py::list>& params, const std::vector<std::vector<LayoutTuple>>& layouts,
                   const std::string& executor)
    : hyperparameters_(params.size()) {
  check_executor(executor);
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
      const Layout layout = to_layout(layouts[g][i]);
      TORCH_CHECK_VALUE(
          layout.numel() == param.numel(),
          text("StepPlan: expected a layout of ", param.numel(), " elements, got ", layout.numel()).c_str());
      slots_.push_back({object, param, param.data_ptr(), param.scalar_type(), at::DimVector(param.sizes()),
                        at::DimVector(param.strides()), layout, std::get<4>(layouts[g][i]), int64_t(g),
                        int64_t(i), py::object(), py::object(), at::Tensor()});
    }
  }
#if CGES_CUDA
  if (executor != "cuda") return;
  std::vector<StepTensor> tensors;
  for (const Slot& x : slots_)
    tensors.push_back({x.param.device(), x.dtype, x.layout, x.has_groups, x.group});
  cuda_.emplace(tensors);
#endif
}

std::string StepPlan::name(const Slot& slot) const {
  return text("param_groups[", slot.group, "]['params'][", slot.index, "]");
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
  PyObject* const found = slot.entry ? PyDict_GetItem(slot.entry.ptr(), momentum_buffer_key()) : nullptr;
  if (found == nullptr || found == Py_None) return {};
  if (found == slot.buf_object.ptr()) return slot.buf;
  if (!THPVariable_Check(found)) refuse(slot, "momentum_buffer", found);
  return THPVariable_Unpack(found);
}

// Checks a gradient or buffer and returns its address; where its memory order is not the parameter's, it
// becomes a copy.
int64_t StepPlan::settle(const Slot& slot, const char* what, at::Tensor& x) const {
  const at::Tensor& param = slot.param;
  if (x.layout() != at::kStrided || x.scalar_type() != param.scalar_type() || x.device() != param.device() ||
      x.sizes() != param.sizes())
    refuse(slot, what, py::cast(x));
  const int64_t at = address(x);
  if (at == 0 && x.numel() != 0) refuse(slot, what, py::cast(x));  // it wraps other tensors
  if (same_memory_order(x, slot.sizes, slot.strides)) return at;
  x = in_memory_order_of(param, x);
  return address(x);
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
    names.append("the momentum_buffer of " + name(slots_[i]));
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
  if (PyDict_SetItem(slot.entry.ptr(), momentum_buffer_key(), slot.buf_object.ptr()) != 0)
    throw py::error_already_set();
}

bool StepPlan::gather(const std::vector<py::list>& params, const py::dict& state) {
  gathered_.reset();
  if (!matches(params)) return false;
  follow_state(state);

  const size_t n = slots_.size();
  Gathered all{state, {}, std::vector<at::Tensor>(n), std::vector<at::Tensor>(n)};
  all.table.reserve(n);
  bool newcomers = false;  // buffers that no earlier step of this plan has seen
  for (size_t i = 0; i < n; ++i) {
    const Slot& slot = slots_[i];
    at::Tensor &grad = all.grads[i], &buf = all.bufs[i];
    StepRow& row = all.table.emplace_back(StepRow{reinterpret_cast<int64_t>(slot.data), 0, 0, -1});
    grad = slot.param.grad();
    if (!grad.defined()) continue;
    row.grad = settle(slot, "gradient", grad);
    row.phase = int64_t(Momentum::none);
    if (hyperparameters_[slot.group].sgd.momentum == 0) continue;
    buf = find_buffer(slot);
    if (buf.defined()) {
      row.buf = settle(slot, "momentum_buffer", buf);
      row.phase = int64_t(Momentum::running);
      newcomers |= !buf.is_same(slot.buf);
    } else {  // what torch.optim.SGD creates at a parameter's first gradient
      buf = at::empty_strided(slot.sizes, slot.strides, slot.param.options());
      row.buf = address(buf);
      row.phase = int64_t(Momentum::first);
    }
  }
  if (newcomers) check_distinct(all.bufs);
  gathered_ = std::move(all);
  return true;
}

void StepPlan::run(const py::object& launch, const std::optional<at::Tensor>& grad_scale,
                   const std::optional<at::Tensor>& found_inf) {
  TORCH_CHECK(gathered_, "StepPlan.run: expected a gather that succeeded before it, got none");
  const Gathered all = *std::exchange(gathered_, std::nullopt);  // let go at the end, thrown or not
  if (found_inf && std::any_of(all.table.begin(), all.table.end(),
                               [](const StepRow& x) { return x.phase == int64_t(Momentum::first); }))
    if (overflowed(found_inf)) return;
  if (!launch.is_none()) {
    const at::Tensor table = at::empty({int64_t(all.table.size()), 4}, at::kLong);
    std::memcpy(table.data_ptr(), all.table.data(), all.table.size() * sizeof(StepRow));
    launch(table);
#if CGES_CUDA
  } else if (cuda_) {
    cuda_->step(all.table, hyperparameters_,
                {grad_scale.value_or(at::Tensor()), found_inf.value_or(at::Tensor())});
#endif
  } else {
    if (overflowed(found_inf)) return;
    cpu_run(all.table, hyperparameters_, grad_scale, [&](size_t i) {
      const Slot& slot = slots_[i];
      return CpuTensor{slot.dtype, slot.layout, slot.has_groups, slot.group};
    });
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

void step_(const std::vector<at::Tensor>& tensors, const std::vector<LayoutTuple>& layouts,
           const std::vector<RowTuple>& rows, const std::vector<int64_t>& groups,
           const std::vector<Hyperparameters>& hyperparameters, const std::string& executor,
           [[maybe_unused]] bool capturing, const std::optional<at::Tensor>& grad_scale,
           const std::optional<at::Tensor>& found_inf) {
  check_executor(executor);
  std::vector<StepRow> table;
  for (const auto& [w, grad, buf, phase] : rows) table.push_back({w, grad, buf, phase});
  if (executor == "cpu") {
    if (overflowed(found_inf)) return;
    cpu_run(table, hyperparameters, grad_scale, [&](size_t i) {
      return CpuTensor{tensors.at(i).scalar_type(), to_layout(layouts.at(i)), std::get<4>(layouts[i]),
                       groups.at(i)};
    });
    return;
  }
#if CGES_CUDA
  std::vector<StepTensor> shapes;
  for (size_t i = 0; i < tensors.size(); ++i)
    shapes.push_back({tensors[i].device(), tensors[i].scalar_type(), to_layout(layouts.at(i)),
                      std::get<4>(layouts[i]), groups.at(i)});
  kept_cuda_plan(shapes, capturing)
      .step(table, hyperparameters, {grad_scale.value_or(at::Tensor()), found_inf.value_or(at::Tensor())});
#endif
}

}  // namespace cges
