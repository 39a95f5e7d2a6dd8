"""`compact`: from a network with dead weights to a smaller dense one that computes the same.

This is the order of the work: follow channels (following.py), find constants (unknown.py), remove what nobody
reads and compare outputs (shrinking.py). docs/design/compaction.md explains it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.random import fork_rng

from ..core.calls import Given, arguments_of, leaves, tensors_in
from ..reporting.explain import Table
from .channels import Channels
from .copies import (
    has_hooks,
    kept_tensors,
    restore_hooks,
    restore_kind,
    unwrapped,
    without_hooks,
    working_copies,
)
from .following import follow
from .probes import Probes, failed_in, shortened
from .running import SLACK, check_modules, compare, cuda_devices, latencies, outputs_and_flops
from .shrinking import Shrinking
from .unknown import Branches, inputs_of_weights


@dataclass(frozen=True)
class Compaction:
    """The result of [`compact`][cges_kernels.compact]; `str()` is a summary. Pairs are (before, after).

    Attributes:
        model: the small model.
        layers: the shapes of the weights that changed, by parameter name.
        parameters: the number of parameters.
        flops: dense FLOPs of one forward pass on the example, counted as in `sparsity_report`.
        latency_ms: the median time of such a pass in milliseconds. Both models take turns for half a second;
            on a busy machine and for tiny models it says little.
        max_difference: the largest difference between the outputs on the example.
        kept: {layer: what is dead in it but had to stay, and why}.
        varied: how the inputs on which outputs were compared differed from the example.
    """

    model: nn.Module = field(repr=False)
    layers: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    parameters: tuple[int, int]
    flops: tuple[float, float]
    latency_ms: tuple[float, float]
    max_difference: float
    kept: dict[str, str]
    varied: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, as plain numbers and text that JSON takes."""
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
            left = f"{100 * pair[1] / pair[0]:.1f}%" if pair[0] and self.layers else ""
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


def compact(
    model: nn.Module,
    example_input: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    keep: Collection[str] = (),
) -> Compaction:
    """A smaller dense model that computes, in eval mode, what `model` computes.

    It removes filters, channels and units that no weight reads, and all that only they read in turn. Every
    operation of a forward pass is followed: residual sums, concatenation, chunks, flattening, batch norm,
    depthwise and grouped convolutions (whole groups), embeddings, recurrent layers.

    A dead filter may still be read: its bias or batch-norm shift is a constant for the layers behind it. Such
    constants go into the biases of those layers first (a layer without a bias gets one), and then the filter
    goes. What cannot go without changing the outputs stays, and `kept` says why:

    - outputs of the model;
    - a constant other than 0 that meets zero padding, since it would be wrong at the borders;
    - channels that a layer norm, group norm or attention takes together, and those of a convolution's group
      of which others are needed;
    - channels that a layer may read which the example never calls.

    A Linear or convolution that reads few of its inputs where other layers need them all picks its inputs by
    itself (`layer.read_inputs`). At least one channel of each layer stays.

    Behind zero padding and pooling, a constant may depend on the size of the input. So constants are looked
    for at a second size too: another length, or twice the size in all dims from the third on. A model that
    takes neither gets those of the example's size. The values of all tensors that are passed count as
    unknown, be they numbers, token ids or masks. Numbers and flags that are not tensors are taken as they
    are. Where an input decides which way the forward pass goes, nothing is removed.

    The result is checked on the example and on other inputs (`varied` says in what they differ), in float64
    where the model allows it. A change that shows in the outputs is not made, and `kept` says so. The model
    is looked at with an example batch of at most two, in eval and in training mode; outputs are compared in
    eval mode.

    Args:
        model: the model, which is left as it is. Of a compiled or data-parallel model the module inside is
            taken. Hooks are not run, so what they change is not seen, unless the model fails without them
            or keeps tensors as attributes, which hooks may have put there; the result has copies of them.
        example_input: the model's argument, a tuple of its arguments, or a dict of them by name, of the size
            that is used later.
        kwargs: more of the model's arguments by name.
        keep: names of modules whose number of outputs must stay.

    Returns:
        A summary with the small model in its attribute `model`.

    Raises:
        ValueError: the forward pass fails on the example; a module is scripted or computes its weight from
            others; or the model takes no other integers or truth values than the example's. The error names
            the module or the argument.
        RuntimeError: the outputs differ after all by more than rounding.

    Warns:
        UserWarning: the model has hooks, which are not run.

    Examples:
        >>> result = compact(model, torch.zeros(1, 3, 32, 32))
        >>> print(result)  # shapes, parameters, FLOPs, latency, what stayed and why
        >>> save_compacted(result.model, "small.pt")
    """
    model = unwrapped(model)
    check_modules(model, keep)
    given = arguments_of(example_input, kwargs)
    with fork_rng(devices=cuda_devices(model, given)):
        hooks = has_hooks(model)
        if hooks and kept_tensors(model):  # they may come from its hooks, and be those of an earlier input
            result = _compaction(model, given, keep)
        else:
            if hooks:
                warnings.warn(
                    "compact: hooks of the model are not run, so what they change in its outputs is not seen",
                    stacklevel=2,
                )
            try:
                with without_hooks(model):
                    result = _compaction(model, given, keep)
            except ValueError:
                if not hooks:
                    raise
                result = _compaction(model, given, keep)  # with hooks: the model may need them to run
    restore_hooks(result.model, model)
    return result


def _compaction(model: nn.Module, given: Given, keep: Collection[str]) -> Compaction:
    """The result of compact(). The hooks of `model` run if it has any."""
    expected, flops_before = _expected(model, given)
    *short, whole = shortened(given)
    for example in (*short, whole):
        try:
            small, kept, varied = _compacted(model, example, keep)
            found, flops_after = outputs_and_flops(small, given)
            difference, within = compare(found, expected, SLACK)
            if not within:
                raise RuntimeError(
                    f"compact: expected equal outputs, got a largest difference of {difference:.3g}"
                )
            break
        except Exception:
            if example is whole:  # the first dim of a cut example may be no batch, so try the whole one
                raise
    before, after = ({name: tuple(p.shape) for name, p in m.named_parameters()} for m in (model, small))
    return Compaction(
        model=small,
        layers={
            name: (shape, after[name])
            for name, shape in before.items()
            if len(shape) > 1 and after[name] != shape
        },
        parameters=(_num_weights(model), _num_weights(small)),
        flops=(flops_before, flops_after),
        latency_ms=latencies((model, small), given),
        max_difference=difference,
        kept=kept,
        varied=tuple(varied),
    )


def _expected(model: nn.Module, given: Given) -> tuple[list[Any], int]:
    """The model's outputs on the example and its FLOPs, or a ValueError that names the failing module."""
    try:
        return outputs_and_flops(model, given)
    except Exception as error:
        where = failed_in(model, error) or type(model).__name__
        raise ValueError(
            f"{where}: expected a forward pass on example_input, got {type(error).__name__}: {error}"
        ) from error


def _num_weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _compacted(
    model: nn.Module, given: Given, keep: Collection[str]
) -> tuple[nn.Module, dict[str, str], list[str]]:
    """(the small model, {layer: what stayed in it and why}, how the probes differed from the example)."""
    exact, plain = working_copies(model, given)
    try:
        base, given = exact
        seen = follow(base, given, keep)
    except Exception:  # a dtype may be written into the model's code
        base, given = plain
        try:
            seen = follow(base, given, keep)
        except Exception as error:
            told = f"{type(error).__name__}: {error}".partition("\n")[0]
            where = failed_in(base, error) or type(model).__name__
            raise ValueError(
                f"{where}: expected a copy of the model that runs as it does (a hook may hold on to the "
                f"original), got {told}"
            ) from error
    probes = Probes(base, given, seen.outputs, seen.trained)
    constants, unfound = _constants(base, given, probes.resized, seen.channels)
    small, stayed = Shrinking(base, seen.channels, constants, probes).run()
    restore_kind(small, model)
    if not any(stayed):  # nothing dead stayed, so constants that were not found cost nothing
        unfound = {}
    kept: dict[str, str] = {}
    for found in (unfound, *stayed, _not_followed(base, seen.opaque)):
        for name, reason in found.items():
            kept[name] = f"{kept[name]}; {reason}" if name in kept else reason
    return small, dict(sorted(kept.items())), probes.varied


def _constants(
    model: nn.Module, given: Given, resized: Given | None, channels: Channels
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """({weight: the constants that it reads}, {model: why they are not known}).

    At least one of the two is empty. If an input decides what is computed, all channels are held, because
    another input may make the model read others.
    """
    fixed = (Tensor, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))
    other = {type(x).__name__ for x in leaves(given) if not isinstance(x, fixed)}
    if other or not tensors_in(given):
        what = f"holds what could not be varied ({', '.join(sorted(other))})" if other else "holds no tensor"
        return {}, {type(model).__name__: f"constants stay: the example {what}"}
    try:
        return inputs_of_weights(model, given, resized), {}
    except Branches as error:
        channels.hold(torch.arange(channels.count), str(error))
        return {}, {}
    except Exception as error:
        told = f"{type(error).__name__}: {error}".partition("\n")[0]
        return {}, {type(model).__name__: f"constants stay: its forward pass fails on NaN or Inf with {told}"}


def _not_followed(model: nn.Module, opaque: Mapping[str, str]) -> dict[str, str]:
    """{layer: how many dead rows and columns stay, and why the weight is not followed}"""
    found: dict[str, str] = {}
    params = {name: p.detach() for name, p in model.named_parameters()}
    for name, why in opaque.items():
        weight = params.get(name)
        # A weight that is all zero is taken for a table that begins with zeros, not for a result of training.
        if weight is None or weight.dim() < 2 or not weight.any():
            continue
        zero = [int((weight.transpose(0, dim) == 0).flatten(1).all(1).sum()) for dim in (0, 1)]
        if any(zero):
            layer, _, own = name.rpartition(".")
            counts = " and ".join(map(str, zero))
            text = f"{own}: dead rows and columns that stay: {counts}; {why}"
            found[layer or own] = f"{found[layer]}; {text}" if layer in found else text
    return found
