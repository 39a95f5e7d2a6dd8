"""Finds the values inside a network that no input can change; compact() moves such constants into biases.

They are found by forward passes on NaN in which exact zeros are honoured: an output of a product or a
convolution stays a number if the NaN is multiplied by zeros only, and so does a value that a batch norm or a
factor scales by 0. A number that is computed from such numbers is a constant, through activations, sums,
pooling, concatenation and flattening alike. Some functions turn NaN into a number, so a constant must come
out the same for +Inf and -Inf.

Integers and truth values cannot be NaN. Those that a caller passes, and those that are computed from unknown
values (by a comparison, an argmax), are followed from operation to operation. The numbers that are made with
them (by an embedding, a mask, a cast) are unknown. For elementwise operations this is known element by
element; for all others the whole result is unknown.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..core.calls import Given, call, mapped
from ..core.dispatch import EachOperation
from . import operations as ops
from .channels import Owners
from .layers import is_floating
from .probes import enlarged
from .running import TOLERANCES, following, unchanged

aten = torch.ops.aten
# These read a tensor's memory without an operation that a dispatch mode sees.
READERS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}


class Branches(Exception):
    """The forward pass branches on a value that depends on an input."""

    def __init__(self) -> None:
        super().__init__("its forward pass may go other ways for other inputs")


class _Lists(TorchFunctionMode):
    """Raises Branches where unknown values are read out of torch, into a list for example."""

    def __init__(self, unknowns: _Unknowns) -> None:
        super().__init__()
        self._unknowns = unknowns

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in READERS and self._unknowns.any_unknown(args[0]):
            raise Branches
        # one_hot reads the largest index to check it, which would count as a branch.
        if func is torch.nn.functional.one_hot and len(args) > 1:
            numbers = torch.arange(args[1], device=args[0].device)
            return (args[0][..., None] == numbers).long()
        return func(*args, **(kwargs or {}))


class _Unknowns(EachOperation):
    """A forward pass on a marker for unknown values, which exact zeros stop; notes each weight's inputs."""

    def __init__(self, model: nn.Module, marker: float) -> None:
        super().__init__()
        self.marker = marker  # NaN, Inf or -Inf, which stands for values that depend on the model's input
        self.owners = Owners(model)
        self.inputs: dict[str, list[Tensor]] = {}  # {weight: its inputs, at each of its uses}
        # Unknown integers and truth values by their memory, and which of their elements are unknown. The
        # tensor is kept, so that no other takes its memory.
        self._followed: dict[int, tuple[Tensor, Tensor]] = {}

    def marked(self, x: Tensor) -> Tensor:
        """An argument of the model, made unknown."""
        if is_floating(x):
            return torch.full_like(x, self.marker)
        x = x.clone()
        self._follow(x, torch.ones_like(x, dtype=torch.bool))
        return x

    def _follow(self, x: Tensor, where: Tensor) -> None:
        """Note that the elements `where` of an integer tensor are unknown."""
        self._followed[x.untyped_storage()._cdata] = x, where

    def unknown(self, x: Tensor) -> Tensor | None:
        """A mask of the unknown elements of an integer tensor; None if all are known."""
        if x.layout != torch.strided:
            return None
        if (followed := self._followed.get(x.untyped_storage()._cdata)) is None:
            return None
        whole, where = followed
        is_whole = whole.shape == x.shape and whole.stride() == x.stride()
        return where if is_whole else torch.ones_like(x, dtype=torch.bool)

    def any_unknown(self, x: Tensor) -> bool:
        return bool(self.marks(x).any()) if is_floating(x) else self.unknown(x) is not None

    def marks(self, x: Tensor) -> Tensor:
        """A mask of the numbers that hold the marker or were computed from it.

        For the marker -Inf these may include a mask's own -Inf; the pass on NaN tells them apart.
        """
        return x.isnan() if math.isnan(self.marker) else x.isnan() | (x == self.marker)

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if ops.kind(func) in ("convolved", "multiplied") and all(map(is_floating, args[:2])):
            return self._product(func, args, kwargs)
        zeros = self._zeros(func, args)
        out = func(*args, **kwargs)
        if ops.kind(func) == "shaped":
            return out
        if ops.kind(func) == "packed":  # the lengths say where its values go, and how many steps are made
            self._spread(func, args[:1], {}, out[0])
            return out
        if zeros is not None:
            x, value = zeros
            first = out[0] if isinstance(out, (tuple, list)) else out
            first.copy_(torch.where(x, value, first))
        self._spread(func, args, kwargs, out)
        return out

    def _spread(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Make unknown the results computed from unknown integers, and integers computed from the marker."""
        given = ops.tensors(args, kwargs)
        integers = [where for x in given if not is_floating(x) and (where := self.unknown(x)) is not None]
        elementwise = ops.kind(func) == "pointwise"
        for x in tree_leaves(out):
            sources = integers
            if not is_floating(x):
                numbers = (self.marks(y) for y in given if is_floating(y))
                sources = [*integers, *(where for where in numbers if bool(where.any()))]
            if not sources:
                continue
            if not isinstance(x, Tensor):
                if self.marker != -math.inf:  # -Inf may be a mask's, and says nothing
                    raise Branches
                continue
            where = torch.ones_like(x, dtype=torch.bool)
            if elementwise:
                where = reduce(torch.logical_or, sources, torch.zeros_like(where))
            if is_floating(x):
                x.masked_fill_(where, self.marker)
            else:
                self._follow(x, where)

    def _zeros(self, func: Any, args: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
        """A mask of the elements that an exact zero scales, and their values; None if no zero scales any."""
        if ops.name(func) in ("mul", "mul_"):
            factors = [x for x in args[:2] if is_floating(x)]
            if len(factors) == 2 and any(not bool(x.isfinite().all()) for x in factors):
                where = reduce(torch.logical_or, [x == 0 for x in factors])
                return where, torch.zeros((), dtype=args[0].dtype, device=args[0].device)
        elif ops.kind(func) == "batch_normed" and is_floating(args[1]):
            x, scale, shift = args[:3]
            shape = [1, -1, *[1] * (x.dim() - 2)]
            shift = torch.zeros_like(scale) if shift is None else shift
            return (scale == 0).reshape(shape), shift.reshape(shape)
        return None

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The result of a product, with the marker only where an unknown meets a weight other than 0."""
        convolved = ops.kind(func) == "convolved"
        first = 0 if convolved or ops.name(func) in ("mm", "bmm") else 1
        a, b = args[first : first + 2]
        self._note(a, b, convolved)
        # What turns signs over, such as a batch norm with a negative scale, makes -Inf of +Inf.
        unknown = [x.isnan() if math.isnan(self.marker) else ~x.isfinite() for x in (a, b)]
        known = [torch.where(x, 0, y) for x, y in zip(unknown, (a, b))]
        out = func(*args[:first], *known, *args[first + 2 :], **kwargs)
        if not any(bool(x.any()) for x in unknown):
            return out
        plain = func.overloadpacket if convolved else {2: aten.mm, 3: aten.bmm}[a.dim()]
        rest = (None, *args[first + 3 :]) if convolved else ()
        nonzero = [(x != 0).to(out.dtype) for x in (a, b)]
        reads = plain(unknown[0].to(out.dtype), nonzero[1], *rest)
        if bool(unknown[1].any()):
            reads = reads + plain(nonzero[0], unknown[1].to(out.dtype), *rest)
        return torch.where(reads > 0, self.marker, out)

    def _note(self, a: Tensor, b: Tensor, convolved: bool) -> None:
        """Note the value of each channel that a weight reads, NaN where a channel has more than one value."""
        for weight, x, dim in ((b, a, 1 if convolved else -1), (a, b, -2))[: 1 if convolved else 2]:
            name = self.owners.name(weight)
            if name is None or (not convolved and self.owners.part(weight) is None):
                continue
            rows = x.movedim(dim, 0).flatten(1)
            if not rows.numel():
                continue
            same = _alike(rows, rows[:, :1]).all(1) & rows[:, 0].isfinite()
            self.inputs.setdefault(name, []).append(torch.where(same, rows[:, 0], math.nan))


def _alike(a: Tensor, b: Tensor) -> Tensor:
    """A mask of the elements of `a` that are those of `b` but for rounding; NaN is like nothing."""
    return torch.isclose(a, b, rtol=TOLERANCES[a.dtype], atol=0)


def inputs_of_weights(model: nn.Module, given: Given, resized: Given | None = None) -> dict[str, Tensor]:
    """The constants that each weight of `model` reads, by its parameter's name: [channels].

    NaN stands for a channel that depends on the model's input, or does not have one value at all positions,
    in all uses of the weight and for another size (that of `resized`, or one that `enlarged` gives). `model`
    is in eval mode. Of the tensors in `given` only the shapes matter; other arguments are taken as they are.

    Raises:
        Branches: the forward pass branches on a value that depends on an input.
        Exception: whatever the forward pass raises on NaN or Inf.
    """
    found: dict[str, Tensor] = {}

    def narrow(marker: float, given: Given) -> None:
        unknowns = _Unknowns(model, marker)
        marked = mapped(unknowns.marked, given)
        with unchanged(model), following(), unknowns, _Lists(unknowns):
            call(model, marked)
        for name, (x, *others) in unknowns.inputs.items():
            for y in (found.get(name, x), *others):
                alike = _alike(x, y) if len(x) == len(y) else torch.zeros_like(x, dtype=torch.bool)
                x = torch.where(alike, x, math.nan)
            found[name] = x

    narrow(math.nan, given)
    narrow(-math.inf, given)
    try:  # behind zero padding and pooling a constant may depend on the size
        narrow(math.inf, enlarged(given) if resized is None else resized)
    except Exception:  # the model takes no other size
        narrow(math.inf, given)
    return found
