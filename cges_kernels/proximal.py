"""What the optimizers share: torch.optim's interface around a planner. No mathematics here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable

from .backends import operators
from .backends.graphs import is_capturing
from .backends.plan import Plan
from .backends.planner import Planner, backend_of, is_sharded, param_names
from .backends.registry import check_backend
from .backends.states import new_step
from .core import reference
from .core.checks import check_param_group, check_states
from .core.hyperparameters import COEFFICIENTS
from .core.names import by_name
from .core.rules import STEP, Rule

# torch's own; before 2.13 it knew CUDA alone
_capture_health_check: Callable[[Optimizer], None] = (
    getattr(Optimizer, "_accelerator_graph_capture_health_check", None)
    or Optimizer._cuda_graph_capture_health_check
)
PENALTY_OPTIONS = (*COEFFICIENTS, "group_by", "view")


def _make_sharded_plan(*args: Any) -> Plan:
    from .distributed.sharded import ShardedPlan  # only here: torch.distributed takes its time

    return ShardedPlan(*args)


class ProximalOptimizer(Optimizer):
    """An optimizer of torch.optim followed by the proximal map: its ``rule``, and what surrounds any rule.

    A class of its own has a rule and an __init__ that names its arguments; see :class:`ProxSGD`.
    """

    rule: ClassVar[Rule]

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], backend: str) -> None:
        check_param_group(self.rule, defaults)
        check_backend(backend)
        self._planner = Planner(backend, self.rule, _make_sharded_plan)
        super().__init__(params, defaults)
        self._follow_fused()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer.add_param_group; the group is checked before it is taken."""
        super().add_param_group(param_group)
        try:
            self._planner.check(self.param_groups, first=len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise
        self._planner.forget()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch.optim's; keys that it lacks keep their present values.

        Where both sides have names of parameters, state goes by these, in whatever order they were saved.

        Raises:
            ValueError, TypeError, RuntimeError: what does not fit these parameters, or what step() would
                refuse (a spec, a coefficient, lr, a buffer's shape); nothing is loaded.
        """
        hook = self.register_load_state_dict_pre_hook(by_name)  # after hooks that may change names
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            expected, got = len(self.param_groups), len(state_dict["param_groups"])
            if expected == got:
                raise
            raise ValueError(f"state_dict: expected {expected} param groups, got {got}") from error
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_backend": self._planner.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For unpickling and load_state_dict, whose errors come from here: before anything has changed."""
        kept, before = self.__dict__.get("_planner"), self.__dict__.get("param_groups", [])
        defaults = state.get("defaults") or self.defaults
        for i, group in enumerate(state["param_groups"]):
            for key, value in {**defaults, **(before[i] if before else {})}.items():
                group.setdefault(key, value)
            for name, p in zip(param_names(state["param_groups"], i), group["params"]):
                entry = state["state"].get(p, {})
                if STEP in entry and self.rule.counts and not isinstance(entry[STEP], Tensor):
                    entry[STEP] = new_step(p, group) + float(entry[STEP])  # of an old torch
                check_states(name, p, entry, self.rule)
        if kept is not None:
            kept.check(state["param_groups"])
        state = dict(state)
        backend = state.pop("_backend", "auto")
        self._planner = Planner(backend, self.rule, _make_sharded_plan) if kept is None else kept
        self._planner.forget()
        super().__setstate__(state)
        self._follow_fused()

    def _follow_fused(self) -> None:
        """As in torch.optim.SGD, fused=True alone says that step() unscales gradients by itself."""
        if self.defaults["fused"]:
            self._step_supports_amp_scaling = True

    def refresh(self) -> None:
        """Look at all weights and states anew in the next step, whatever ``skip_dead`` has learnt of them.

        For those who write these in a way that moves no version of theirs: through ``.data``, NumPy, a
        storage, or a flat buffer that ``p.data`` was made a view of; by a collective of torch.distributed, in
        another process, or in a kernel of their own.
        """
        self._planner.forget()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step; ``closure`` re-evaluates the model and returns the loss, as in torch.optim.

        torch.amp.GradScaler may leave the attributes ``grad_scale`` and ``found_inf`` (fused=True): gradients
        are divided by the one, and where the other is not 0 nothing changes, state included.
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
            self._planner.gather(self.param_groups, self.state)
            self._planner.run(*self._scaler())
            if capturing:
                self._planner.keep_for_graph()
        except BaseException:
            self._planner.forget()  # and with it the gradients that plans have gathered
            raise
        return loss

    def _scaler(self) -> tuple[Tensor | None, Tensor | None]:
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None)

    def _check_capture(self) -> bool:
        """Whether a graph is being captured; then a replay must do what the captured step does."""
        capturing = is_capturing()
        if capturing or self.defaults["capturable"]:
            _capture_health_check(self)
        if capturing:
            self._planner.check_capture(self.param_groups, self.state)
        return capturing

    def _compiled_step(self, closure: Callable[[], Any] | None) -> Any:
        """What torch.compile traces: collect everything, one operator, keep new states."""
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
        """Collect what torch.compile is to step of a param group; by torch.optim's name, which it knows."""
        if group["differentiable"] or any(map(is_sharded, group["params"])):
            raise RuntimeError(
                "torch.compile: expected plain tensors and differentiable=False in a step, got others"
            )
        for key in self.rule.options:
            if isinstance(group[key], Tensor):
                raise TypeError(f"torch.compile: expected a number as {key}, got a tensor")
        for p in group["params"]:
            if p.grad is not None:
                params.append(p)
                grads.append(p.grad)
                entry = self.state.get(p, {})
                states.extend(entry.get(name) for name in self.rule.states_with(group))
                steps.append(entry.get(STEP) if self.rule.counts else None)

    @torch.no_grad()
    def penalty(self) -> Tensor:
        """Omega summed over this optimizer's parameters: a 0-d tensor, to log the objective."""
        terms = [
            reference.omega(p, **{key: group[key] for key in PENALTY_OPTIONS})
            for group in self.param_groups
            for p in group["params"]
        ]
        terms = [term.full_tensor() if is_sharded(term) else term for term in terms]
        return torch.stack([term.to(terms[0]) for term in terms]).sum() if terms else torch.zeros(())
