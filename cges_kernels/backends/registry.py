"""The registry of executors: it tells whether one can serve a tensor, chooses one, and makes its plan."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from importlib import metadata, util

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..core.groups import GroupedLayout
from ..core.rules import Rule
from ..core.tensors import holds_values
from .extension import BUILT
from .plan import Plan, Spec
from .reference_plan import ReferencePlan

BACKENDS = ("reference", "cpu", "triton", "cuda")
TRITON_NEEDED = (3, 6)


def triton_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors.

    Once the kernels are imported this cannot change any more, whatever TRITON_INTERPRET is then set to.
    """
    kernels = sys.modules.get(f"{__package__}.triton.kernels")
    if kernels is not None:
        return bool(kernels.INTERPRETED)
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


def _why_no_triton() -> str | None:
    """Why Triton cannot run here, and what to do; None if it can."""
    needed = "triton >= " + ".".join(map(str, TRITON_NEEDED))
    if util.find_spec("triton") is None:
        return f"{needed} is needed and not installed; pip install triton"
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:  # a build under another name, such as ROCm's
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
    """Why the CUDA executor cannot run here, and what to do; None if it can."""
    if "cuda" not in BUILT:
        return "the extension was built without it; install nvcc (CUDA >= 12.8) and reinstall cges_kernels"
    if BUILT["cuda"].emulated or (torch.cuda.is_available() and torch.version.hip is None):
        return None
    return "no NVIDIA GPU is here, or none that this torch sees"


@lru_cache
def _why_not_device(index: int) -> str | None:
    """Why the CUDA executor cannot run on this GPU, such as an old driver; None if it can."""
    built = BUILT["cuda"]
    try:
        with nullcontext() if built.emulated else torch.cuda.device(index):
            built.check_device(index)
    except RuntimeError as error:
        return str(error)
    return None


def why_not(backend: str, w: Tensor | None = None) -> str | None:
    """Why `backend` cannot serve `w` (or, without w, anything at all) and what to do; None if it can."""
    served: tuple[str, ...]
    if backend == "reference":
        return None
    if backend == "cpu":
        if "cpu" not in BUILT:
            return "the C++ extension is not built; install a C++ compiler and reinstall cges_kernels"
        served = ("cpu",)
    elif backend == "triton":
        if reason := _why_no_triton():
            return reason
        served = ("cpu",) if triton_interpreted() else ("cuda", "xpu")
    else:
        if reason := _why_no_cuda():
            return reason
        served = ("cpu",) if BUILT["cuda"].emulated else ("cuda",)
    if w is not None and w.device.type not in served:
        return f"it serves tensors on {' or '.join(served)}, got one on {w.device}"
    if w is not None and is_traceable_wrapper_subclass(w):
        return f"it serves plain tensors, got {type(w).__name__}"
    if w is not None and not holds_values(w):
        return "it serves tensors that hold values, got one of FakeTensorMode, or under vmap, grad or jvp"
    return _why_not_device(w.device.index or 0) if backend == "cuda" and w is not None else None


def available_backends() -> tuple[str, ...]:
    """The executors that can run here.

    "reference" can run everywhere. "cpu" and "cuda" need the C++ extension, built with them, and "cuda" an
    NVIDIA GPU as well. "triton" needs triton 3.6 or newer, and a GPU or `TRITON_INTERPRET=1`.

    Returns:
        Names out of "reference", "cpu", "triton" and "cuda", as the argument `backend` takes them.

    Examples:
        >>> available_backends()
        ('reference', 'cpu')
    """
    return tuple(backend for backend in BACKENDS if why_not(backend) is None)


def check_backend(backend: str) -> None:
    """Raise a ValueError for an unknown name, and a RuntimeError for an executor that cannot run here."""
    if backend == "auto":
        return
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {BACKENDS}, got {backend!r}")
    if reason := why_not(backend):
        raise RuntimeError(f"backend={backend!r} cannot serve: {reason}")


def choose_backend(backend: str, tensors: Sequence[Tensor], fused: bool = False) -> str:
    """The executor for `tensors`: the one asked for, or for "auto" the fastest that serves all of them.

    `fused` demands one other than the reference.

    Raises:
        ValueError: an unknown name.
        RuntimeError: no executor that was asked for serves all of the tensors.
    """
    check_backend(backend)
    candidates: tuple[str, ...] = (backend,)
    if backend == "auto":  # on CPU tensors Triton could only interpret, which is never the fastest
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


def make_plan(
    executor: str,
    rule: Rule,
    params: Sequence[list[Tensor]],
    layouts: Sequence[Sequence[GroupedLayout]],
    specs: Sequence[Sequence[Spec]],
) -> Plan:
    """The plan that steps parameters by `executor`.

    `params[i]` is [] where another plan serves group i; layouts[i][j] and specs[i][j] are params[i][j]'s.
    """
    if executor == "reference":
        return ReferencePlan(rule, params, specs)
    if executor in ("cpu", "cuda"):
        return BUILT[executor].StepPlan(params, layouts, rule.name, executor)
    from .triton.executor import TritonPlan  # not at the top: triton is slow to import

    return TritonPlan(rule, params, layouts)
