"""ProxSGD: torch.optim.SGD with structured sparsity. No mathematics here; see reference.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable

from . import reference
from .checks import COEFFICIENTS, check_distinct, check_param_group, checked_inputs, scalar
from .groups import GroupSpec
from .ops import check_backend, choose_backend, make_plan, named_layouts

SGD_OPTIONS = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
PENALTY_OPTIONS = (*COEFFICIENTS, "group_by", "view")
PROX_OPTIONS = (*PENALTY_OPTIONS, "prox_mode", "freeze_zeros")
EXECUTOR_OPTIONS = ("foreach", "differentiable", "fused", "group_by", "view")


def _identity(p: Tensor) -> tuple[Any, ...]:
    return id(p), p.layout, p.dtype, p.shape, p.layout == torch.strided and p.stride()


class ProxSGD(Optimizer):
    """Plain proximal SGD; not Yang et al. 2020's method of the same name.

    One step is what torch.optim.SGD would write, z, followed by the proximal map of lr * Omega,

        Omega(W) = sum_g  group_lasso*||w_g||_2 + (exclusive_lasso/2)*||w_g||_1^2 + l1*||w_g||_1

    over the groups g that ``group_by`` makes, so that weights and whole groups become exactly zero
    (CGES: Yoon and Hwang, Combined Group and Exclusive Sparsity for Deep Neural Networks, ICML 2017).
    All parameters of all fused param groups are updated in one pass.

    The thresholds are lr*coefficient, as in the thesis's Algorithm 1. With constant momentum m and
    dampening d the fixed point minimises f + (1-m)/(1-d) * Omega: at momentum 0.9 the same sparsity needs
    ten times the coefficient, and dampening = momentum restores f + Omega. Weight decay is coupled, as in
    torch.optim.SGD (with l1: an elastic net).

    Args:
        params: parameters, param groups or named parameters, as for torch.optim.SGD.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as for torch.optim.SGD; lr may be a tensor.
        group_lasso: alpha, the weight of each group's l2 norm: whole groups become zero.
        exclusive_lasso: beta, the weight of each group's squared l1 norm: entries of a group compete.
        l1: gamma, the weight of the l1 norm.
        group_by: "feature" (default), "filter", "channel", "tensor" or a tuple of the reduced dims. Named
            specs apply group_lasso and exclusive_lasso to tensors of two or more dims only, l1 to all.
        view: a shape; group_by then refers to ``w.view(view)``.
        prox_mode: "sequential" (the thesis: one threshold after the other) or "exact" (the proximal operator
            of Omega). They agree only as lr*exclusive_lasso*n -> 0 (n = group size); at 1 and above
            sequential zeroes nearly everything, and a warning says so once.
        freeze_zeros: None, "group" or "element": what is exactly 0 before a step stays 0, momentum included.
        foreach, differentiable: True takes the reference executor.
        capturable: kept for torch.optim's sake. After one step another can be captured in a CUDA graph, with
            lr and coefficients fixed in it.
        fused: None takes a fused executor where one serves, True demands one, False takes the reference.
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
        self._backend = backend
        self._warned = False
        self._forget_plans()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer.add_param_group; the group is checked before it is taken."""
        super().add_param_group(param_group)
        try:
            check_param_group(self.param_groups[-1])
            self._layouts_of(len(self.param_groups) - 1)
            self._check_distinct()
            self._executor_of(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise
        self._forget_plans()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of ProxSGD or torch.optim.SGD; keys that it lacks keep their present values."""
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            expected, got = len(self.param_groups), len(state_dict["param_groups"])
            if expected == got:
                raise
            raise ValueError(f"state_dict: expected {expected} param groups, got {got}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For unpickling and load_state_dict: a key that is missing keeps the value it had, if any."""
        before = self.__dict__.get("param_groups", [])
        self.__dict__.setdefault("_backend", "auto")
        self.__dict__.setdefault("_warned", False)
        self._forget_plans()
        super().__setstate__(state)
        for i, group in enumerate(self.param_groups):
            kept = before[i] if i < len(before) else {}
            for key, value in {**self.defaults, **kept}.items():
                group.setdefault(key, value)

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step; ``closure`` re-evaluates the model and returns the loss, as in torch.optim."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            referred = self._gather()
            for plan in self._plans.values():
                plan.run()
        except BaseException:
            self._forget_plans()  # and with them the gradients that they have gathered
            raise
        for group, inputs in referred:
            self._reference_step(group, inputs)
        return loss

    @torch.no_grad()
    def penalty(self) -> Tensor:
        """Omega summed over this optimizer's parameters: a 0-d tensor, to log the objective."""
        terms = [
            reference.omega(p, **{key: group[key] for key in PENALTY_OPTIONS})
            for group in self.param_groups
            for p in group["params"]
        ]
        return torch.stack([term.to(terms[0]) for term in terms]).sum() if terms else torch.zeros(())

    # What follows keeps plans of who serves which group. Everything they depend on is compared each step.

    def _forget_plans(self) -> None:
        self._plans: dict[str, Any] = {}  # by executor
        self._plan_key: Any = None
        self._executors: list[str] = []
        self._group_sizes: list[int] = []
        self._values: list[Any] = []

    def _names(self, index: int) -> list[str]:
        return [
            f"param_groups[{index}]['params'][{i}]" for i in range(len(self.param_groups[index]["params"]))
        ]

    def _layouts_of(self, index: int) -> list[tuple[int, int, int, int, bool]]:
        """Check a group's parameters and work out their layouts."""
        group = self.param_groups[index]
        return named_layouts(self._names(index), group["params"], group["group_by"], group["view"])

    def _check_distinct(self) -> None:
        names = [name for index in range(len(self.param_groups)) for name in self._names(index)]
        check_distinct(names, [p for group in self.param_groups for p in group["params"]])

    def _executor_of(self, group: dict[str, Any]) -> str:
        backend = self._backend
        if group["foreach"] or group["differentiable"] or group["fused"] is False:
            if backend not in ("auto", "reference"):
                raise RuntimeError(
                    "foreach=True, differentiable=True and fused=False take the reference executor, "
                    f"got backend={backend!r}"
                )
            backend = "reference"
        return choose_backend(backend, group["params"], fused=group["fused"] is True)

    def _key_of(self, index: int) -> tuple[Any, ...]:
        """What a group's executor and layouts depend on; a plan itself compares its parameters."""
        group = self.param_groups[index]
        key = tuple(group[k] for k in EXECUTOR_OPTIONS)
        if index < len(self._executors) and self._executors[index] != "reference":
            return key
        return (*key, *(_identity(p) for p in group["params"]))

    def _prepare(self) -> None:
        """Bring the plans up to date, and check what has changed."""
        groups = range(len(self.param_groups))
        if self._plan_key is None or [self._key_of(i) for i in groups] != self._plan_key:
            self._forget_plans()
            for group in self.param_groups:
                check_param_group(group)
            layouts = [self._layouts_of(i) for i in groups]
            self._check_distinct()
            self._executors = [self._executor_of(group) for group in self.param_groups]
            self._group_sizes = [max((x[1] * x[3] for x in row if x[4]), default=0) for row in layouts]
            for executor in sorted(set(self._executors) - {"reference"}):
                served = [row if e == executor else [] for row, e in zip(layouts, self._executors)]
                self._plans[executor] = make_plan(executor, self._params_of(executor), served)
            self._values = [None] * len(self.param_groups)
            self._plan_key = [self._key_of(i) for i in groups]
        for i, group in enumerate(self.param_groups):
            values = [scalar(k, group[k]) for k in ("lr", *SGD_OPTIONS, *PROX_OPTIONS)]
            if values != self._values[i]:
                self._take_values(i, group)
                self._values[i] = values

    def _take_values(self, index: int, group: dict[str, Any]) -> None:
        check_param_group(group)
        lr, alpha, beta, gamma = (float(scalar(k, group[k])) for k in ("lr", *COEFFICIENTS))
        strength = lr * beta * self._group_sizes[index]
        if group["prox_mode"] == "sequential" and strength >= 1 and not self._warned:
            self._warned = True
            warnings.warn(
                f"param_groups[{index}]: lr*exclusive_lasso*group_size = {strength:.3g} >= 1: sequential "
                "mode zeroes far more than the proximal operator does; lower exclusive_lasso "
                "(scale='size' divides it by the group size) or use prox_mode='exact'",
                stacklevel=7,
            )
        if self._executors[index] != "reference":
            self._plans[self._executors[index]].set_hyperparameters(
                index,
                lr=lr,
                **{key: scalar(key, group[key]) for key in SGD_OPTIONS},
                a=lr * alpha,
                b=lr * beta,
                c=lr * gamma,
                exact=group["prox_mode"] == "exact",
                freeze=group["freeze_zeros"] or "",
            )

    def _params_of(self, executor: str) -> list[list[Tensor]]:
        return [
            list(group["params"]) if e == executor else []
            for group, e in zip(self.param_groups, self._executors)
        ]

    def _gather(self) -> list[tuple[dict[str, Any], list[tuple[Tensor, Tensor, Tensor | None]]]]:
        """Whatever may fail, before anything is written; returns what the reference is to step."""
        for _ in range(2):
            self._prepare()
            referred = [self._inputs(i) for i, e in enumerate(self._executors) if e == "reference"]
            if all(plan.gather(self._params_of(e), self.state) for e, plan in self._plans.items()):
                return referred
            self._forget_plans()  # a parameter moved or was replaced
        raise RuntimeError("expected parameters that stay in place during a step, got some that moved twice")

    def _inputs(self, index: int) -> tuple[dict[str, Any], list[tuple[Tensor, Tensor, Tensor | None]]]:
        """A group for the reference, and (parameter, gradient, momentum buffer) of those with a gradient."""
        group = self.param_groups[index]
        return group, [
            (p, *checked_inputs(name, p, self.state.get(p, {}), group["momentum"]))
            for name, p in zip(self._names(index), group["params"])
            if p.grad is not None
        ]

    def _reference_step(
        self, group: dict[str, Any], inputs: list[tuple[Tensor, Tensor, Tensor | None]]
    ) -> None:
        options = {key: group[key] for key in ("lr", *SGD_OPTIONS, *PROX_OPTIONS)}
        for p, grad, buf in inputs:
            new, new_buf = reference.step(p, grad, buf, **options)
            p.copy_(new)
            if new_buf is not None:
                self.state[p]["momentum_buffer"] = new_buf if buf is None else buf.copy_(new_buf)
