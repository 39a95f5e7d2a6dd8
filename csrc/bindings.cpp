// The Python module cges_kernels.backends._C.
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <string_view>

#include "common/text.h"
#include "plan/step_plan.h"
#if CGES_CUDA
#include "cuda/executor.h"
#endif
#include "cpu/executor.h"

#ifndef CGES_EMULATED
#define CGES_EMULATED 0
#endif

namespace {

using namespace cges;

// The fields of core/hyperparameters.py's Hyperparameters, a tuple of these in this order.
constexpr std::array kFields = {"lr",       "momentum",  "dampening",   "weight_decay",
                                "nesterov", "maximize",  "group_lasso", "exclusive_lasso",
                                "l1",       "prox_mode", "freeze_zeros"};

// One of SCALARS there: a number or, of its class At, the address of one.
double take_scalar(py::handle value, const float*& address) {
  if (PyFloat_Check(value.ptr()) || !py::hasattr(value, "address")) return value.cast<double>();
  address = reinterpret_cast<const float*>(value.attr("address").cast<int64_t>());
  return 0;
}

Freeze to_freeze(py::handle mode) {
  if (mode.is_none()) return Freeze::none;
  const auto name = mode.cast<std::string>();
  TORCH_CHECK_VALUE(name == "group" || name == "element",
                    text("freeze_zeros: expected None, 'group' or 'element', got '", name, "'").c_str());
  return name == "group" ? Freeze::group : Freeze::element;
}

Hyperparameters to_hyperparameters(const py::tuple& fields) {
  TORCH_CHECK_VALUE(
      fields.size() == kFields.size(),
      text("hyperparameters: expected ", kFields.size(), " fields, got ", fields.size()).c_str());
  const auto field = [&](const char* name) -> py::handle {
    const auto at = std::find(kFields.begin(), kFields.end(), std::string_view(name)) - kFields.begin();
    return PyTuple_GET_ITEM(fields.ptr(), at);
  };
  const auto number = [&](const char* name) { return field(name).cast<double>(); };
  const auto flag = [&](const char* name) { return field(name).cast<bool>(); };
  Hyperparameters made;
  made.sgd = {take_scalar(field("lr"), made.device.lr), number("momentum"), 1 - number("dampening"),
              number("weight_decay"), flag("maximize") ? -1.0 : 1.0};
  made.nesterov = flag("nesterov");
  made.coefficients = {take_scalar(field("group_lasso"), made.device.group_lasso),
                       take_scalar(field("exclusive_lasso"), made.device.exclusive_lasso),
                       take_scalar(field("l1"), made.device.l1)};
  made.exact = field("prox_mode").cast<std::string>() == "exact";
  made.freeze = to_freeze(field("freeze_zeros"));
  return made;
}

ScalerTensors to_scaler(const std::optional<at::Tensor>& grad_scale,
                        const std::optional<at::Tensor>& found_inf) {
  return {grad_scale.value_or(at::Tensor()), found_inf.value_or(at::Tensor())};
}

std::unique_ptr<Executor> executor_for(const std::string& name, const std::vector<at::Tensor>& tensors,
                                       const std::vector<LayoutTuple>& layouts,
                                       const std::vector<int64_t>& param_groups) {
  std::vector<TensorShape> shapes;
  for (size_t i = 0; i < tensors.size(); ++i)
    shapes.push_back(shape_of(tensors[i], layouts.at(i), param_groups.at(i)));
  return make_executor(name, std::move(shapes));
}

// rows: of each tensor the addresses of w, gradient and buffer (0: none), and its phase.
void step(Executor& executor, const std::vector<std::array<int64_t, 4>>& rows,
          const std::vector<py::tuple>& hyperparameters, const std::optional<at::Tensor>& grad_scale,
          const std::optional<at::Tensor>& found_inf) {
  std::vector<TensorAddresses> addresses;
  std::vector<Phase> phases;
  for (const auto& [w, grad, buf, phase] : rows) {
    addresses.push_back(
        {reinterpret_cast<void*>(w), reinterpret_cast<const void*>(grad), reinterpret_cast<void*>(buf)});
    TORCH_CHECK_VALUE(phase >= int(Phase::skipped) && phase <= int(Phase::running),
                      text("phase: expected one of Phase, got ", phase).c_str());
    phases.push_back(Phase(phase));
  }
  std::vector<Hyperparameters> of_groups;
  for (const py::tuple& h : hyperparameters) of_groups.push_back(to_hyperparameters(h));
  executor.step(addresses, phases, of_groups, to_scaler(grad_scale, found_inf));
}

// How many threads a parallel region of this build really runs on: 1 would mean that OpenMP was not linked.
int64_t parallel_threads() {
  std::atomic<int64_t> ran{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { ++ran; });
  return ran;
}

#if CGES_CUDA
// For tests: how many blocks of each path (rows, tile, shared, ticket) tensors of these layouts are cut into.
std::tuple<int64_t, int64_t, int64_t, int64_t> cuda_paths(const std::vector<LayoutTuple>& layouts,
                                                          int64_t dtype, int index) {
  std::vector<TensorShape> shapes;
  for (const auto& [K1, R1, K2, R2, has_groups] : layouts)
    shapes.push_back({{K1, R1, K2, R2}, has_groups, DType(dtype), index, 0});
  const cuda::Work work = cuda::cut(shapes, DType(dtype), cuda::describe_device(index));
  return {work.strips.size(), work.tiles.size() - work.tiles_in_parts, work.tiles_in_parts,
          work.chunks.size()};
}
#endif

}  // namespace

// module_local: the tests load a second build of this beside it, whose CUDA kernels run on the CPU.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Fused proximal SGD: the C++ side of cges_kernels.";
  py::class_<Executor>(m, "Executor", py::module_local())
      .def(py::init(&executor_for), py::arg("name"), py::arg("tensors"), py::arg("layouts"),
           py::arg("param_groups"))
      .def("step", &step, py::arg("rows"), py::arg("hyperparameters"), py::arg("grad_scale") = py::none(),
           py::arg("found_inf") = py::none());
  py::class_<StepPlan>(m, "StepPlan", py::module_local())
      .def(py::init<const std::vector<py::list>&, const std::vector<std::vector<LayoutTuple>>&,
                    const std::string&>(),
           py::arg("params"), py::arg("layouts"), py::arg("executor") = "")
      .def(
          "set_hyperparameters",
          [](StepPlan& plan, int64_t group, const py::tuple& h) {
            plan.set_hyperparameters(group, to_hyperparameters(h));
          },
          py::arg("group"), py::arg("hyperparameters"))
      .def("gather", &StepPlan::gather, py::arg("params"), py::arg("state"))
      .def(
          "run",
          [](StepPlan& plan, const py::object& launch, const std::optional<at::Tensor>& grad_scale,
             const std::optional<at::Tensor>& found_inf) {
            plan.run(launch, to_scaler(grad_scale, found_inf));
          },
          py::arg("launch") = py::none(), py::arg("grad_scale") = py::none(),
          py::arg("found_inf") = py::none());
  m.def("parallel_threads", &parallel_threads);
  m.def("limit_z_bytes", &cpu::limit_z_bytes);
  m.attr("cuda") = bool(CGES_CUDA);
  m.attr("emulated") = bool(CGES_EMULATED);
  // For tests: what Python says once more.
  m.attr("sgd_state") = kSgdState;
  m.attr("fields") = kFields;
  m.attr("max_sweeps") = ShrinkageSolver<float>::kMaxSweeps;
  m.attr("sorted") = kSorted;
  m.attr("phases") =
      py::dict(py::arg("SKIPPED") = int(Phase::skipped), py::arg("PROX_ALONE") = int(Phase::prox_alone),
               py::arg("STATELESS") = int(Phase::stateless), py::arg("FIRST") = int(Phase::first),
               py::arg("RUNNING") = int(Phase::running));
#if CGES_CUDA
  m.def("check_device", &cuda::check_device);
  m.def("limit_device", &cuda::limit_device, py::arg("shared_bytes") = INT64_MAX,
        py::arg("multiprocessors") = INT64_MAX);
  m.def("cuda_paths", &cuda_paths);
#endif
}
