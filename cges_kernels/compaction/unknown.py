"""Which values inside a network no input can change.

Found by forward passes on NaN, with the layers' exact zeros honoured: an output of a convolution or linear
layer stays a number if only zero weights meet the NaN. Whatever is a number behind that is a constant,
through batch norm, activations, sums, pooling, concatenation and flattening alike. Some functions swallow
NaN, so the same must come of +Inf and -Inf.

Integers and truth values cannot be NaN. Those that a caller passes, and those that come of what is unknown
(by a comparison, an argmax), are followed from operation to operation: the numbers that one makes with them
(by an embedding, a mask, a cast) are unknown. Elementwise operations tell elements apart, others do not.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .layers import PLAIN_FORWARDS, WEIGHTED, Weighted, channel_dim, is_floating

aten = torch.ops.aten
# Operations whose outputs depend on their tensors' shapes alone.
OF_SHAPES = {
    *(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like),
    *(aten.rand_like, aten.randn_like, aten.randint_like),
    *(aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.new_empty_strided),
}
# Elementwise ones that torch does not tag as pointwise.
ELEMENTWISE = {aten._to_copy, aten.masked_fill, aten.where}
# What reads a tensor's memory without an operation that a dispatch mode sees.
READERS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}


class Branches(Exception):
    """The forward pass asks for a value that an input decides."""

    def __init__(self) -> None:
        super().__init__("its forward pass may go other ways for other inputs")


class _Lists(TorchFunctionMode):
    """Refuses to read what is unknown out of torch."""

    def __init__(self, unknowns: _Unknowns) -> None:
        super().__init__()
        self._unknowns = unknowns

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in READERS and self._unknowns.unknown(args[0]) is not None:
            raise Branches
        return func(*args, **(kwargs or {}))


class _Unknowns(TorchDispatchMode):
    """Keeps a marker to what really reads it, and notes each layer's inputs."""

    def __init__(self, model: nn.Module, marker: float) -> None:
        super().__init__()
        self.marker = marker  # NaN, Inf or -Inf: in place of what depends on the model's input
        self.names = {module: name for name, module in model.named_modules()}
        self.inputs: dict[str, Tensor] = {}
        self._read_with: dict[nn.Module, Tensor] = {}
        # Unknown integers and truth values, by the memory that they lie in, which is held so that no other
        # takes it; and which of their elements are unknown.
        self._followed: dict[int, tuple[Tensor, Tensor]] = {}
        self._paused = False

    def marked(self, x: Any) -> Any:
        """An argument of the model, unknown."""
        if is_floating(x):
            return torch.full_like(x, self.marker)
        if not isinstance(x, Tensor):
            return x
        x = x.clone()
        self._follow(x, torch.ones_like(x, dtype=torch.bool))
        return x

    def _follow(self, x: Tensor, where: Tensor) -> None:
        self._followed[x.untyped_storage()._cdata] = x, where

    def unknown(self, x: Tensor) -> Tensor | None:
        """Which elements of an integer tensor are unknown, None if none is."""
        if (followed := self._followed.get(x.untyped_storage()._cdata)) is None:
            return None
        whole, where = followed
        is_whole = whole.shape == x.shape and whole.stride() == x.stride()
        return where if is_whole else torch.ones_like(x, dtype=torch.bool)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._paused or func.overloadpacket in OF_SHAPES:
            return out
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        integers = [where for x in given if not is_floating(x) and (where := self.unknown(x)) is not None]
        elementwise = torch.Tag.pointwise in func.tags or func.overloadpacket in ELEMENTWISE
        for x in tree_leaves(out):
            sources = integers
            if not is_floating(x):
                numbers = (~y.isfinite() for y in given if is_floating(y))
                sources = [*integers, *(where for where in numbers if bool(where.any()))]
            if not sources:
                continue
            if not isinstance(x, Tensor):
                if integers:
                    raise Branches
                continue
            where = torch.ones_like(x, dtype=torch.bool)
            if elementwise:
                where = reduce(torch.logical_or, sources, torch.zeros_like(where))
            if is_floating(x):
                x.masked_fill_(where, self.marker)
            else:
                self._follow(x, where)
        return out

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def before(self, layer: Weighted, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._paused or not args or not is_floating(args[0]):
            return None
        with self._pause():
            x, *rest = args
            rows = x.movedim(channel_dim(layer), 0).flatten(1)
            same = (rows == rows[:, :1]).all(1) & rows[:, 0].isfinite()
            self.inputs[self.names[layer]] = torch.where(same, rows[:, 0], math.nan)
            self._read_with[layer] = ~x.isfinite()
            return (torch.where(x.isfinite(), x, 0), *rest)

    def after(self, layer: Weighted, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        if self._paused or layer not in self._read_with:
            return None
        with self._pause():
            unknown = self._read_with.pop(layer).to(out.dtype)
            reads = {"weight": (layer.weight != 0).to(out.dtype)}
            if layer.bias is not None:
                reads["bias"] = torch.zeros_like(layer.bias)
            read = torch.func.functional_call(layer, reads, (unknown, *args[1:]))
            return torch.where(read > 0, self.marker, out)

    @contextlib.contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        layers = [m for m in model.modules() if isinstance(m, WEIGHTED) and type(m).forward in PLAIN_FORWARDS]
        hooks = [layer.register_forward_pre_hook(self.before) for layer in layers]
        hooks += [layer.register_forward_hook(self.after) for layer in layers]
        try:
            with self, _Lists(self):
                yield
        finally:
            for hook in hooks:
                hook.remove()


@torch.no_grad()
def inputs_of_layers(model: nn.Module, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """The constants that each Linear and convolution of ``model`` is given, by name: [channels].

    NaN where a channel depends on the model's input or has not one value at all positions. ``model`` is in
    eval mode; of tensors in ``args`` only the shapes matter, other values are taken as they are.

    Raises:
        Branches: the forward pass asks for a value that an input decides.
        Exception: whatever the forward pass raises on NaN or Inf.
    """
    found: dict[str, Tensor] = {}
    for marker in (math.nan, math.inf, -math.inf):
        unknowns = _Unknowns(model, marker)
        given = tree_map(unknowns.marked, args)
        with unknowns.attached(model):
            model(*given)
        for name, x in unknowns.inputs.items():
            found[name] = torch.where(x == found.get(name, x), x, math.nan)
    return found
