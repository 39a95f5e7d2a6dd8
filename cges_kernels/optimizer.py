"""The two optimizers that users construct: `ProxSGD` and `ProxAdamW`.

Each class names its arguments and its update rule. Everything else they share is in proximal.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from .core.groups import GroupSpec
from .core.rules import ADAMW, SGD
from .proximal import ProximalOptimizer


class ProxSGD(ProximalOptimizer):
    """Plain proximal SGD; not Yang et al. 2020's method of the same name.

    One step is what torch.optim.SGD would write, z, followed by the proximal map of `lr * Omega`,

        Omega(W) = sum_g  group_lasso*||w_g||_2 + (exclusive_lasso/2)*||w_g||_1^2 + l1*||w_g||_1

    over the groups g that `group_by` makes, so that weights and whole groups become exactly zero. The three
    terms are group lasso, exclusive lasso and l1 (Eq. 3, 4 and 2 of Yoon's UNIST thesis). CGES combines the
    first two (Eq. 5; Yoon and Hwang, Combined Group and Exclusive Sparsity for Deep Neural Networks, ICML
    2017); [`cges_param_groups`][cges_kernels.cges_param_groups] sets them up.

    All parameters of all param groups that a fused executor serves are updated in one pass. DTensors (FSDP2,
    tensor parallelism) are served too. Groups that cross shards get the same result as unsharded ones, and
    only sums over groups travel between the ranks.

    The thresholds are `lr * coefficient`, as in the thesis's Algorithm 1. With constant momentum m and
    dampening d the fixed point minimises `f + (1-m)/(1-d) * Omega`, where f is the loss. At momentum 0.9 the
    same sparsity therefore needs a coefficient ten times as large; `dampening=momentum` restores `f + Omega`.
    Weight decay is coupled, as in torch.optim.SGD: it is added to the gradient. With `l1` the two make an
    elastic net.

    A spec, the argument `group_by`, says which dims of a weight `[out, in, *kernel]` are reduced:

    | spec | reduced dims | one group is |
    |---|---|---|
    | "feature" | 0 | one input (in, kh, kw) across all outputs |
    | "filter" | 1 and up | one output unit or filter |
    | "channel" | all but 1 | one input channel |
    | "tensor" | all | the whole tensor |
    | a tuple | those in the tuple | what the tuple leaves fixed |

    Every argument but `params` and `backend` may be set per param group, and changed there between steps.

    Args:
        params: parameters, named parameters or param groups, as for torch.optim.SGD.
        lr: the learning rate, as for torch.optim.SGD. It may be a tensor of one element, as the three
            coefficients may.
        momentum: as for torch.optim.SGD.
        dampening: as for torch.optim.SGD.
        weight_decay: as for torch.optim.SGD.
        nesterov: as for torch.optim.SGD.
        group_lasso: alpha, the coefficient of each group's l2 norm. It makes whole groups zero. Like the
            other two coefficients it does not contain lr: a step multiplies it by lr. All three may be
            tensors of one element. Kernels read float32 tensors on their parameters' GPU (not for DTensors),
            so that a change in place needs no host, no new capture and no compilation.
        exclusive_lasso: beta, the coefficient of half of each group's squared l1 norm. It makes the entries
            of a group compete.
        l1: gamma, the coefficient of the l1 norm. It makes single weights zero.
        group_by: "feature" (default), "filter", "channel", "tensor" or a tuple of the reduced dims. Named
            specs apply `group_lasso` and `exclusive_lasso` to tensors of two or more dims only, since a bias
            would be a single group; `l1` applies to all.
        view: a shape. Where given, `group_by` refers to `w.view(view)`: attention heads of shape (H, d, E)
            reducing (1, 2), for example.
        prox_mode: "sequential" (default) applies one threshold after the other (thesis, Eq. 7, then Eq. 8).
            "exact" is the proximal operator of Omega. They agree only as `lr * exclusive_lasso * n` goes to
            0, where n is the group size. From 1 on sequential mode zeroes nearly everything, and a warning
            says so once.
        freeze_zeros: None (default), "group" or "element". What is exactly 0 before a step then stays 0, and
            its momentum becomes 0: whole groups that are zero, or every zero.
        skip_dead: while `freeze_zeros` is "group", skip the groups that are held at zero. Their weights,
            gradients and buffers are not read, and a step costs what is left of the weights. It is for groups
            that are runs of memory ("filter"): the CPU executor skips them where at least 256 elements lie
            dead together, and the CUDA executor those of 2 to 4,096 elements (float64: 2,048), until a step
            is captured in a CUDA graph. Elsewhere, DTensors included, a step costs as much as without it.
            Writes that increase the version (`p._version`) of a weight or a buffer are noticed: those of
            torch's operations in place and of `load_state_dict`. After any other write call `refresh`, whose
            documentation has a list.
        maximize: as for torch.optim.SGD.
        foreach: True takes the reference executor.
        differentiable: True takes the reference executor, whose step autograd can follow.
        capturable: whether steps may be captured in a CUDA graph, as in torch.optim. A first step must have
            been taken outside. Numbers are fixed in the graph; tensors are read at each replay.
        fused: None (default) takes a fused executor where one serves. True demands one, and lets
            torch.amp.GradScaler leave unscaling to `step`. False takes the reference executor.
        backend: "auto" (default), "reference", "cpu", "triton" or "cuda". "auto" takes "cuda" or else
            "triton" for CUDA tensors, "cpu" for CPU tensors, and "reference" where these cannot serve. It
            belongs to the optimizer as a whole: it is no key of the param groups, and in no state_dict.

    Raises:
        ValueError: a value that cannot be served. Every error says what was expected and what was given, and
            is raised before anything is written.
        TypeError: an argument of the wrong type.
        RuntimeError: a backend that cannot serve these parameters, or options that exclude each other.

    Examples:
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
    """AdamW, or Adam, followed by the proximal map that ProxSGD has: sparsity for training transformers.

    One step is what torch.optim.AdamW would write,

        z = (1 - lr*weight_decay)*w - lr * m_hat / (sqrt(v_hat) + eps)

    followed by the proximal map of `lr * Omega`; see [`ProxSGD`][cges_kernels.ProxSGD] for Omega. The
    thresholds are `lr * coefficient` in the Euclidean metric: they are decoupled from Adam's scaling, as
    AdamW's weight decay is. A prox in Adam's own metric would divide each threshold by its element's scaling
    (Yun et al., Adaptive proximal gradient methods for structured neural networks, NeurIPS 2021); groups
    would then have no closed form.

    The fixed point does not minimise `f + Omega`, where f is the loss. Adam's steps are about lr per element,
    whatever the size of the gradient, so a weight dies where its threshold outweighs what steps of about lr
    put back. Coefficients are on that scale: docs/adamw.md says how to choose them.

    The moments have the parameters' dtype, as in torch.optim. In bfloat16 `exp_avg_sq` stands still at beta2
    = 0.999, and a threshold below half an ulp of a weight does not change that weight. So keep parameters in
    float32 and compute in 16 bits under torch.autocast.

    Args:
        params: parameters, named parameters or param groups, as for torch.optim.AdamW.
        lr: the learning rate, as for torch.optim.AdamW. It may be a tensor of one element.
        betas: as for torch.optim.AdamW.
        eps: as for torch.optim.AdamW.
        weight_decay: as for torch.optim.AdamW, with the same default of 0.01.
        amsgrad: as for torch.optim.AdamW. True takes the reference executor.
        group_lasso: alpha, the coefficient of each group's l2 norm, without lr; as for
            [`ProxSGD`][cges_kernels.ProxSGD].
        exclusive_lasso: beta, the coefficient of half of each group's squared l1 norm, without lr.
        l1: gamma, the coefficient of the l1 norm, without lr.
        group_by: as for [`ProxSGD`][cges_kernels.ProxSGD].
        view: as for [`ProxSGD`][cges_kernels.ProxSGD].
        prox_mode: as for [`ProxSGD`][cges_kernels.ProxSGD].
        freeze_zeros: None (default), "group" or "element". What is exactly 0 before a step then stays 0, and
            both of its moments become 0.
        skip_dead: as for [`ProxSGD`][cges_kernels.ProxSGD].
        decoupled_weight_decay: True (default) is AdamW. False is Adam, which adds `weight_decay * w` to the
            gradient.
        maximize: as for torch.optim.AdamW.
        foreach: True takes the reference executor.
        capturable: whether steps may be captured in a CUDA graph. As in torch.optim it keeps the count of
            steps, `state["step"]`, on the GPU, as `fused=True` does.
        differentiable: True takes the reference executor, whose step autograd can follow.
        fused: as for [`ProxSGD`][cges_kernels.ProxSGD].
        backend: as for [`ProxSGD`][cges_kernels.ProxSGD].

    Raises:
        ValueError: a value that cannot be served. Every error says what was expected and what was given, and
            is raised before anything is written.
        TypeError: an argument of the wrong type.
        RuntimeError: a backend that cannot serve these parameters, or options that exclude each other.

    Examples:
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
