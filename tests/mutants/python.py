"""Breaks of the Python that all executors share: reference, groups, checks, optimizer, plans, state."""

from .mutant import Mutant

REFERENCE = "cges_kernels/core/reference.py"
SHRINKAGE = "cges_kernels/core/shrinkage.py"
UPDATES = "cges_kernels/core/updates.py"
NUMBERS = "cges_kernels/core/numbers.py"
GROUPS = "cges_kernels/core/groups.py"
CHECKS = "cges_kernels/core/checks.py"
OPTIMIZER = "cges_kernels/proximal.py"
BACKENDS = "cges_kernels/backends"

MUTANTS = (
    Mutant(
        "the first buffer is the gradient itself",
        UPDATES,
        old="buf = grad.detach().clone() if buf is None else",
        new="buf = grad.detach() if buf is None else",
        seen_by=("test_optimizer", "test_scenarios"),
    ),
    Mutant(
        "an older pickle lacks the options that were added since",
        OPTIMIZER,
        old="defaults = {**self._own_defaults(), **state",
        new="defaults = {**state",
        seen_by=("test_state",),
    ),
    Mutant(
        "a number may stand for a flag",
        CHECKS,
        old="BOOLS = (bool, np.bool_)",
        new="BOOLS = (bool, np.bool_, int, float)",
        seen_by=("test_bad_options",),
    ),
    Mutant(
        "a flag's new value is compared before its type",
        f"{BACKENDS}/planner.py",
        old="key = (*map(type, key), *key)",
        new="pass",
        seen_by=("test_bad_options",),
    ),
    Mutant(
        "a number for a flag is not seen beside a tensor",
        f"{BACKENDS}/planner.py",
        old="if self._types[index] is not None:",
        new="if self._types[index] is not None and Tensor not in types:",
        seen_by=("test_bad_options",),
    ),
    Mutant(
        "a bias is a group",
        SHRINKAGE,
        old="thresholds = thresholds if grouped else Thresholds(0.0, 0.0, thresholds.c)",
        new="thresholds = thresholds if grouped or v.dim() == 1 else Thresholds(0.0, 0.0, thresholds.c)",
        seen_by=("test_tiny_tensors", "test_reference", "test_prox_modes"),
    ),
    Mutant(
        "the reference's zeros keep their sign",
        SHRINKAGE,
        old="w = w + 0.0 if w.requires_grad or not holds_values(w) else w.add_(0.0)",
        new="w = w + 0.0 if w.requires_grad or not holds_values(w) else w",
        seen_by=("test_reference", "test_prox_modes", "test_exact_mode", "test_shrinkage_edges"),
    ),
    Mutant(
        "frozen weights keep their momentum",
        REFERENCE,
        old="return tuple(None if x is None else torch.where(frozen, 0.0, x) for x in updated)",
        new="return torch.where(frozen, 0.0, updated[0]), *updated[1:]",
        seen_by=("test_state*", "test_frozen_zeros"),
    ),
    Mutant(
        "sorted groups may have a t below l1's",
        SHRINKAGE,
        old="t = c + torch.stack(rises).amax(0).relu()",
        new="t = c + torch.stack(rises).amax(0)",
        seen_by=("test_reference", "test_prox_modes", "test_exact_mode", "test_shrinkage_edges"),
    ),
    Mutant(
        "the penalty counts exclusive lasso twice",
        REFERENCE,
        old="total = total + exclusive_lasso / 2 * norm1.square().sum()",
        new="total = total + exclusive_lasso * norm1.square().sum()",
        seen_by=("test_functional", "test_penalty"),
    ),
    Mutant(
        "layouts ask for no memory order",
        GROUPS,
        old="sorted((d for d in range(v.dim()) if v.shape[d] != 1), key=v.stride, reverse=True)",
        new="[d for d in range(v.dim()) if v.shape[d] != 1]",
        seen_by=("test_groups",),
    ),
    Mutant(
        "an infinite coefficient is taken",
        NUMBERS,
        old="if type(value) is float and 0 <= value < math.inf:",
        new="if type(value) is float and 0 <= value <= math.inf:",
        seen_by=("test_bad_*",),
    ),
    Mutant(
        "lr may become negative between steps",
        CHECKS,
        old='            check_not_negative("learning rate", scalar(name, group[name]))\n',
        new="",
        seen_by=("test_bad_*",),
    ),
    Mutant(
        "neighbours in memory count as one",
        CHECKS,
        old="if start < end:",
        new="if start <= end:",
        seen_by=("test_bad_*",),
    ),
    Mutant(
        "kernels read float64 as float32",
        "cges_kernels/core/hyperparameters.py",
        old="x.device == device and x.dtype == torch.float32 and x.numel() == 1",
        new="x.device == device and x.numel() == 1",
        seen_by=("test_capture",),
    ),
    Mutant(
        "a file of torch.optim.SGD resets each group's coefficients",
        OPTIMIZER,
        old="{**defaults, **(before[i] if before else {})}.items()",
        new="defaults.items()",
        seen_by=("test_state*", "test_frozen_zeros"),
    ),
    Mutant(
        "what a file holds is not checked",
        OPTIMIZER,
        old="""\
        if kept is not None:
            kept.check(state["param_groups"])
""",
        new="",
        seen_by=("test_bad_*",),
    ),
    Mutant(
        "a param group that was refused stays",
        OPTIMIZER,
        old="            self.param_groups.pop()\n",
        new="",
        seen_by=("test_bad_*",),
    ),
    Mutant(
        "a step that fails keeps the gradients that it gathered",
        OPTIMIZER,
        old="""\
            self._planner.forget()  # and with it the gradients that plans have gathered
            raise
""",
        new="            raise\n",
        seen_by=("test_step_plan*",),
    ),
    Mutant(
        "prox writes into its argument",
        "cges_kernels/functional.py",
        old="result = w.detach().clone()",
        new="result = w.detach()",
        seen_by=("test_functional", "test_penalty"),
    ),
    Mutant(
        "a list of dims changed in place goes unnoticed",
        f"{BACKENDS}/planner.py",
        old="key = tuple(tuple(x) if isinstance(x, list) else x for x in key)",
        new="key = tuple(key)",
        seen_by=("test_optimizer", "test_scenarios"),
    ),
    Mutant(
        "Python's plan takes a negated gradient as it lies",
        f"{BACKENDS}/gathering.py",
        old="if not x.is_neg() and (x.numel() == 0 or",
        new="if (x.numel() == 0 or",
        seen_by=("test_step_plan*",),
    ),
    Mutant(
        "Python's plan replaces an entry of the state",
        f"{BACKENDS}/gathering.py",
        old="entry = state.setdefault(slot.param, {})",
        new="entry = state[slot.param] = {}",
        seen_by=("test_step_plan*",),
    ),
    Mutant(
        "the executor that was used last is dropped first",
        f"{BACKENDS}/unplanned.py",
        old="_kept.popitem(last=False)",
        new="_kept.popitem(last=True)",
        seen_by=(
            "test_triton_bits",
            "test_triton_cuts",
            "test_triton_launches",
            "test_cuda_paths",
            "test_cuda_steps",
        ),
    ),
    Mutant(
        "a compiled first step reads an empty buffer",
        f"{BACKENDS}/operators.py",
        old="phase = Phase.of(keeps_state=bool(of_p), begun=not first)",
        new="phase = Phase.of(keeps_state=bool(of_p), begun=True)",
        seen_by=("test_compile", "test_operators"),
    ),
    Mutant(
        "a captured step skips what the last step held",
        "cges_kernels/proximal.py",
        old="self._planner.expect_replays()",
        new="pass",
        seen_by=("test_cuda_skip_dead",),
    ),
    Mutant(
        "refresh() forgets that graphs may be replayed",
        "cges_kernels/backends/planner.py",
        old="""        self.plans: dict[str, Plan] = {}  # {executor: its plan}
""",
        new="""        self.plans: dict[str, Plan] = {}  # {executor: its plan}
        self._replayed = False
""",
        seen_by=("test_cuda_skip_dead",),
    ),
    Mutant(
        "a capture brings Triton's tables up to date",
        "cges_kernels/backends/planner.py",
        old='if executor == "triton" or (executor == "cuda" and self._replayed):',
        new="if self._replayed:",
        seen_by=("test_capture",),
    ),
)
