// The Python module cges_kernels._C.
#include <ATen/Parallel.h>

#include <array>
#include <atomic>

#include "common/text.h"
#include "plan/step_plan.h"

#ifndef CGES_EMULATED
#define CGES_EMULATED 0
#endif

namespace {

using namespace cges;

Hyperparameters make_hyperparameters(double lr, double momentum, double dampening, double weight_decay,
                                     bool nesterov, bool maximize, double a, double b, double c, bool exact,
                                     const std::string& freeze, const std::array<int64_t, 4>& device) {
  const auto at = [&](int i) { return reinterpret_cast<const float*>(device[i]); };
  TORCH_CHECK_VALUE(freeze.empty() || freeze == "group" || freeze == "element",
                    text("freeze: expected '', 'group' or 'element', got '", freeze, "'").c_str());
  return {{lr, momentum, 1 - dampening, weight_decay, maximize ? -1.0 : 1.0},
          nesterov,
          {a, b, c},
          exact,
          freeze == "group"     ? Freeze::group
          : freeze == "element" ? Freeze::element
                                : Freeze::none,
          {at(0), at(1), at(2), at(3)}};
}

// How many threads a parallel region of this build really runs on: 1 would mean that OpenMP was not linked.
int64_t parallel_threads() {
  std::atomic<int64_t> ran{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { ++ran; });
  return ran;
}

#if CGES_CUDA
// For tests: how many blocks of each path (rows, block, cluster, ticket) tensors of these layouts are cut into.
std::tuple<int64_t, int64_t, int64_t, int64_t> cuda_paths(const std::vector<LayoutTuple>& layouts,
                                                          int64_t dtype, int index) {
  std::vector<cuda::TensorShape> shapes;
  for (const auto& [K1, R1, K2, R2, has_groups] : layouts) shapes.push_back({{K1, R1, K2, R2}, has_groups});
  const cuda::Work work = cuda::cut(shapes, cuda::DType(dtype), cuda::describe_device(index));
  return {work.strips.size(), work.blocks.size(), work.clusters.size(), work.chunks.size()};
}
#endif

}  // namespace

// module_local: the tests load a second build of this beside it, whose CUDA kernels run on the CPU.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Fused proximal SGD: the C++ side of cges_kernels.";
  py::class_<Hyperparameters>(m, "Hyperparameters", py::module_local())
      .def(py::init(&make_hyperparameters), py::kw_only(), py::arg("lr") = 0.0, py::arg("momentum") = 0.0,
           py::arg("dampening") = 0.0, py::arg("weight_decay") = 0.0, py::arg("nesterov") = false,
           py::arg("maximize") = false, py::arg("a") = 0.0, py::arg("b") = 0.0, py::arg("c") = 0.0,
           py::arg("exact") = false, py::arg("freeze") = "", py::arg("device") = std::array<int64_t, 4>{});
  py::class_<StepPlan>(m, "StepPlan", py::module_local())
      .def(py::init<const std::vector<py::list>&, const std::vector<std::vector<LayoutTuple>>&,
                    const std::string&>(),
           py::arg("params"), py::arg("layouts"), py::arg("executor") = "")
      .def("set_hyperparameters",
           [](StepPlan& plan, int64_t group, const py::kwargs& values) {
             const py::object h = py::type::of<Hyperparameters>()(**values);
             plan.set_hyperparameters(group, h.cast<const Hyperparameters&>());
           })
      .def("gather", &StepPlan::gather, py::arg("params"), py::arg("state"))
      .def("run", &StepPlan::run, py::arg("launch") = py::none(), py::arg("grad_scale") = py::none(),
           py::arg("found_inf") = py::none());
  m.def("step_", &step_, py::arg("tensors"), py::arg("layouts"), py::arg("rows"), py::arg("groups"),
        py::arg("hyperparameters"), py::arg("executor"), py::arg("capturing") = false,
        py::arg("grad_scale") = py::none(), py::arg("found_inf") = py::none());
  m.def("parallel_threads", &parallel_threads);
  m.def("limit_z_bytes", &limit_z_bytes);
  m.attr("cuda") = bool(CGES_CUDA);
  m.attr("emulated") = bool(CGES_EMULATED);
#if CGES_CUDA
  m.def("check_device", &cuda::check_device);
  m.def("limit_shared_bytes", [](int64_t bytes) {
    cuda::limit_shared_bytes(bytes);
    forget_kept_cuda_plans();
  });
  m.def("cuda_paths", &cuda_paths);
#endif
}
