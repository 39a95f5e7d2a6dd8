"""The executors: which of them can serve a tensor, and how each is set going."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from importlib import metadata, util
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import extension
from .checks import check_tensor
from .extension import Extension
from .groups import GroupSpec, LayoutTuple, canonical_layout, has_groups
from .plans import Plan, ReferencePlan, Spec

_C = extension.load()

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
        import triton

        version = triton.__version__
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
    built = _extension("cuda")
    try:
        with nullcontext() if built.emulated else torch.cuda.device(index):
            built.check_device(index)
    except RuntimeError as error:
        return str(error)
    return None


def why_not(backend: str, w: Tensor | None = None) -> str | None:
    """Why ``backend`` cannot serve ``w`` (or, without w, anything at all) and what to do; None if it can."""
    served: tuple[str, ...]
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
        served = ("cpu",) if _extension("cuda").emulated else ("cuda",)
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
    candidates: tuple[str, ...] = (backend,)
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


def _extension(executor: str) -> Extension:
    """The one that "cpu" or "cuda" is in; why_not has found it there."""
    found = _cuda if executor == "cuda" else _C
    assert found is not None
    return found


def make_plan(
    executor: str,
    params: Sequence[list[Tensor]],
    layouts: Sequence[Sequence[LayoutTuple]],
    specs: Sequence[Sequence[Spec]],
) -> Plan:
    """What steps the parameters of ``executor``, by plans.py's interface.

    ``params[i]`` is [] where another one serves group i; layouts[i][j] and specs[i][j] are params[i][j]'s.
    """
    if executor == "reference":
        return ReferencePlan(params, specs)
    if executor in ("cpu", "cuda"):
        return _extension(executor).StepPlan(params, layouts, executor)
    from .triton_step import TritonPlan  # only here: importing triton takes its time

    return TritonPlan(params, layouts)


def is_capturing() -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def step_tensors(
    executor: str,
    tensors: Sequence[Tensor],
    layouts: Sequence[LayoutTuple],
    rows: Sequence[Sequence[int]],
    groups: Sequence[int],
    values: Sequence[Mapping[str, Any]],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step without a plan, in one pass, by a fused executor; whoever calls has checked everything.

    Args:
        rows: of each tensor its address, those of gradient and buffer (0: none), and step_plan.py's phase.
        groups: of each tensor the index of its hyperparameters in ``values``, which are plans.py's.
    """
    capturing, scaler = is_capturing(), (grad_scale, found_inf)
    if executor in ("cpu", "cuda"):
        built = _extension(executor)
        of_groups = [built.Hyperparameters(**v) for v in values]
        built.step_(tensors, layouts, rows, groups, of_groups, executor, capturing, *scaler)
    else:
        from . import triton_step

        triton_step.step_(tensors, layouts, rows, groups, values, capturing, *scaler)
