"""Functions on tensors (prox, prox_, penalty), and the choice of the executor that serves them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from importlib import metadata, util
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import reference
from .checks import check_distinct, check_penalty, check_tensor
from .groups import GroupSpec, LayoutTuple, canonical_layout, has_groups

try:
    from . import _C
except ImportError:  # installed without a C++ compiler
    _C = None

# The extension whose CUDA executor is used: the tests put one here that runs the same kernels on the CPU.
_cuda = _C if _C is not None and _C.cuda else None

BACKENDS = ("reference", "cpu", "triton", "cuda")
TRITON_NEEDED = (3, 6)


def triton_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors; settled once they are imported."""
    kernels = sys.modules.get(f"{__package__}.triton_kernels")
    if kernels is not None:
        return bool(kernels.INTERPRETED)
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


def _why_no_triton() -> str | None:
    needed = "triton >= " + ".".join(map(str, TRITON_NEEDED))
    if util.find_spec("triton") is None:
        return f"{needed} is needed and not installed; pip install triton"
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:  # a build of another name, such as ROCm's
        from triton import __version__ as version
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < TRITON_NEEDED:
        return f"{needed} is needed, found {version}; pip install --upgrade triton"
    if triton_interpreted() or torch.cuda.is_available() or torch.xpu.is_available():
        return None
    return (
        "no GPU that Triton compiles for is here; TRITON_INTERPRET=1 runs its kernels, slowly, on CPU tensors"
    )


def _why_no_cuda() -> str | None:
    if _cuda is None:
        return "the extension was built without it; install nvcc (CUDA >= 12.8) and reinstall cges_kernels"
    if _cuda.emulated or (torch.cuda.is_available() and torch.version.hip is None):
        return None
    return "no NVIDIA GPU is here, or none that this torch sees"


@lru_cache
def _why_not_device(index: int) -> str | None:
    """Why the CUDA executor cannot run on this GPU: a driver too old, or no kernel built for it."""
    try:
        with nullcontext() if _cuda.emulated else torch.cuda.device(index):
            _cuda.check_device(index)
    except RuntimeError as error:
        return str(error)
    return None


def why_not(backend: str, w: Tensor | None = None) -> str | None:
    """Why ``backend`` cannot serve ``w`` (or, without w, anything at all) and what to do; None if it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        if _C is None:
            return "the C++ extension is not built; install a C++ compiler and reinstall cges_kernels"
        served = ("cpu",)
    elif backend == "triton":
        if reason := _why_no_triton():
            return reason
        served = ("cpu",) if triton_interpreted() else ("cuda", "xpu")
    else:
        if reason := _why_no_cuda():
            return reason
        served = ("cpu",) if _cuda.emulated else ("cuda",)
    if w is not None and w.device.type not in served:
        return f"it serves tensors on {' or '.join(served)}, got one on {w.device}"
    if w is not None and is_traceable_wrapper_subclass(w):
        return f"it serves plain tensors, got {type(w).__name__}"
    return _why_not_device(w.device.index or 0) if backend == "cuda" and w is not None else None


def available_backends() -> tuple[str, ...]:
    """The executors that can run here, of "reference", "cpu", "triton", "cuda"."""
    return tuple(backend for backend in BACKENDS if why_not(backend) is None)


def check_backend(backend: str) -> None:
    """ValueError for an unknown name, RuntimeError for an executor that is not there."""
    if backend == "auto":
        return
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {BACKENDS}, got {backend!r}")
    if reason := why_not(backend):
        raise RuntimeError(f"backend={backend!r} cannot serve: {reason}")


def choose_backend(backend: str, tensors: Sequence[Tensor], fused: bool = False) -> str:
    """The executor for ``tensors``: the one asked for, or for "auto" the fastest that serves all of them.

    ``fused`` demands one other than the reference. RuntimeError where the wish cannot be met.
    """
    check_backend(backend)
    candidates = (backend,)
    if backend == "auto":  # an interpreter is never the fastest
        on_cpu = all(w.device.type == "cpu" for w in tensors)
        candidates = ("cpu",) if on_cpu else ("cuda", "triton")
    reasons = []
    for candidate in candidates:
        reason = next(filter(None, (why_not(candidate, w) for w in (None, *tensors))), None)
        if fused and candidate == "reference":
            reason = "it is not fused"
        if reason is None:
            return candidate
        reasons.append(f"{candidate}: {reason}")
    if backend == "auto" and not fused:
        return "reference"
    wish = "fused=True" if fused else f"backend={backend!r}"
    raise RuntimeError(f"{wish} cannot be served. {'; '.join(reasons)}")


def layout_tuple(
    w: Tensor, group_by: GroupSpec, view: Sequence[int] | None
) -> tuple[int, int, int, int, bool]:
    """What C++ wants to know of a tensor: its canonical layout, and whether the spec makes groups."""
    ndim = len(view) if view is not None else w.dim()
    return (*canonical_layout(w, group_by, view), has_groups(ndim, group_by))


def named_layouts(
    names: Sequence[str], tensors: Sequence[Tensor], group_by: GroupSpec, view: Sequence[int] | None
) -> list[tuple[int, int, int, int, bool]]:
    """layout_tuple of each tensor; an error names the tensor."""
    layouts = []
    for name, w in zip(names, tensors):
        check_tensor(name, w)
        try:
            layouts.append(layout_tuple(w, group_by, view))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return layouts


def _extension(executor: str) -> Any:
    return _cuda if executor == "cuda" else _C


def make_plan(executor: str, params: Sequence[list[Tensor]], layouts: Sequence[list[LayoutTuple]]) -> Any:
    """What steps the parameters of ``executor``; ``params[i]`` is [] where another one serves group i.

    It has set_hyperparameters(group, **values), gather(params, state) -> bool and run(); see step_plan.py.
    """
    if executor in ("cpu", "cuda"):
        return _extension(executor).StepPlan(params, layouts, executor)
    from .triton_step import TritonPlan  # only here: importing triton takes its time

    return TritonPlan(params, layouts)


def prox_(
    tensors: Sequence[Tensor],
    *,
    group_lasso: float = 0.0,
    exclusive_lasso: float = 0.0,
    l1: float = 0.0,
    group_by: GroupSpec = "feature",
    view: Sequence[int] | None = None,
    prox_mode: str = "sequential",
    backend: str = "auto",
) -> None:
    """Replace each tensor by its proximal map, all in one pass: for those who keep their own optimizer.

    The coefficients already contain the step size (pass lr*coefficient). Tensors may have any shapes,
    but must be dense and distinct; named specs apply group_lasso and exclusive_lasso to tensors of two
    or more dims only. See :func:`prox` for the formula.

    Raises:
        ValueError, TypeError: bad coefficients, spec, mode or tensors; nothing is written.
        RuntimeError: a backend that cannot serve.

    Example:
        >>> optimizer.step()
        >>> with torch.no_grad():
        ...     prox_([layer.weight for layer in layers], group_lasso=lr * 1e-3)
    """
    penalty_options: dict[str, Any] = dict(
        group_lasso=group_lasso, exclusive_lasso=exclusive_lasso, l1=l1, group_by=group_by, view=view
    )
    check_penalty({**penalty_options, "prox_mode": prox_mode})
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    names = [f"tensors[{i}]" for i in range(len(tensors))]
    layouts = named_layouts(names, tensors, group_by, view)
    for name, w in zip(names, tensors):
        if torch.is_grad_enabled() and w.requires_grad:
            raise RuntimeError(
                f"{name}: expected torch.no_grad() around a change of a tensor that requires grad"
            )
    check_distinct(names, tensors)
    thresholds = reference.Thresholds(float(group_lasso), float(exclusive_lasso), float(l1))
    executor = choose_backend(backend, tensors)
    if executor == "reference":
        for w in tensors:
            w.copy_(reference.shrink(w, thresholds, group_by, view, prox_mode))
        return
    values = {**thresholds._asdict(), "exact": prox_mode == "exact"}
    if executor in ("cpu", "cuda"):
        extension = _extension(executor)
        capturing = any(w.is_cuda for w in tensors) and torch.cuda.is_current_stream_capturing()
        extension.prox_(tensors, layouts, extension.Hyperparameters(**values), executor, capturing)
    else:
        from . import triton_step

        triton_step.prox_(tensors, layouts, values)


def prox(
    w: Tensor,
    *,
    group_lasso: float = 0.0,
    exclusive_lasso: float = 0.0,
    l1: float = 0.0,
    group_by: GroupSpec = "feature",
    view: Sequence[int] | None = None,
    prox_mode: str = "sequential",
    backend: str = "auto",
) -> Tensor:
    """The proximal map of the combined regulariser at ``w``, a new tensor of the same shape and dtype.

    ``prox_mode="exact"`` gives argmin_x ||x - w||^2 / 2 + Omega(x) with

        Omega(x) = sum_g  group_lasso*||x_g||_2 + (exclusive_lasso/2)*||x_g||_1^2 + l1*||x_g||_1

    and "sequential" applies the l1, the group and the exclusive thresholds one after another (Yoon and
    Hwang 2017, Eq. 7 then 8), which shrinks more. The coefficients already contain the step size. A
    ``w`` that requires grad takes the reference, which is differentiable.

    Raises: as :func:`prox_`.
    """
    check_tensor("w", w)
    options: dict[str, Any] = dict(
        group_lasso=group_lasso, exclusive_lasso=exclusive_lasso, l1=l1, group_by=group_by, view=view
    )
    if torch.is_grad_enabled() and w.requires_grad:
        check_penalty({**options, "prox_mode": prox_mode})
        choose_backend(backend, [w])
        w = w.clone()
        named_layouts(["w"], [w], group_by, view)
        return reference.shrink(
            w, reference.Thresholds(group_lasso, exclusive_lasso, l1), group_by, view, prox_mode
        )
    result = w.detach().clone()
    prox_([result], **options, prox_mode=prox_mode, backend=backend)
    return result


def penalty(
    w: Tensor,
    *,
    group_lasso: float = 0.0,
    exclusive_lasso: float = 0.0,
    l1: float = 0.0,
    group_by: GroupSpec = "feature",
    view: Sequence[int] | None = None,
) -> Tensor:
    """Omega(w): a 0-d tensor, differentiable; the formula stands at :func:`prox`.

    Named specs apply the group terms to tensors of two or more dims only. Zero groups have gradient 0.

    Raises:
        ValueError, TypeError: bad coefficients, spec or tensor.
    """
    options: dict[str, Any] = dict(
        group_lasso=group_lasso, exclusive_lasso=exclusive_lasso, l1=l1, group_by=group_by, view=view
    )
    check_penalty(options)
    check_tensor("w", w)
    return reference.omega(w, **options)


__all__ = ["available_backends", "penalty", "prox", "prox_"]
