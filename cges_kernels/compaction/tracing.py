"""What a model does: which modules it calls, what it gives, and whether two models give the same.

Errors name the module that stands in the way.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..reporting.report import evaluating
from .layers import WEIGHTED, is_floating

# By how much outputs may differ, relative to the largest of them.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
SECONDS = 0.2  # that latency is measured for


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


def trace(model: nn.Module, args: tuple[Any, ...]) -> tuple[Counter[str], dict[str, str]]:
    """How often each module is called; and the first one that cuts the gradient, with the reason."""
    stack: list[str] = []
    calls: Counter[str] = Counter()
    cut: dict[str, str] = {}
    hooks = []

    def traced(x: Any) -> list[bool]:
        return [t.requires_grad for t in tree_leaves(x) if is_floating(t)]

    for name, module in model.named_modules():

        def before(module: nn.Module, args: Any, name: str = name or type(model).__name__) -> None:
            stack.append(name)
            calls[name] += 1

        def after(module: nn.Module, args: Any, out: Any) -> None:
            name = stack.pop()
            should = any(traced(args)) or any(p.requires_grad for p in module.parameters())
            if not cut and should and traced(out) and not all(traced(out)):
                cut[name] = "its outputs have no gradient, so what comes before it could not be traced"

        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        with torch.enable_grad():
            out = model(*args)
    except Exception as error:
        where = stack[-1] if stack else type(model).__name__
        raise ValueError(
            f"{where}: expected a forward pass on example_input, got {type(error).__name__}: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not any(traced(out)):
        where = next(iter(cut), type(model).__name__)
        raise ValueError(f"{where}: expected outputs with a gradient to trace the model by, got none")
    return calls, cut


def not_used_once(model: nn.Module, calls: Counter[str]) -> dict[str, str]:
    """Modules with weights that no change may touch: {name: reason}."""
    owners: dict[nn.Parameter, list[str]] = {}
    reasons = {}
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None]
        for p in own:
            owners.setdefault(p, []).append(name)
        if own and calls[name or type(model).__name__] > 1:
            reasons[name] = "it is called more than once"
        elif isinstance(module, WEIGHTED) and not calls[name or type(model).__name__]:
            reasons[name] = "its weight is used without calling it"
    tied = (names for names in owners.values() if len(names) > 1)
    return reasons | {name: "its weight is tied" for names in tied for name in names}


def cuda_devices(model: nn.Module, args: tuple[Any, ...]) -> list[torch.device]:
    """Those that the model or its arguments are on."""
    tensors = (x for x in (*model.parameters(), *tree_leaves(args)) if isinstance(x, Tensor))
    return list({x.device for x in tensors if x.is_cuda})


@torch.no_grad()
def outputs(model: nn.Module, args: tuple[Any, ...]) -> list[Any]:
    """The leaves of what ``model`` gives in eval mode. It draws the same random numbers each time."""
    torch.manual_seed(0)
    with evaluating(model):
        return tree_leaves(model(*args))


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


def latencies(models: tuple[nn.Module, nn.Module], args: tuple[Any, ...]) -> tuple[float, float]:
    """Median milliseconds of a forward pass of each in eval mode, taking turns."""
    wait: Callable[[], None] = torch.cuda.synchronize if cuda_devices(models[0], args) else lambda: None
    times: tuple[list[float], list[float]] = ([], [])
    with evaluating(models[0]), evaluating(models[1]), torch.no_grad():
        for model in models:
            model(*args)  # warm
        end = time.perf_counter() + SECONDS
        while len(times[0]) < 5 or time.perf_counter() < end:
            for model, taken in zip(models, times):
                wait()
                start = time.perf_counter()
                model(*args)
                wait()
                taken.append(1000 * (time.perf_counter() - start))
    return median(times[0]), median(times[1])
