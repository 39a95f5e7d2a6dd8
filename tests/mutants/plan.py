"""Breaks of csrc/plan and bindings.cpp: what a step compares, checks and keeps around the kernels."""

from .mutant import Mutant

PLAN = "csrc/plan/step_plan.cpp"
GATHER = "csrc/plan/gather.cpp"
EXECUTOR = "csrc/plan/executor.cpp"
CUDA = "csrc/plan/cuda_executor.cpp"
BINDINGS = "csrc/bindings.cpp"

MUTANTS = (
    Mutant(
        "another parameter in the list goes unnoticed",
        PLAN,
        old="if (PyList_GET_ITEM(params[g].ptr(), i) != slot->object.ptr()) return false;",
        new="if (PyList_GET_ITEM(params[g].ptr(), i) == nullptr) return false;",
        seen_by=("test_step_plan*",),
    ),
    Mutant(
        "a parameter that has moved goes unnoticed",
        PLAN,
        old="return x.param.data_ptr() == x.data && x.param.sizes()",
        new="return x.param.sizes()",
        seen_by=("test_step_plan*",),
    ),
    Mutant(
        "a parameter in another memory order goes unnoticed",
        PLAN,
        old=" && x.param.strides() == x.strides &&",
        new=" &&",
        seen_by=("test_step_plan*",),
    ),
    Mutant(
        "a negated gradient is taken as it lies",
        GATHER,
        old="if (x.is_neg()) return false;",
        new="",
        seen_by=("test_step_plan*",),
    ),
    Mutant(
        "a gradient of another shape is taken",
        GATHER,
        old="x.sizes() != param.sizes())",
        new="x.dim() != param.dim())",
        seen_by=("test_step_plan*",),
    ),
    Mutant(
        "new buffers may share memory",
        GATHER,
        old="if (newcomers) check_distinct(all.inputs);",
        new="if (newcomers && all.inputs.empty()) check_distinct(all.inputs);",
        seen_by=("test_step_plan*",),
    ),
    Mutant(
        "a gather that fails leaves the one before",
        GATHER,
        old="""\
  gathered_.reset();
  if (!matches(params)) return false;
""",
        new="""\
  if (!matches(params)) return false;
""",
        seen_by=("test_step_plan*",),
    ),
    Mutant(
        "a buffer that a step has changed keeps its version",
        PLAN,
        old="    bump_version(inputs.states[s]);\n",
        new="",
        seen_by=("test_step_plan*",),
    ),
    Mutant(
        "an overflow in the first step leaves buffers behind",
        PLAN,
        old="if (host_must_know && scaler.overflowed()) return;",
        new="if (host_must_know && !scaler.found_inf.defined() && scaler.overflowed()) return;",
        seen_by=("test_amp",),
    ),
    Mutant(
        "gradients are multiplied by the loss scale",
        EXECUTOR,
        old="h.unscale(scaler.grad_scale.item<double>());",
        new="h.unscale(1 / scaler.grad_scale.item<double>());",
        seen_by=("test_amp",),
    ),
    Mutant(
        "a launch takes one param group too many",
        CUDA,
        old="place_in(*tables) == most.param_groups) {",
        new="place_in(*tables) > most.param_groups) {",
        seen_by=("test_cuda_paths", "test_cuda_steps"),
    ),
    Mutant(
        "a phase that is none is taken",
        BINDINGS,
        old="phase <= int(Phase::running),",
        new="phase <= int(Phase::running) + 1,",
        seen_by=("test_step_plan*",),
    ),
    Mutant(
        "the address of exclusive lasso is taken for group lasso's",
        BINDINGS,
        old='take_scalar(fields("exclusive_lasso"), made.device.exclusive_lasso)',
        new='take_scalar(fields("exclusive_lasso"), made.device.group_lasso)',
        seen_by=("test_cuda_rows*",),
    ),
    Mutant(
        "a list on the device outlives what others write",
        "csrc/plan/cuda_executor.cpp",
        old="if (use == HeldList::Use::begin) tables.held",
        new="if (use == HeldList::Use::none) tables.held",
        seen_by=("test_skip_dead", "test_cuda_skip_dead"),
    ),
    Mutant(
        "another tensor's list is cleared",
        "csrc/plan/cuda_executor.cpp",
        old="if (of.groups == 0) of.begin = strip.first_group;",
        new="of.begin = strip.first_group;",
        seen_by=("test_skip_dead", "test_cuda_skip_dead"),
    ),
    Mutant(
        "a tensor without a gradient loses its list",
        "csrc/plan/cuda_executor.cpp",
        old="if (tensors[i].phase == Phase::skipped) continue;",
        new="",
        seen_by=("test_cuda_skip_dead",),
    ),
)
