"""Chooses which plan steps which param group of an optimizer, keeps plans between steps, and renews them.

Each step compares everything that a plan depends on with its last value. The plan itself compares its
parameters. The planner compares the hyperparameters, and all that determines executors and layouts.
`ProximalOptimizer` (proximal.py) owns one Planner.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_changed, check_distinct, check_param_group, named_layouts
from ..core.groups import GroupedLayout
from ..core.hyperparameters import SCALARS, Hyperparameters, Reader, can_be_read
from ..core.numbers import scalar
from ..core.rules import STEP, Rule
from ..core.tensors import has_other_gradient, is_sharded
from .plan import Plan, Spec
from .registry import choose_backend, make_plan

EXECUTOR_OPTIONS = ("foreach", "differentiable", "capturable", "fused", "group_by", "view")
IN_KERNELS = ("cuda", "triton")  # executors whose kernels can read SCALARS on the device
SHARDED = "sharded"  # the name of the plan of param groups with DTensors, which steps the local parts

ParamGroups = list[dict[str, Any]]
# Takes the rule, params, specs, names of params and executors of param groups; see distributed/sharded.py.
MakeShardedPlan = Callable[
    [Rule, list[list[Tensor]], list[list[Spec]], list[list[str]], list[str]],
    Plan,
]


def param_names(param_groups: ParamGroups, index: int) -> list[str]:
    """The names by which errors refer to the parameters of a param group."""
    return [f"param_groups[{index}]['params'][{i}]" for i in range(len(param_groups[index]["params"]))]


def _identity(p: Tensor) -> tuple[Any, ...]:
    """The properties of a parameter on which its layout and the choice of an executor depend."""
    place = p.layout, p.dtype, p.shape, p.layout == torch.strided and p.stride()
    return id(p), has_other_gradient(p), *place


def _local(p: Tensor) -> Tensor:
    """The tensor that executors step for `p`: the local part of a DTensor, or `p` itself."""
    return p.to_local() if is_sharded(p) else p


def backend_of(backend: str, rule: Rule, group: dict[str, Any]) -> str:
    """The backend to ask for in a param group, from the optimizer's `backend` and torch.optim's options."""
    wishes = [f"{key}=True" for key in ("foreach", "differentiable", *rule.reference_only) if group[key]]
    wishes += ["fused=False"] if group["fused"] is False else []
    if not wishes:
        return backend
    if backend not in ("auto", "reference"):
        raise RuntimeError(f"{wishes[0]} takes the reference executor, got backend={backend!r}")
    return "reference"


class Planner:
    """The plans of one optimizer. It reads the optimizer's param groups, and writes nothing to them.

    `make_sharded_plan` makes the plan of param groups with DTensors. It is not called where there are none.
    """

    def __init__(self, backend: str, rule: Rule, make_sharded_plan: MakeShardedPlan) -> None:
        self.backend, self.rule = backend, rule
        self._reader = Reader(rule)
        self._executor_options_of = itemgetter(*EXECUTOR_OPTIONS, *rule.reference_only)
        self._make_sharded_plan = make_sharded_plan
        self.warned = False
        self._in_graphs: list[dict[str, Plan]] = []  # plans whose tables the replays of captured graphs read
        self._replayed = False  # whether replays of captured graphs may step behind the host's back
        self.forget()

    def forget(self) -> None:
        """Drop all plans, so that the next step builds them anew."""
        self.plans: dict[str, Plan] = {}  # {executor: its plan}
        # The lists below have one entry for each param group.
        self.executors: list[str] = []
        self._key: Any = None
        self._group_sizes: list[int] = []
        self._values: list[Any] = []
        self._types: list[Any] = []  # the types of the group's values
        self._have_tensors: list[bool] = []  # whether some of them are tensors
        self._devices: list[torch.device | None] = []

    def check(self, param_groups: ParamGroups, first: int = 0) -> None:
        """Raise the errors of step() for param groups from index `first` on, before gradients exist."""
        for index, group in list(enumerate(param_groups))[first:]:
            check_param_group(self.rule, group)
            self._layouts(param_groups, index)
        self._check_distinct(param_groups)
        for index in range(first, len(param_groups)):
            self._executor(param_groups, index)

    def gather(self, param_groups: ParamGroups, state: dict[Tensor, Any]) -> None:
        """Bring plans up to date and let them collect the step's inputs; a step raises its errors here."""
        for again in (True, False):
            self._prepare(param_groups)
            try:
                if all(plan.gather(self._served(param_groups, e), state) for e, plan in self.plans.items()):
                    return
            except RuntimeError:
                if not (again and self._has_other_gradients(param_groups)):
                    raise
            self.forget()  # a parameter moved or was replaced, or its executor does not serve its gradient
        raise RuntimeError("expected parameters that stay in place during a step, got some that moved twice")

    def run(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Run the gathered step. The sharded plan goes first, because its ranks then agree on found_inf."""
        for executor in sorted(self.plans, key=lambda e: e != SHARDED):
            agreed = self.plans[executor].run(grad_scale=grad_scale, found_inf=found_inf)
            found_inf = agreed if executor == SHARDED else found_inf

    def expect_replays(self) -> None:
        """Skip no dead groups from here on, because of the graph into which the next step is captured.

        Its replays write without moving a version, so a plan cannot tell which groups are still held, in the
        graph or outside.
        """
        if not self._replayed:
            self._replayed = True
            self._values = [None] * len(self._values)  # so that plans are told

    def keep_for_graph(self) -> None:
        """Keep the present plans alive for the graph that has just been captured."""
        self._in_graphs.append(dict(self.plans))

    def check_capture(self, param_groups: ParamGroups, state: dict[Tensor, Any]) -> None:
        """Raise a RuntimeError if replays of a captured step would differ from steps, or would need the host.

        A graph cannot hold a first step, which would begin momentum afresh at each replay, and it cannot
        leave a parameter without a gradient for later.
        """
        if self._key is None or self._keys(param_groups) != self._key:
            raise RuntimeError("expected a step of the same parameters and options before the capture of one")
        for index, group in enumerate(param_groups):
            device, executor = self._devices[index], self.executors[index]
            if executor not in IN_KERNELS:
                raise RuntimeError(
                    f"param_groups[{index}]: expected an executor of {IN_KERNELS}, which need no host, "
                    f"during capture, got {executor!r}"
                )
            for key in SCALARS:
                if isinstance(group[key], Tensor) and not can_be_read(group[key], device):
                    value = group[key]
                    raise RuntimeError(
                        f"param_groups[{index}]['{key}']: expected a number, or a float32 tensor of one "
                        f"element on {device} that replays can read, got {value.dtype} on {value.device}"
                    )
            if self._hyperparameters(index, group) != self._values[index]:
                raise RuntimeError(
                    f"param_groups[{index}]: expected the last step's hyperparameters during capture, got "
                    "others: step once before with these"
                )
            for name, p in zip(param_names(param_groups, index), group["params"]):
                if p.grad is None:
                    raise RuntimeError(
                        f"{name}: expected a gradient during capture, got None: no replay would step it"
                    )
                for key in self.rule.states_with(group):
                    if state.get(p, {}).get(key) is None:
                        raise RuntimeError(
                            f"{name}: expected its {key} during capture, got none: step once before"
                        )
                if self.rule.counts and not state[p][STEP].is_cuda and p.is_cuda:
                    raise RuntimeError(
                        f"{name}: expected its {STEP} on {p.device} during capture, for replays to count, "
                        f"got it on {state[p][STEP].device}: give capturable=True"
                    )

    def _layouts(self, param_groups: ParamGroups, index: int) -> list[GroupedLayout]:
        """The layouts of a param group's parameters, after checks."""
        group = param_groups[index]
        return named_layouts(
            param_names(param_groups, index), group["params"], group["group_by"], group["view"]
        )

    def _check_distinct(self, param_groups: ParamGroups) -> None:
        """Raise an error where two parameters of the optimizer are the same or share memory."""
        names = [name for index in range(len(param_groups)) for name in param_names(param_groups, index)]
        check_distinct(names, [p for group in param_groups for p in group["params"]])

    def _executor(self, param_groups: ParamGroups, index: int) -> str:
        """The executor that steps a param group's parameters, or the local parts of DTensors."""
        group = param_groups[index]
        if group["differentiable"] and any(map(is_sharded, group["params"])):
            raise RuntimeError(
                "differentiable=True: expected plain tensors, got a DTensor, whose step is not"
            )
        local = list(map(_local, group["params"]))
        backend, fused = backend_of(self.backend, self.rule, group), group["fused"] is True
        named = zip(param_names(param_groups, index), group["params"])
        name, odd = next(((name, p) for name, p in named if has_other_gradient(p)), ("", None))
        if odd is None or (backend == "reference" and not fused):
            return choose_backend(backend, local, fused)
        if fused or backend != "auto":
            wish = "fused=True" if fused else f"backend={backend!r}"
            raise RuntimeError(
                f"{wish} cannot be served. {name}: expected a gradient of its own dtype, {odd.dtype}, got "
                f"{odd.grad_dtype if odd.grad is None else odd.grad.dtype}, which the reference alone steps"
            )
        return choose_backend("reference", local)

    def _has_other_gradients(self, param_groups: ParamGroups) -> bool:
        """Whether some gradients now have another dtype than their parameter, which fused plans refuse."""
        groups = (group for group, e in zip(param_groups, self.executors) if e != "reference")
        return any(has_other_gradient(p) for group in groups for p in group["params"])

    def _keys(self, param_groups: ParamGroups) -> list[tuple[Any, ...]]:
        """For each param group, all that its executor and layouts depend on and that no plan compares."""
        keys = []
        for index, group in enumerate(param_groups):
            key = self._executor_options_of(group)
            if list in map(type, key):  # a list may change in place, so a copy is kept
                key = tuple(tuple(x) if isinstance(x, list) else x for x in key)
            # Types come first: values of other types may compare equal, or not at all.
            key = (*map(type, key), *key)
            if index >= len(self.executors) or self.executors[index] == "reference":
                key = (*key, *(_identity(p) for p in group["params"]))
            keys.append(key)
        return keys

    def _prepare(self, param_groups: ParamGroups) -> None:
        """Bring the plans up to date, and check what has changed."""
        if self._key is None or self._keys(param_groups) != self._key:
            self._build(param_groups)
        for index, group in enumerate(param_groups):
            values = self._hyperparameters(index, group)
            if self._differentiates(index, group) or values != self._values[index]:
                self._take(index, group, values)
                self._values[index] = values

    def _build(self, param_groups: ParamGroups) -> None:
        """Choose executors and build all plans anew, after checks of everything."""
        self.forget()
        for group in param_groups:
            check_param_group(self.rule, group)
        layouts = [self._layouts(param_groups, i) for i in range(len(param_groups))]
        self._check_distinct(param_groups)
        executors = [self._executor(param_groups, i) for i in range(len(param_groups))]
        sharded = [any(map(is_sharded, group["params"])) for group in param_groups]
        self.executors = [SHARDED if s else e for s, e in zip(sharded, executors)]
        self._group_sizes = [
            max((x.layout.group_size for x in row if x.has_groups), default=0) for row in layouts
        ]
        self._devices = [kernel_device(e, group["params"]) for e, group in zip(self.executors, param_groups)]
        specs = [[(group["group_by"], group["view"])] * len(group["params"]) for group in param_groups]
        for executor in sorted(set(self.executors)):
            params = self._served(param_groups, executor)
            if executor == SHARDED:
                names = [param_names(param_groups, i) for i in range(len(param_groups))]
                self.plans[executor] = self._make_sharded_plan(self.rule, params, specs, names, executors)
            else:
                served = [
                    (x, s) if e == executor else ([], []) for x, s, e in zip(layouts, specs, self.executors)
                ]
                self.plans[executor] = make_plan(executor, self.rule, params, *map(list, zip(*served)))
        self._values = [None] * len(param_groups)
        self._types = [None] * len(param_groups)
        self._have_tensors = [False] * len(param_groups)
        self._key = self._keys(param_groups)

    def _differentiates(self, index: int, group: dict[str, Any]) -> bool:
        """Whether autograd may follow tensors among the hyperparameters; then each step takes them anew."""
        return bool(group["differentiable"]) and self.executors[index] == "reference"

    def _hyperparameters(self, index: int, group: dict[str, Any]) -> tuple[Any, ...]:
        """The values of a param group's hyperparameters, in the order of the reader's keys."""
        values: tuple[Any, ...] = self._reader.values_of(group)
        types = tuple(map(type, values))
        if self._differentiates(index, group):
            return values
        if types != self._types[index]:
            if self._types[index] is not None:
                # A value of another type, such as True for 1, may compare equal and still be refused.
                check_param_group(self.rule, group)
            self._types[index] = types
            self._have_tensors[index] = any(issubclass(x, Tensor) for x in types)
        if self._have_tensors[index] or not self._reader.are_lasting(values):
            return self._reader.numbers_of(group, self._devices[index], self.executors[index] == "reference")
        return values

    def _take(self, index: int, group: dict[str, Any], values: tuple[Any, ...]) -> None:
        """Check those hyperparameters of a param group that have changed, and pass all to its plan."""
        if (before := self._values[index]) is not None:  # if None, _build has just checked all
            new = zip(self._reader.keys, values, before)
            changed = [key for key, value, was in new if value is not was or isinstance(value, Tensor)]
            check_changed(self.rule, group, changed)
        hyperparameters = Hyperparameters.of_values(self.rule, values)
        may_be_strong = hyperparameters.exclusive_lasso != 0 and not hyperparameters.exact
        if may_be_strong and not (self.warned or hyperparameters.on_device):
            self._warn_of_strength(index, float(scalar("b", hyperparameters.thresholds().b)))
        executor = self.executors[index]
        if executor == "triton" or (executor == "cuda" and self._replayed):
            hyperparameters = hyperparameters._replace(skip_dead=False)
        self.plans[executor].set_hyperparameters(index, hyperparameters)

    def _warn_of_strength(self, index: int, b: float) -> None:
        """Warn, once, if sequential mode will zero far more of a param group's weights than exact mode."""
        strength = b * self._group_sizes[index]
        if strength >= 1:
            self.warned = True
            warnings.warn(
                f"param_groups[{index}]: lr*exclusive_lasso*group_size = {strength:.3g} >= 1: sequential "
                "mode zeroes far more than the proximal operator does; lower exclusive_lasso "
                "(scale='size' divides it by the group size) or use prox_mode='exact'",
                stacklevel=9,
            )

    def _served(self, param_groups: ParamGroups, executor: str) -> list[list[Tensor]]:
        """The parameters that `executor` serves, by param group; [] for the param groups of others."""
        return [
            list(group["params"]) if e == executor else [] for group, e in zip(param_groups, self.executors)
        ]


def kernel_device(executor: str, params: list[Tensor]) -> torch.device | None:
    """The device on which kernels can read lr and coefficients of a param group from tensors, if any."""
    devices = {p.device for p in params}
    return devices.pop() if executor in IN_KERNELS and len(devices) == 1 else None
