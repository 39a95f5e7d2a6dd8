// The Python module cges_kernels.backends._C. It turns the hyperparameters of core/hyperparameters.py into
// those of common/step.h, and offers StepPlan (for optimizers), Executor (for calls without a plan) and what
// tests need.
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

// The fields of Hyperparameters in core/hyperparameters.py, and the options of each rule in core/rules.py.
// They come as tuples without names, in this order.
constexpr std::array kFields = {"lr",        "group_lasso", "exclusive_lasso",
                                "l1",        "prox_mode",   "freeze_zeros",
                                "skip_dead", "rule",        "options"};
constexpr std::array kSgdOptions = {"momentum", "dampening", "weight_decay", "nesterov", "maximize"};
constexpr std::array kAdamwOptions = {
    "betas",          "eps",  "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay", "capturable",
    "differentiable", "fused"};

// The entries of such a tuple by their names.
template <size_t n>
class Fields {
 public:
  Fields(const char* what, const py::tuple& values, const std::array<const char*, n>& names)
      : values_(values), names_(names) {
    TORCH_CHECK_VALUE(values.size() == n,
                      text(what, ": expected ", n, " fields, got ", values.size()).c_str());
  }
  py::handle operator()(const char* name) const {
    const auto at = std::find(names_.begin(), names_.end(), std::string_view(name)) - names_.begin();
    return PyTuple_GET_ITEM(values_.ptr(), at);
  }
  double number(const char* name) const { return (*this)(name).template cast<double>(); }
  bool flag(const char* name) const { return (*this)(name).template cast<bool>(); }

 private:
  const py::tuple values_;
  const std::array<const char*, n>& names_;
};

// One of the SCALARS of core/hyperparameters.py: a number, or an At, which holds the address of a number that
// kernels read themselves. For an At, sets `address` and returns 0.
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

void take_sgd(const py::tuple& values, double lr, Hyperparameters& made) {
  const Fields options("options", values, kSgdOptions);
  made.sgd = {lr, options.number("momentum"), 1 - options.number("dampening"), options.number("weight_decay"),
              options.flag("maximize") ? -1.0 : 1.0};
  made.nesterov = options.flag("nesterov");
}

void take_adamw(const py::tuple& values, double lr, Hyperparameters& made) {
  const Fields options("options", values, kAdamwOptions);
  const auto betas = options("betas").cast<std::pair<double, double>>();
  made.adamw = {.lr = lr,
                .beta1 = betas.first,
                .beta2 = betas.second,
                .eps = options.number("eps"),
                .weight_decay = options.number("weight_decay"),
                .grad_sign = options.flag("maximize") ? -1.0 : 1.0,
                .decoupled = options.flag("decoupled_weight_decay")};
  const py::handle fused = options("fused");
  made.step_on_device = options.flag("capturable") || (!fused.is_none() && fused.cast<bool>());
}

Hyperparameters to_hyperparameters(const py::tuple& values) {
  const Fields fields("hyperparameters", values, kFields);
  Hyperparameters made;
  made.rule = rule_named(fields("rule").attr("name").cast<std::string>());
  const double lr = take_scalar(fields("lr"), made.device.lr);
  const auto options = fields("options").cast<py::tuple>();
  made.rule == Rule::sgd ? take_sgd(options, lr, made) : take_adamw(options, lr, made);
  made.coefficients = {take_scalar(fields("group_lasso"), made.device.group_lasso),
                       take_scalar(fields("exclusive_lasso"), made.device.exclusive_lasso),
                       take_scalar(fields("l1"), made.device.l1)};
  made.exact = fields("prox_mode").cast<std::string>() == "exact";
  made.freeze = to_freeze(fields("freeze_zeros"));
  made.skip_dead = fields.flag("skip_dead");
  return made;
}

ScalerTensors to_scaler(const std::optional<at::Tensor>& grad_scale,
                        const std::optional<at::Tensor>& found_inf) {
  return {grad_scale.value_or(at::Tensor()), found_inf.value_or(at::Tensor())};
}

std::unique_ptr<Executor> executor_for(const std::string& name, const std::vector<at::Tensor>& tensors,
                                       const std::vector<LayoutTuple>& layouts,
                                       const std::vector<int64_t>& param_groups, const std::string& rule) {
  std::vector<TensorShape> shapes;
  for (size_t i = 0; i < tensors.size(); ++i)
    shapes.push_back(shape_of(tensors[i], layouts.at(i), param_groups.at(i)));
  return make_executor(name, rule_named(rule), std::move(shapes));
}

// One step without a plan, for backends/unplanned.py. A row describes a tensor: the fields of Row in
// backends/gathering.py.
void step(Executor& executor, const std::vector<std::array<int64_t, 7>>& rows,
          const std::vector<py::tuple>& hyperparameters, const std::optional<at::Tensor>& grad_scale,
          const std::optional<at::Tensor>& found_inf) {
  std::vector<TensorInStep> tensors;
  const auto pointer = [](int64_t address) { return reinterpret_cast<void*>(address); };
  for (const auto& [w, grad, state_0, state_1, phase, count, count_address] : rows) {
    TORCH_CHECK_VALUE(phase >= int(Phase::skipped) && phase <= int(Phase::running),
                      text("phase: expected one of Phase, got ", phase).c_str());
    tensors.push_back({pointer(w),
                       pointer(grad),
                       {pointer(state_0), pointer(state_1)},
                       Phase(phase),
                       double(count),
                       static_cast<float*>(pointer(count_address))});
  }
  std::vector<Hyperparameters> of_groups;
  for (const py::tuple& h : hyperparameters) of_groups.push_back(to_hyperparameters(h));
  executor.step(tensors, of_groups, to_scaler(grad_scale, found_inf));
}

// The number of threads on which a parallel region of this build really runs. If torch has more than one and
// this is 1, OpenMP was not linked.
int64_t parallel_threads() {
  std::atomic<int64_t> ran{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { ++ran; });
  return ran;
}

#if CGES_CUDA
// For tests: the number of work items of each path into which the CUDA executor cuts tensors of these
// layouts, as (rows, tiles, tiles of shared panels, chunks).
std::tuple<int64_t, int64_t, int64_t, int64_t> cuda_paths(const std::vector<LayoutTuple>& layouts,
                                                          int64_t dtype, int index, const std::string& name) {
  const Rule rule = rule_named(name);
  std::vector<TensorShape> shapes;
  for (const auto& [K1, R1, K2, R2, has_groups] : layouts)
    shapes.push_back({{K1, R1, K2, R2}, has_groups, DType(dtype), index, 0});
  const cuda::Work work = cuda::cut(shapes, rule, DType(dtype), cuda::describe_device(index, rule));
  return {work.strips.size(), work.tiles.size() - work.tiles_in_parts, work.tiles_in_parts,
          work.chunks.size()};
}
#endif

}  // namespace

// The tests load a second build of this module into the same process, whose CUDA kernels run on the CPU.
// module_local keeps the classes of the two apart.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Fused proximal optimizers: the C++ side of cges_kernels.";
  py::class_<Executor>(m, "Executor", py::module_local())
      .def(py::init(&executor_for), py::arg("name"), py::arg("tensors"), py::arg("layouts"),
           py::arg("param_groups"), py::arg("rule") = "sgd")
      .def("step", &step, py::arg("rows"), py::arg("hyperparameters"), py::arg("grad_scale") = py::none(),
           py::arg("found_inf") = py::none());
  py::class_<StepPlan>(m, "StepPlan", py::module_local())
      .def(py::init<const std::vector<py::list>&, const std::vector<std::vector<LayoutTuple>>&,
                    const std::string&, const std::string&>(),
           py::arg("params"), py::arg("layouts"), py::arg("rule") = "sgd", py::arg("executor") = "")
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
  m.def("limit_vector_bytes", &cpu::limit_vector_bytes);
  m.attr("cuda") = bool(CGES_CUDA);
  m.attr("emulated") = bool(CGES_EMULATED);
  // For tests, which compare these with their counterparts in Python.
  py::dict states;
  for (const RuleStates& x : kRuleStates)
    states[x.rule] = std::vector<std::string>(x.names.begin(), x.names.begin() + x.n);
  m.attr("states") = states;
  m.attr("step_name") = kStep;
  m.attr("fields") = kFields;
  m.attr("options") = py::dict(py::arg("sgd") = kSgdOptions, py::arg("adamw") = kAdamwOptions);
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
  m.def("cuda_paths", &cuda_paths, py::arg("layouts"), py::arg("dtype"), py::arg("index"),
        py::arg("rule") = "sgd");
#endif
}
