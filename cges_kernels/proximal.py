"""The code that ProxSGD and ProxAdamW share: the interface of torch.optim around a planner.

`ProximalOptimizer` keeps param groups and state as torch.optim does, and leaves each step to its `Planner`
(backends/planner.py). There is no mathematics here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable

from .backends import operators
from .backends.graphs import is_capturing
from .backends.plan import Plan
from .backends.planner import Planner, backend_of, param_names
from .backends.registry import check_backend
from .backends.states import new_step
from .core import reference
from .core.checks import check_flags, check_param_group, check_states
from .core.hyperparameters import COEFFICIENTS
from .core.names import by_name
from .core.rules import STEP, Rule
from .core.tensors import is_sharded

# torch.optim's own check. Before torch 2.13 it had another name, and was for CUDA alone.
_capture_health_check: Callable[[Optimizer], None] = (
    getattr(Optimizer, "_accelerator_graph_capture_health_check", None)
    or Optimizer._cuda_graph_capture_health_check
)
PENALTY_OPTIONS = (*COEFFICIENTS, "group_by", "view")


def _make_sharded_plan(*args: Any) -> Plan:
    from .distributed.sharded import ShardedPlan  # not at the top: torch.distributed is slow to import

    return ShardedPlan(*args)


class ProximalOptimizer(Optimizer):
    """The base of both optimizers: an update of torch.optim followed by the proximal map.

    A subclass sets `rule`, its update rule, and has an `__init__` that names its arguments; see
    [`ProxSGD`][cges_kernels.ProxSGD].
    """

    rule: ClassVar[Rule]

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], backend: str) -> None:
        check_param_group(self.rule, defaults)
        check_backend(backend)
        self._planner = Planner(backend, self.rule, _make_sharded_plan)
        super().__init__(params, defaults)
        self._follow_fused()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as torch.optim.Optimizer.add_param_group does.

        Args:
            param_group: a dict with the key "params" and any of the constructor's keyword arguments but
                `backend`.

        Raises:
            ValueError: a value that cannot be served; the optimizer then stays as it was.
            TypeError: a value of the wrong type; the optimizer then stays as it was.
            RuntimeError: parameters that the backend cannot serve; the optimizer then stays as it was.
        """
        super().add_param_group(param_group)
        try:
            self._planner.check(self.param_groups, first=len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise
        self._planner.forget()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class, or of its counterpart in torch.optim.

        Keys of the param groups that `state_dict` lacks keep their present values, so a file of
        torch.optim.SGD leaves the coefficients as they are. Where both sides have names of parameters, state
        goes by these names, in whatever order they were saved.

        Args:
            state_dict: a result of `state_dict()`. It must have as many param groups as this optimizer.

        Raises:
            ValueError: a state_dict that does not fit these parameters, or a value that `step` would refuse
                (a spec, a coefficient, lr). Nothing is loaded then.
            TypeError: a value of the wrong type. Nothing is loaded then.
            RuntimeError: a state that does not fit its parameter, such as a buffer of another shape, or
                another optimizer's state. Nothing is loaded then.
        """
        hook = self.register_load_state_dict_pre_hook(by_name)  # runs after hooks that change names
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            expected, got = len(self.param_groups), len(state_dict["param_groups"])
            if expected == got:
                raise
            raise ValueError(
                f"state_dict: expected {expected} param groups, got {got}: a file fits an optimizer that was "
                "built from the same param groups"
            ) from error
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_backend": self._planner.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take in a state for unpickling and load_state_dict: check all of it before anything changes."""
        kept, before = self.__dict__.get("_planner"), self.__dict__.get("param_groups", [])
        state = dict(state)
        defaults = {**self._own_defaults(), **state.get("defaults", {} if kept is None else self.defaults)}
        if kept is None:
            state["defaults"] = defaults
        for i, group in enumerate(state["param_groups"]):
            for key, value in {**defaults, **(before[i] if before else {})}.items():
                group.setdefault(key, value)
            for name, p in zip(param_names(state["param_groups"], i), group["params"]):
                entry = state["state"].get(p, {})
                if self.rule.counts and isinstance(entry.get(STEP), Real):
                    entry[STEP] = new_step(p, group) + float(entry[STEP])  # old torch saved a number
                check_states(name, p, entry, self.rule)
        if kept is not None:
            kept.check(state["param_groups"])
        backend = state.pop("_backend", "auto")
        self._planner = Planner(backend, self.rule, _make_sharded_plan) if kept is None else kept
        self._planner.forget()
        super().__setstate__(state)
        self._follow_fused()

    @classmethod
    def _own_defaults(cls) -> dict[str, Any]:
        """The defaults of the class that sets `rule`: an older pickle lacks options that were added since."""
        owner = next(c for c in cls.__mro__ if "rule" in vars(c))
        arguments = inspect.signature(owner).parameters.values()
        return {x.name: x.default for x in arguments if x.default is not x.empty and x.name != "backend"}

    def _follow_fused(self) -> None:
        """Let GradScaler leave unscaling to step() where fused=True is given to the constructor.

        As in torch.optim.SGD, a param group's own fused=True does not.
        """
        if self.defaults["fused"]:
            self._step_supports_amp_scaling = True

    def refresh(self) -> None:
        """Make the next step read all weights and states again, also the groups that `skip_dead` skips.

        Call it after a write to weights or states that does not increase their version (`p._version`):

        - through `.data`, NumPy or a storage;
        - through a flat buffer that `p.data` was made a view of;
        - by a collective of torch.distributed, in another process, or in a kernel of your own;
        - by the replay of a CUDA graph that holds anything but steps of this optimizer.
        """
        self._planner.forget()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step, as the optimizers of torch.optim do.

        torch.amp.GradScaler may leave the attributes `grad_scale` and `found_inf` (with `fused=True`).
        Gradients are then divided by `grad_scale`; where `found_inf` is not 0 nothing changes, state
        included.

        Args:
            closure: re-evaluates the model and returns the loss; None (default) for no such call.

        Returns:
            The result of `closure`, or None without one.

        Raises:
            ValueError: a hyperparameter that cannot be served, changed since the last step. Nothing is
                written then.
            TypeError: a hyperparameter, gradient or state of the wrong type. Nothing is written then.
            RuntimeError: a gradient or state that does not fit its parameter, a backend that cannot serve, or
                a capture in a CUDA graph whose replays would not be steps. Nothing is written then.
        """
        return self._compiled_step(closure) if torch.compiler.is_compiling() else self._step(closure)

    @_use_grad_for_differentiable
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            capturing = self._check_capture()
            if capturing:
                self._planner.expect_replays()
            self._planner.gather(self.param_groups, self.state)
            self._planner.run(*self._scaler())
            if capturing:
                self._planner.keep_for_graph()
        except BaseException:
            self._planner.forget()  # and with it the gradients that plans have gathered
            raise
        return loss

    def _scaler(self) -> tuple[Tensor | None, Tensor | None]:
        """`(grad_scale, found_inf)` that torch.amp.GradScaler has set on the optimizer, or None for each."""
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None)

    def _check_capture(self) -> bool:
        """Whether a CUDA graph is being captured; an error if its replays would not repeat this step."""
        capturing = is_capturing()
        if capturing or self.defaults["capturable"]:
            _capture_health_check(self)
        if capturing:
            self._planner.check_capture(self.param_groups, self.state)
        return capturing

    def _compiled_step(self, closure: Callable[[], Any] | None) -> Any:
        """The step as torch.compile traces it: collect tensors, call one operator, keep the new states."""
        loss = None if closure is None else closure()
        with torch.no_grad():
            collected = []
            for group in self.param_groups:
                params: list[Tensor] = []
                grads: list[Tensor] = []
                states: list[Tensor | None] = []
                steps: list[Tensor | None] = []
                self._init_group(group, params, grads, states, steps)
                backend = backend_of(self._planner.backend, self.rule, group)
                collected.append(operators.Collected(group, backend, params, grads, states, steps))
            for p, entry in operators.step(self.rule, collected, *self._scaler()):
                self.state[p].update(entry)
        return loss

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[Tensor | None],
        steps: list[Tensor | None],
    ) -> None:
        """Append to the lists the tensors of a param group that torch.compile is to step.

        The method has the name that torch.optim's optimizers use, because torch.compile looks for it.
        """
        if group["differentiable"] or any(map(is_sharded, group["params"])):
            raise RuntimeError(
                "torch.compile: expected plain tensors and differentiable=False in a step, got others"
            )
        check_flags(self.rule, group)
        for key in self.rule.options:
            several = group[key] if isinstance(group[key], (tuple, list)) else (group[key],)
            if any(isinstance(x, Tensor) for x in several):
                raise TypeError(f"torch.compile: expected numbers as {key}, got a tensor")
        for p in group["params"]:
            if p.grad is not None:
                params.append(p)
                grads.append(p.grad)
                entry = self.state.get(p, {})
                states.extend(entry.get(name) for name in self.rule.states_with(group))
                steps.append(entry.get(STEP) if self.rule.counts else None)

    @torch.no_grad()
    def penalty(self) -> Tensor:
        """The regulariser summed over this optimizer's parameters, to log the objective.

        Each parameter counts with the coefficients and the spec of its param group; see
        [`penalty`][cges_kernels.penalty] for the formula. The coefficients are not multiplied by lr.

        Returns:
            A tensor without dims, without a gradient. For DTensors it is the value over all ranks, so every
                rank must call it.
        """
        terms = [
            reference.omega(p, **{key: group[key] for key in PENALTY_OPTIONS})
            for group in self.param_groups
            for p in group["params"]
        ]
        terms = [term.full_tensor() if is_sharded(term) else term for term in terms]
        return torch.stack([term.to(terms[0]) for term in terms]).sum() if terms else torch.zeros(())
