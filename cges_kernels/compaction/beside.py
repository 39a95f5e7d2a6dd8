"""The tensors of integers that stand beside those of a forward pass: whose channel each element is."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.groups import is_dense
from . import operations as ops
from .channels import NOBODY, Channels, Owners, narrowed, varying


class Call(NamedTuple):
    """An operation, what it was given and what it gave."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    before: Tensor | None  # the channels of what it moves in place

    @property
    def outs(self) -> list[Any]:
        return list(self.out) if isinstance(self.out, (list, tuple)) else [self.out]


class Beside:
    """The channels of each tensor in a forward pass; parameters are those of `model`."""

    def __init__(self, model: nn.Module, channels: Channels) -> None:
        super().__init__()
        self.channels, self.owners = channels, Owners(model)
        self.model = type(model).__name__
        self.used: set[str] = set()  # parameters and buffers that operations took
        self.opaque: dict[str, str] = {}  # weights that nobody here understands, and what took them
        self.sizes: dict[bytes, Tensor] = {}  # channels that lay side by side
        self.stack: list[str] = []  # of modules at work
        self.calls: Counter[str] = Counter()
        self.given: Any = WeakTensorKeyDictionary()  # what the model is passed, and all that comes of it
        self.computed: Any = WeakTensorKeyDictionary()  # what comes of parameters alone
        self._ids: Any = WeakTensorKeyDictionary()
        # What was anybody's and is written in parts, by its memory, which is held so that no other takes its
        # place; and the channels of its elements.
        self.written: dict[int, tuple[Tensor, Tensor]] = {}

    def ids(self, x: Tensor) -> Tensor:
        """Whose channel each element of `x` is: the dims of `x`, of size 1 where it does not vary."""
        if x.layout != torch.strided:
            return torch.full([1] * x.dim(), NOBODY)
        if (written := self.written.get(x.untyped_storage()._cdata)) is not None:
            whole, elements = written
            first = x.storage_offset() - whole.storage_offset()
            return narrowed(elements.as_strided(x.shape, x.stride(), first))
        if x in self._ids:
            return self._ids[x]
        nobody = torch.full([1] * x.dim(), NOBODY)
        if (name := self.owners.name(x)) is None or name in self.owners.shared or x.numel() == 1:
            return nobody
        whole = self.owners.tensors[name]
        if whole.numel() == 1 or not is_dense(whole):
            return nobody
        if name not in self.channels.loose:
            self.channels.loose[name] = self.channels.new_loose(whole.numel())
        first = x.storage_offset() - whole.storage_offset()
        return narrowed(self.channels.loose[name].as_strided(x.shape, x.stride(), first))

    def note(self, x: Any, ids: Tensor) -> None:
        """`x` holds these channels. Along two dims they could not be cut out of it."""
        if not isinstance(x, Tensor) or x.dim() != ids.dim():
            return
        ids = narrowed(ids)
        dims = varying(ids)
        if len(dims) > 1 and not self.channels.are_loose(ids):
            self.channels.hold(ids, f"{self.where('reshaped')} lays them out along two dims", read=True)
            ids = torch.full([1] * x.dim(), NOBODY)
        elif len(dims) == 1:
            line = ids.flatten()
            self.sizes[line.numpy().tobytes()] = line
        self._ids[x] = ids

    def where(self, operation: str) -> str:
        return f"{self.stack[-1] or self.model} ({operation})" if self.stack else f"the model ({operation})"

    def take(self, operation: Any, *tensors: Tensor) -> None:
        """An operation takes all channels of `tensors` together."""
        where = self.where(operation if isinstance(operation, str) else ops.name(operation))
        for x in tensors:
            if self.is_owners(x):
                self.opaque[str(self.owners.name(x))] = where
            else:
                self.channels.hold(self.ids(x), f"{where} takes them together", read=True)

    def is_owners(self, x: Tensor) -> bool:
        """Whether it is a parameter or buffer, or a view of one."""
        return self.owners.name(x) is not None and x not in self._ids

    def line(self, func: Any, x: Tensor, dim: int) -> Tensor:
        """The channels of `x` along `dim`, the only one along which they may vary: [x.shape[dim]]."""
        ids = self.ids(x)
        dim %= x.dim()
        if any(d != dim for d in varying(ids)):
            lines = ids.movedim(dim, 0).flatten(1)
            if not self.channels.are_loose(ids):
                self.take(func, x)
                return torch.full((x.shape[dim],), NOBODY)
            self.channels.join(lines, lines[:, :1])
            return lines[:, 0].expand(x.shape[dim])
        return ids.flatten().expand(x.shape[dim])

    def take_all(self, call: Call, known_as: str = "") -> None:
        """An operation that nobody here understands."""
        self.take(known_as or call.func, *ops.tensors(call.args, call.kwargs))
        for y in ops.tensors(call.outs, {}):
            self.note(y, torch.full([1] * y.dim(), NOBODY))
