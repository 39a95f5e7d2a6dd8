"""Runs forward passes of models to compare them: their outputs, FLOPs and latency.

All modules of compaction/ that run a model use it.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.modules.module import register_module_forward_hook

from ..core.calls import Given, call, leaves, mapped
from ..reporting.report import in_mode, measure_flops, unfused_operations
from .layers import WEIGHTED, is_floating

# The largest accepted difference between outputs, relative to the largest output.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 0.02, torch.float16: 0.004}
SLACK = 5  # a factor on the tolerance for a network that runs in its own dtype
FAR_OUT = 1e3  # values above so many times the median do not count for the size of the outputs
TURNS, SECONDS = (3, 30), 0.5  # of latency: the fewest and most turns, and after how long no other begins


def check_modules(model: nn.Module, keep: Collection[str]) -> None:
    """Raise a ValueError for a module that cannot be compacted, or for an unknown name in `keep`."""
    modules = dict(model.named_modules())
    if isinstance(keep, str) or (unknown := sorted(set(keep) - set(modules))):
        got = keep if isinstance(keep, str) else unknown
        raise ValueError(f"keep: expected a collection of names of model.named_modules(), got {got!r}")
    for name, module in modules.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{name or 'model'}: expected a plain nn.Module, got a scripted one")
        if isinstance(module, WEIGHTED) and not isinstance(module._parameters.get("weight"), nn.Parameter):
            raise ValueError(
                f"{name or 'model'}: expected its weight to be a parameter, got one that is computed (a "
                "pruning mask, weight norm or another parametrization); make it permanent first, as by "
                "torch.nn.utils.prune.remove or parametrize.remove_parametrizations"
            )


@contextlib.contextmanager
def following() -> Iterator[None]:
    """Run forward passes operation by operation: nothing is compiled, fused or recorded for gradients.

    Distributions do not check their arguments, because such a check counts as a branch.
    """
    checks = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), unfused_operations():
            yield
    finally:
        Distribution.set_default_validate_args(checks)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Undo, at the end of the block, what forward passes change in a model.

    They may change attributes, buffers, lists, and the tables of embeddings with a largest norm.
    """
    was = [(module, {key: _shallow(x) for key, x in vars(module).items()}) for module in model.modules()]
    tables = (module.weight for module in model.modules() if getattr(module, "max_norm", None) is not None)
    values = [(x, x.clone()) for x in (*model.buffers(), *tables) if isinstance(x, Tensor)]
    try:
        yield
    finally:
        for module, own in was:
            vars(module).clear()
            for key, (x, inside) in own.items():
                vars(module)[key] = x
                if inside is not None:
                    x.clear()
                    (x.extend if isinstance(x, list) else x.update)(inside)
        with torch.no_grad():
            for x, value in values:
                x.copy_(value)


def _shallow(x: Any) -> tuple[Any, Any]:
    """A value and, if it is a list, a set or a dict, a copy of its contents."""
    return x, copy.copy(x) if type(x) in (list, set, dict, OrderedDict) else None


def cuda_devices(model: nn.Module, given: Given) -> list[torch.device]:
    """The CUDA devices that the model or its arguments are on."""
    tensors = (x for x in (*model.parameters(), *leaves(given)) if isinstance(x, Tensor))
    return list({x.device for x in tensors if x.is_cuda})


@torch.no_grad()
def outputs(model: nn.Module, given: Given) -> list[Any]:
    """The leaves of the result of `model` in eval mode, with the same random numbers each time.

    If no floating-point tensor is among them, the last one that some module returned is put in front, because
    decisions such as an argmax do not show the numbers from which they were made.
    """
    with in_mode(model, train=False):
        return run(model, given)


@torch.no_grad()
def run(model: nn.Module, given: Given) -> list[Any]:
    """Does the same as `outputs`, in the mode that the model is in."""
    torch.manual_seed(0)
    numbers: list[Tensor] = []

    def note(module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor) and is_floating(out):
            numbers[:] = [out]

    with unchanged(model), torch.compiler.set_stance("force_eager"):
        handle = register_module_forward_hook(note)
        try:
            found = leaves(call(model, fresh(given)))
        finally:
            handle.remove()
    return found if any(map(is_floating, found)) else [*numbers, *found]


def fresh(given: Given) -> Given:
    """Copies of the arguments, since a model may write into them."""
    return mapped(lambda x: x.clone(), given)


def compare(a: list[Any], b: list[Any], slack: float = 1) -> tuple[float, bool]:
    """The largest difference between two lists of outputs, and whether it is no more than rounding."""
    largest, within = 0.0, len(a) == len(b)
    for x, y in zip(a, b):
        if isinstance(x, Tensor) and x.layout != torch.strided:
            x, y = x.to_dense(), y.to_dense()
        if not isinstance(x, Tensor):
            within &= not isinstance(x, (int, float, complex, str)) or x == y or x != x
        elif not is_floating(x):
            within &= torch.equal(x, y)
        elif x.shape != y.shape:
            return float("inf"), False
        elif x.numel():
            allowed = slack * TOLERANCES[x.dtype] * y.abs().clamp(min=_typical(y))
            alike = (x == y) | (x.isnan() & y.isnan()) | ((x - y).abs() <= allowed)
            within &= bool(alike.all())
            largest = max(largest, float((x - y).abs().nan_to_num(0, posinf=0).max()))
    return largest, within


def _typical(x: Tensor) -> float:
    """The largest magnitude of the values up to FAR_OUT medians; those that masks write are larger."""
    sizes = x.detach().abs().flatten().double()
    sizes = sizes[sizes.isfinite() & (sizes > 0)]
    return float(sizes[sizes <= FAR_OUT * sizes.median()].max()) if len(sizes) else 0.0


def outputs_and_flops(model: nn.Module, given: Given) -> tuple[list[Any], int]:
    """The result of `outputs`, and the FLOPs of that pass by torch's counter."""
    found: list[Any] = []
    flops = sum(measure_flops(model, given, run=lambda *args: found.extend(outputs(*args))))
    return found, flops


def latencies(models: tuple[nn.Module, nn.Module], given: Given) -> tuple[float, float]:
    """The median milliseconds of a forward pass of each model in eval mode, measured in turns."""
    wait: Callable[[], None] = torch.cuda.synchronize if cuda_devices(models[0], given) else lambda: None
    times: tuple[list[float], list[float]] = ([], [])
    with contextlib.ExitStack() as stack, torch.no_grad():
        for model in models:
            stack.enter_context(unchanged(model))
            stack.enter_context(in_mode(model, train=False))
        begin = time.perf_counter()
        for turn in range(1 + TURNS[1]):
            if turn > TURNS[0] and time.perf_counter() - begin > SECONDS:
                break
            for model, taken in zip(models, times):
                own = fresh(given)
                wait()
                start = time.perf_counter()
                call(model, own)
                wait()
                taken.append(1000 * (time.perf_counter() - start))
    return median(times[0][1:]), median(times[1][1:])  # the first turn warms up
