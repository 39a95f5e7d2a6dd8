"""Which values inside a network no input can change, and their removal from the layers that read them.

A filter whose every weight is zero still gives its bias, and a batch norm its shift: a constant that later
layers read. Where such a constant reaches a layer, what the layer makes of it goes into the layer's bias.

What is constant is found by forward passes on NaN, with the layers' exact zeros honoured: an output of a
convolution or linear layer stays a number if only zero weights meet the NaN. Whatever is a number behind that
is a constant, through batch norm, activations, sums, pooling, concatenation and flattening alike. Comparisons
swallow NaN, so the same must come of +Inf and -Inf.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

CONVOLUTION = nn.modules.conv._ConvNd
WEIGHTED = (nn.Linear, CONVOLUTION)
Weighted: TypeAlias = nn.Linear | CONVOLUTION  # one of them, for annotations
PLAIN_FORWARDS = {
    cls.forward
    for cls in (
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    )
}


def is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def channel_dim(layer: Weighted) -> int:
    """The dim of the input, counted from the end, along which a Linear or a convolution is given channels."""
    return -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)


def columns(layer: Weighted) -> Tensor:
    """The weight as [in / blocks, out, *kernel], a detached view: what each input channel is read with."""
    dim = 0 if getattr(layer, "transposed", False) else 1
    return layer.weight.detach().movedim(dim, 0)


class _Unknowns:
    """Forward hooks that keep a marker to the outputs which really read it, and note each layer's inputs."""

    def __init__(self, model: nn.Module, marker: float) -> None:
        self.marker = marker  # NaN, Inf or -Inf: in place of what depends on the model's input
        self.names = {module: name for name, module in model.named_modules()}
        self.inputs: dict[str, Tensor] = {}
        self._unknown: dict[nn.Module, Tensor] = {}
        self._busy = False

    def marked(self, x: Any) -> Any:
        return torch.full_like(x, self.marker) if is_floating(x) else x

    def before(self, layer: Weighted, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._busy or not args or not is_floating(args[0]):
            return None
        x, *rest = args
        rows = x.movedim(channel_dim(layer), 0).flatten(1)
        same = (rows == rows[:, :1]).all(1) & rows[:, 0].isfinite()
        self.inputs[self.names[layer]] = torch.where(same, rows[:, 0], math.nan)
        self._unknown[layer] = ~x.isfinite()
        return (torch.where(x.isfinite(), x, 0), *rest)

    def after(self, layer: Weighted, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        if self._busy or layer not in self._unknown:
            return None
        unknown = self._unknown.pop(layer).to(out.dtype)
        reads = {"weight": (layer.weight != 0).to(out.dtype)}
        if layer.bias is not None:
            reads["bias"] = torch.zeros_like(layer.bias)
        self._busy = True
        try:
            read = torch.func.functional_call(layer, reads, (unknown, *args[1:]))
        finally:
            self._busy = False
        return torch.where(read > 0, self.marker, out)

    def after_embedding(self, layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return self.marked(out)

    @contextlib.contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        hooks = []
        for module in model.modules():
            if isinstance(module, WEIGHTED) and type(module).forward in PLAIN_FORWARDS:
                hooks += [
                    module.register_forward_pre_hook(self.before),
                    module.register_forward_hook(self.after),
                ]
            elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                hooks.append(module.register_forward_hook(self.after_embedding))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@torch.no_grad()
def inputs_of_layers(model: nn.Module, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """The constants that each Linear and convolution of ``model`` is given, by name: [channels].

    NaN where a channel depends on the model's input or has not one value at all positions. ``model`` is in
    eval mode; ``args`` sets the shapes.
    """
    found: dict[str, Tensor] = {}
    for marker in (math.nan, math.inf, -math.inf):
        unknowns = _Unknowns(model, marker)
        with unknowns.attached(model):
            model(*tree_map(unknowns.marked, args))
        for name, x in unknowns.inputs.items():
            found[name] = torch.where(x == found.get(name, x), x, math.nan)
    return found


def _pads_with_zeros(layer: Weighted) -> bool:
    """Whether a constant channel may give something else at the borders than inside."""
    if isinstance(layer, nn.Linear):
        return False
    if layer.transposed:
        return True  # fewer taps reach the borders
    return layer.padding_mode == "zeros" and (
        layer.padding == "same" or (layer.padding != "valid" and any(layer.padding))
    )


def fold_constants(
    model: nn.Module, args: tuple[Any, ...], fixed: Mapping[str, str], check: Callable[[str], None]
) -> dict[str, str]:
    """Move what each layer makes of constant inputs into its bias, and set the weights that read them to 0.

    In place; the outputs in eval mode stay. A constant other than 0 stays too where it meets zero padding, a
    grouped convolution or a ``fixed`` layer.

    Args:
        model: in eval mode.
        args: an example of its arguments; only shapes and non-floating values matter.
        fixed: {layer name: why its weight must not change}.
        check: called with the layer's name after each change.

    Returns:
        {layer name: which constants it goes on reading, and why}.
    """
    stayed: dict[str, str] = {}
    modules = dict(model.named_modules())
    try:
        found = inputs_of_layers(model, args)
    except Exception as error:
        told = f"{type(error).__name__}: {error}".partition("\n")[0]
        return {type(model).__name__: f"constants stay: its forward pass fails on NaN or Inf with {told}"}
    for name, constants in found.items():
        layer = modules[name]
        if not isinstance(layer, WEIGHTED) or getattr(layer, "groups", 1) > 1:
            continue
        weights = columns(layer)
        known = ~constants.isnan() & (weights != 0).flatten(1).any(1)
        fold = known & (constants == 0) if _pads_with_zeros(layer) else known
        if name in fixed:
            fold = torch.zeros_like(known)
        if count := int((known & ~fold).sum()):
            reason = fixed.get(name, "what it makes of them differs at the borders (zero padding)")
            stayed[name] = f"constant inputs that stay: {count}; {reason}"
        if fold.any():
            with torch.no_grad():
                shift = constants[fold] @ weights[fold].reshape(int(fold.sum()), weights.shape[1], -1).sum(
                    2
                )  # [out]
                weights[fold] = 0
                if layer.bias is not None:
                    layer.bias += shift
                elif shift.any():
                    layer.bias = nn.Parameter(shift)
            check(name)
    return stayed
