"""ProxSGD: torch.optim.SGD with structured sparsity. No mathematics here; see core/reference.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable

from .backends import operators
from .backends.graphs import is_capturing
from .backends.plan import Plan
from .backends.planner import Planner, backend_of, is_sharded, param_names
from .backends.registry import check_backend
from .core import reference
from .core.checks import check_companion, check_param_group
from .core.groups import GroupSpec
from .core.hyperparameters import COEFFICIENTS, SGD_OPTIONS, SGD_STATE, keeps_state
from .core.names import by_name

# torch's own; before 2.13 it knew CUDA alone
_capture_health_check: Callable[[Optimizer], None] = (
    getattr(Optimizer, "_accelerator_graph_capture_health_check", None)
    or Optimizer._cuda_graph_capture_health_check
)
PENALTY_OPTIONS = (*COEFFICIENTS, "group_by", "view")


def _make_sharded_plan(*args: Any) -> Plan:
    from .distributed.sharded import ShardedPlan  # only here: torch.distributed takes its time

    return ShardedPlan(*args)


class ProxSGD(Optimizer):
    """Plain proximal SGD; not Yang et al. 2020's method of the same name.

    One step is what torch.optim.SGD would write, z, followed by the proximal map of lr * Omega,

        Omega(W) = sum_g  group_lasso*||w_g||_2 + (exclusive_lasso/2)*||w_g||_1^2 + l1*||w_g||_1

    over the groups g that ``group_by`` makes, so that weights and whole groups become exactly zero
    (CGES: Yoon and Hwang, Combined Group and Exclusive Sparsity for Deep Neural Networks, ICML 2017).
    All parameters of all fused param groups are updated in one pass. DTensors (FSDP2, tensor parallelism) are
    served too: groups that cross shards are exact, and only their sums travel; see distributed/sharded.py.

    The thresholds are lr*coefficient, as in the thesis's Algorithm 1. With constant momentum m and
    dampening d the fixed point minimises f + (1-m)/(1-d) * Omega: at momentum 0.9 the same sparsity needs
    ten times the coefficient, and dampening = momentum restores f + Omega. Weight decay is coupled, as in
    torch.optim.SGD (with l1: an elastic net).

    Args:
        params: parameters, param groups or named parameters, as for torch.optim.SGD.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as for torch.optim.SGD.
        group_lasso: alpha, the weight of each group's l2 norm: whole groups become zero.
        exclusive_lasso: beta, the weight of each group's squared l1 norm: entries of a group compete.
        l1: gamma, the weight of the l1 norm. These three and lr may be tensors of one element; kernels read
            float32 ones on their parameters' GPU (not for DTensors), so that a change in place needs no host,
            no new capture and no compilation.
        group_by: "feature" (default), "filter", "channel", "tensor" or a tuple of the reduced dims. Named
            specs apply group_lasso and exclusive_lasso to tensors of two or more dims only, l1 to all.
        view: a shape; group_by then refers to ``w.view(view)``.
        prox_mode: "sequential" (the thesis: one threshold after the other) or "exact" (the proximal operator
            of Omega). They agree only as lr*exclusive_lasso*n -> 0 (n = group size); at 1 and above
            sequential zeroes nearly everything, and a warning says so once.
        freeze_zeros: None, "group" or "element": what is exactly 0 before a step stays 0, momentum included.
        foreach, differentiable: True takes the reference executor.
        capturable: whether steps may be captured in a CUDA graph, as in torch.optim: after a first step
            outside. Numbers are fixed in the graph, tensors are read at each replay.
        fused: None takes a fused executor where one serves, True demands one and lets torch.amp.GradScaler
            leave unscaling to step(), False takes the reference.
        backend: "auto", "reference", "cpu", "triton" or "cuda". The only argument that is not a key of the
            param groups, and in no state_dict.

    Raises:
        ValueError, TypeError, RuntimeError: whatever cannot be served, with what was expected and what came,
            before anything is written.

    Example:
        >>> optimizer = ProxSGD(cges_param_groups(model, lam=1e-4), lr=0.1, momentum=0.9)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        group_lasso: float = 0.0,
        exclusive_lasso: float = 0.0,
        l1: float = 0.0,
        group_by: GroupSpec = "feature",
        view: Sequence[int] | None = None,
        prox_mode: str = "sequential",
        freeze_zeros: str | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
        backend: str = "auto",
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            group_lasso=group_lasso,
            exclusive_lasso=exclusive_lasso,
            l1=l1,
            group_by=group_by,
            view=view,
            prox_mode=prox_mode,
            freeze_zeros=freeze_zeros,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            capturable=capturable,
            fused=fused,
        )
        check_param_group(defaults)
        check_backend(backend)
        self._planner = Planner(backend, _make_sharded_plan)
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
        """Load a state_dict of ProxSGD or torch.optim.SGD; keys that it lacks keep their present values.

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
                buf = state["state"].get(p, {}).get(SGD_STATE)
                if buf is not None:
                    check_companion(SGD_STATE, name, p, buf)
        if kept is not None:
            kept.check(state["param_groups"])
        state = dict(state)
        backend = state.pop("_backend", "auto")
        self._planner = Planner(backend, _make_sharded_plan) if kept is None else kept
        self._planner.forget()
        super().__setstate__(state)
        self._follow_fused()

    def _follow_fused(self) -> None:
        """As in torch.optim.SGD, fused=True alone says that step() unscales gradients by itself."""
        if self.defaults["fused"]:
            self._step_supports_amp_scaling = True

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
        """What torch.compile traces: collect everything, one operator, keep new buffers."""
        loss = None if closure is None else closure()
        with torch.no_grad():
            collected = []
            for group in self.param_groups:
                params: list[Tensor] = []
                grads: list[Tensor] = []
                buffers: list[Tensor | None] = []
                self._init_group(group, params, grads, buffers)
                backend = backend_of(self._planner.backend, group)
                collected.append(operators.Collected(group, backend, params, grads, buffers))
            for p, buf in operators.step(collected, *self._scaler()):
                self.state[p][SGD_STATE] = buf
        return loss

    def _init_group(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], buffers: list[Tensor | None]
    ) -> None:
        """Collect what torch.compile is to step of a param group; by torch.optim's name, which it knows."""
        if group["differentiable"] or any(map(is_sharded, group["params"])):
            raise RuntimeError(
                "torch.compile: expected plain tensors and differentiable=False in a step, got others"
            )
        for key in SGD_OPTIONS:
            if isinstance(group[key], Tensor):
                raise TypeError(f"torch.compile: expected a number as {key}, got a tensor")
        for p in group["params"]:
            if p.grad is not None:
                params.append(p)
                grads.append(p.grad)
                if keeps_state(group):
                    buffers.append(self.state.get(p, {}).get(SGD_STATE))

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
