"""From a network with dead weights to a smaller dense one that computes the same."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..reporting.explain import Table
from ..reporting.report import sparsity_report
from .channels import Refused, gather_inputs, import_torch_pruning, remove_unread, restore_inputs
from .fold import fold_constants
from .layers import is_floating
from .probes import Probes
from .tracing import (
    check_modules,
    compare,
    cuda_devices,
    latencies,
    not_used_once,
    outputs,
    trace,
)


@dataclass(frozen=True)
class Compaction:
    """What :func:`compact` made of a model; ``str()`` is a summary. Pairs are (before, after)."""

    model: nn.Module = field(repr=False)
    layers: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # weight shapes, of those that changed
    parameters: tuple[int, int]
    flops: tuple[float, float]  # of one forward pass on the example; sparsity_report's, dense
    latency_ms: tuple[float, float]  # of the same, median
    max_difference: float  # between the outputs on the example
    kept: dict[str, str]  # by layer: what is dead and had to stay, and why
    varied: tuple[str, ...]  # in what the inputs differed on which outputs were compared

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, as plain numbers and text."""
        pairs = ("parameters", "flops", "latency_ms")
        return {
            **{key: dict(zip(("before", "after"), getattr(self, key))) for key in pairs},
            "layers": {name: {"before": a, "after": b} for name, (a, b) in self.layers.items()},
            "max_difference": self.max_difference,
            "kept": self.kept,
            "varied": list(self.varied),
        }

    def __str__(self) -> str:
        def row(name: str, pair: tuple[float, float], spec: str) -> tuple[str, ...]:
            left = f"{100 * pair[1] / pair[0]:.1f}%" if pair[0] else ""
            return (name, *(format(x, spec) for x in pair), left)

        shapes = ((name, *("x".join(map(str, x)) for x in pair), "") for name, pair in self.layers.items())
        rows = [
            *shapes,
            row("parameters", self.parameters, ",d"),
            row("FLOPs", self.flops, ",.0f"),
            row("latency, ms", self.latency_ms, ".3f"),
        ]
        lines = [str(Table(("", "before", "after", "left"), tuple(rows)))]
        lines.append(f"largest difference between outputs: {self.max_difference:.2g}")
        lines.append(f"tried with other {', '.join(self.varied) or 'inputs: none'}")
        lines += [f"{name}: {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines)


def compact(model: nn.Module, example_input: Any, *, keep: Collection[str] = ()) -> Compaction:
    """A smaller dense model that computes, in eval mode, what ``model`` computes.

    Removed are filters, channels and units that no weight reads, and all that only they read in turn, through
    residual sums, concatenation, flattening, batch norm and depthwise convolutions, as Torch-Pruning's
    dependency graph finds them. A dead filter is not yet unread: its bias or batch-norm shift is a constant
    for the layers behind it. Such constants go into those layers' biases first (a layer without one gets one)
    and the filter goes. What cannot go without changing the outputs stays, and ``kept`` says why: outputs of
    the model, a constant other than 0 that meets zero padding (it would be wrong at the borders), channels
    that a layer norm, group norm, attention or grouped convolution takes together, weights that are used more
    than once. A Linear or convolution that reads few of its inputs where others need them all picks those by
    itself (``layer.read_inputs``). A network that is dead throughout keeps one channel per layer.

    Constants are those for inputs of the example's size: behind zero padding and pooling, another size may
    give others. Whatever a tensor holds that is passed counts as unknown: numbers, token ids and masks alike;
    numbers and flags that are no tensors stay as they are. Every change is checked on the example and on
    other inputs (``varied`` says in what they differ), in float64 where the model allows; one that shows in
    the outputs is undone, and ``kept`` says so.

    Args:
        model: left as it is.
        example_input: its argument, or a tuple of its arguments, of the size that is used later.
        keep: names of modules whose number of outputs must stay.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: the model cannot be traced: its forward pass fails on the example, it cuts every gradient,
            or a module is scripted or computes its weight from others; the module is named. Or it takes no
            other integers or truth values than the example's.
        RuntimeError: the outputs differ after all by more than rounding.

    Example:
        >>> result = compact(model, torch.zeros(1, 3, 32, 32))
        >>> print(result)  # shapes, parameters, FLOPs, latency, what stayed and why
        >>> save_compacted(result.model, "small.pt")
    """
    import_torch_pruning()
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    check_modules(model, keep)
    with torch.random.fork_rng(devices=cuda_devices(model, args)):
        small, kept, varied = _compacted(model, args, {name: "asked for" for name in keep})
        difference, within = compare(outputs(small, args), outputs(model, args))
        if not within:
            raise RuntimeError(
                f"compact: expected equal outputs, got a largest difference of {difference:.3g}"
            )
        flops = _flops(model, args), _flops(small, args)
        latency_ms = latencies((model, small), args)
    before, after = ({name: tuple(p.shape) for name, p in m.named_parameters()} for m in (model, small))
    return Compaction(
        model=small,
        layers={
            name: (shape, after[name])
            for name, shape in before.items()
            if len(shape) > 1 and after[name] != shape
        },
        parameters=(_num_weights(model), _num_weights(small)),
        flops=flops,
        latency_ms=latency_ms,
        max_difference=difference,
        kept=kept,
        varied=tuple(varied),
    )


def _num_weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _flops(model: nn.Module, args: tuple[Any, ...]) -> float:
    flops = sparsity_report(model, args).total.flops
    assert flops is not None  # a report that was given arguments counts them
    return flops


def _compacted(
    model: nn.Module, args: tuple[Any, ...], kept: dict[str, str]
) -> tuple[nn.Module, dict[str, str], list[str]]:
    """The small model, in the modes and dtypes of ``model``, what stayed, and in what probes differed."""
    fixed: dict[str, str] = {}
    probes: Probes | None = None
    while True:  # each round without one more change that showed in the outputs
        small, args_here = _working_copy(model, args)
        calls, cut = trace(small, args_here)
        fixed |= not_used_once(small, calls)
        probes = probes or Probes(small, args_here)
        if (stayed := _reduce(small, probes.args, kept, fixed)) is not None:
            _restore_kind(small, model)
            return small, stayed | cut, probes.varied


def _reduce(
    small: nn.Module, probes: list[tuple[Any, ...]], kept: dict[str, str], fixed: dict[str, str]
) -> dict[str, str] | None:
    """Make ``small`` smaller in place; what stayed and why. None where ``kept`` or ``fixed`` had to grow.

    The first of ``probes`` is the example.
    """
    args = probes[0]
    expected = [outputs(small, probe) for probe in probes]

    def check(name: str) -> None:
        try:
            same = all(compare(outputs(small, probe), out)[1] for probe, out in zip(probes, expected))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise Refused(name, f"without them the forward pass fails with {reason}") from error
        if not same:
            raise Refused(name, "without them the outputs change")

    removed = True
    try:
        while removed:
            grows = fixed
            unfolded = fold_constants(small, args, fixed, check)
            grows = kept
            removed, unremoved = remove_unread(small, args, kept, fixed, check)
        grows = fixed
        gather_inputs(small, fixed, check)
    except Refused as refused:
        if refused.layer in grows:
            raise RuntimeError(f"compact: {refused.layer}: {refused.reason}") from refused
        grows[refused.layer] = refused.reason
        return None
    names = sorted(unfolded.keys() | unremoved.keys())
    return {name: "; ".join(x[name] for x in (unfolded, unremoved) if name in x) for name in names}


def _working_copy(model: nn.Module, args: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
    """A copy in eval mode whose parameters all require grad, and its arguments; float64 where that runs."""
    try:
        small = copy.deepcopy(model).eval()
    except Exception as error:
        raise ValueError(f"{type(model).__name__}: expected a model that copies, got: {error}") from error
    restore_inputs(small)
    for p in small.parameters():
        p.requires_grad_(p.is_floating_point())
    exact = tree_map(lambda x: x.double() if is_floating(x) else x, args)
    try:
        double = copy.deepcopy(small).double()
        outputs(double, exact)
    except Exception:  # a dtype is written into the model, or it does not run at all, which trace() tells
        return small, args
    return double, exact


def _restore_kind(small: nn.Module, model: nn.Module) -> None:
    """Give ``small`` the dtypes, requires_grad and training modes of ``model``."""
    as_was = dict(model.named_modules(remove_duplicate=False))
    for name, module in small.named_modules(remove_duplicate=False):
        old = as_was[name]
        module.training = old.training
        for key, p in module._parameters.items():
            if p is not None:
                like = old.weight if old._parameters[key] is None else old._parameters[key]
                p.data = p.data.to(like.dtype)
                p.requires_grad_(like.requires_grad)
                p.grad = None
        for key, x in module._buffers.items():
            if is_floating(x):
                module._buffers[key] = x.to(old._buffers[key].dtype)
