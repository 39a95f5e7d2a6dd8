"""What a model gives: forward passes, whether two give the same, and how long they take."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..core.calls import Given, call
from ..reporting.report import evaluating, unfused_operations
from .layers import WEIGHTED, is_floating

# By how much outputs may differ, relative to the largest of them.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
TIMES = 3  # that latency is measured, after a pass to warm up


def check_modules(model: nn.Module, keep: Collection[str]) -> None:
    """Raise a ValueError that names what cannot be compacted."""
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
    """Forward passes operation by operation: nothing compiled, fused or recorded for gradients."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), unfused_operations():
        yield


@contextlib.contextmanager
def trained(model: nn.Module) -> Iterator[None]:
    """Training mode, of which no buffer keeps a trace."""
    buffers = [(x, x.clone()) for x in model.buffers()]
    modes = {module: module.training for module in model.modules()}
    try:
        model.train()
        yield
    finally:
        with torch.no_grad():
            for x, was in buffers:
                x.copy_(was)
        for module, mode in modes.items():
            module.training = mode


def leaves(x: Any) -> list[Any]:
    """What is in containers, dataclasses among them."""
    found = []
    for leaf in tree_leaves(x):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += [y for f in dataclasses.fields(leaf) for y in leaves(getattr(leaf, f.name, None))]
        elif isinstance(leaf, Mapping):  # one that torch does not know
            found += [y for value in leaf.values() for y in leaves(value)]
        else:
            found.append(leaf)
    return found


def cuda_devices(model: nn.Module, given: Given) -> list[torch.device]:
    """Those that the model or its arguments are on."""
    tensors = (x for x in (*model.parameters(), *tree_leaves(given)) if isinstance(x, Tensor))
    return list({x.device for x in tensors if x.is_cuda})


@torch.no_grad()
def outputs(model: nn.Module, given: Given) -> list[Any]:
    """The leaves of what ``model`` gives in eval mode. It draws the same random numbers each time."""
    torch.manual_seed(0)
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        return leaves(call(model, given))


def compare(a: list[Any], b: list[Any]) -> tuple[float, bool]:
    """The largest difference of two lists of outputs, and whether it is rounding."""
    largest, within = 0.0, len(a) == len(b)
    for x, y in zip(a, b):
        if not is_floating(x):
            within &= not isinstance(x, Tensor) or torch.equal(x, y)
        elif x.shape != y.shape:
            return float("inf"), False
        elif x.numel():
            scale = y.abs().nan_to_num(0, posinf=0, neginf=0).max()
            within &= torch.allclose(x, y, rtol=0, atol=float(scale) * TOLERANCES[x.dtype], equal_nan=True)
            largest = max(largest, float((x - y).abs().nan_to_num(0).max()))
    return largest, within


def latencies(models: tuple[nn.Module, nn.Module], given: Given) -> tuple[float, float]:
    """Median milliseconds of a forward pass of each, warm, in eval mode, taking turns."""
    wait: Callable[[], None] = torch.cuda.synchronize if cuda_devices(models[0], given) else lambda: None
    times: tuple[list[float], list[float]] = ([], [])
    with evaluating(models[0]), evaluating(models[1]), torch.no_grad():
        for _ in range(TIMES):
            for model, taken in zip(models, times):
                wait()
                start = time.perf_counter()
                call(model, given)
                wait()
                taken.append(1000 * (time.perf_counter() - start))
    return median(times[0]), median(times[1])
