"""ProxSGD and ProxAdamW: torch.optim's with structured sparsity. What they share is in proximal.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from .core.groups import GroupSpec
from .core.rules import ADAMW, SGD
from .proximal import ProximalOptimizer


class ProxSGD(ProximalOptimizer):
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
        skip_dead: while freeze_zeros is "group", pass by groups that are held at zero: their weights,
            gradients and buffers are not read, and the step costs what is left of the weights. The CPU
            executor does so for groups that are runs of memory ("filter"), where at least 256 elements lie
            dead together; elsewhere, DTensors included, steps cost what they did. What moves the version
            (``p._version``) of a weight or buffer is noticed: torch's operations in place, load_state_dict.
            After any other writing call :meth:`refresh`, which has a list.
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

    rule = SGD

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
        skip_dead: bool = False,
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
            skip_dead=skip_dead,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            capturable=capturable,
            fused=fused,
        )
        super().__init__(params, defaults, backend)


class ProxAdamW(ProximalOptimizer):
    """AdamW, or Adam, followed by the same proximal map as ProxSGD's: sparsity for who trains transformers.

    One step is what torch.optim.AdamW would write,

        z = (1 - lr*weight_decay)*w - lr * m_hat / (sqrt(v_hat) + eps)

    followed by the proximal map of lr * Omega (see :class:`ProxSGD`), with the thresholds lr*coefficient in
    the Euclidean metric: they are decoupled from Adam's scaling, as AdamW's weight decay is. A prox in Adam's
    own metric would divide each threshold by its element's scaling (Yun et al., Adaptive proximal gradient
    methods for structured neural networks, NeurIPS 2021); groups would then have no closed form. Here the
    fixed point does not minimise f + Omega: Adam's steps are about lr per element, whatever the gradient's
    size, so a weight dies where its threshold outweighs what steps of about lr put back. Coefficients are on
    that scale: see docs/adamw.md.

    Args:
        params: parameters, param groups or named parameters, as for torch.optim.AdamW.
        lr, betas, eps, weight_decay, maximize: as for torch.optim.AdamW.
        amsgrad, differentiable: as for torch.optim.AdamW; True takes the reference executor.
        decoupled_weight_decay: False is Adam, which adds weight_decay*w to the gradient.
        capturable: whether steps may be captured in a CUDA graph. As in torch.optim it keeps the count of
            steps, state["step"], on the GPU, as fused=True does.
        group_lasso, exclusive_lasso, l1, group_by, view, prox_mode: as for :class:`ProxSGD`.
        freeze_zeros: None, "group" or "element": what is exactly 0 before a step stays 0, both moments too.
        skip_dead, foreach, fused, backend: as for :class:`ProxSGD`.

    The moments have the parameters' dtype, as in torch.optim. In bfloat16 exp_avg_sq stands still at
    beta2 = 0.999, and thresholds below half an ulp of a weight do nothing to it: keep parameters in float32,
    under torch.autocast.

    Raises:
        ValueError, TypeError, RuntimeError: whatever cannot be served, with what was expected and what came,
            before anything is written.

    Example:
        >>> optimizer = ProxAdamW(sparsity_param_groups(model, group_lasso=0.02, group_by="filter"), lr=1e-3)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.step()
    """

    rule = ADAMW

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        group_lasso: float = 0.0,
        exclusive_lasso: float = 0.0,
        l1: float = 0.0,
        group_by: GroupSpec = "feature",
        view: Sequence[int] | None = None,
        prox_mode: str = "sequential",
        freeze_zeros: str | None = None,
        skip_dead: bool = False,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str = "auto",
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            decoupled_weight_decay=decoupled_weight_decay,
            group_lasso=group_lasso,
            exclusive_lasso=exclusive_lasso,
            l1=l1,
            group_by=group_by,
            view=view,
            prox_mode=prox_mode,
            freeze_zeros=freeze_zeros,
            skip_dead=skip_dead,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, defaults, backend)
