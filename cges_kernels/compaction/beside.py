"""Keeps for each tensor of a forward pass a tensor of integers: the channel of each of its elements.

`Beside` holds these tensors, and the notes that rules (rules.py, products.py) make. following.py runs the
pass.
"""

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
    """An operation with its arguments and its result."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    before: Tensor | None  # the channels of the first argument before its dims were moved in place

    @property
    def outs(self) -> list[Any]:
        return list(self.out) if isinstance(self.out, (list, tuple)) else [self.out]


class Beside:
    """The channels of each tensor in a forward pass of `model`."""

    def __init__(self, model: nn.Module, channels: Channels) -> None:
        super().__init__()
        self.channels, self.owners = channels, Owners(model)
        self.model = type(model).__name__
        self.used: set[str] = set()  # the names of parameters and buffers that some operation took
        self.opaque: dict[str, str] = {}  # {weight: why it is not followed}
        self.sizes: dict[bytes, Tensor] = {}  # {bytes of ids: ids}, each line of channels along some dim
        self.stack: list[str] = []  # the names of the modules whose forward is running, innermost last
        self.calls: Counter[str] = Counter()  # {module: the number of its calls}
        self.given: Any = WeakTensorKeyDictionary()  # the model's arguments and tensors computed from them
        self.computed: Any = WeakTensorKeyDictionary()  # tensors that are computed from parameters alone
        self._ids: Any = WeakTensorKeyDictionary()  # {tensor: its ids}
        # Tensors that were made without channels (ANYBODY) and then written in parts: {memory: (tensor,
        # channel of each element)}. The tensor is kept so that no other tensor gets the same memory.
        self.written: dict[int, tuple[Tensor, Tensor]] = {}

    def ids(self, x: Tensor) -> Tensor:
        """The channel of each element of `x`. Dims along which channels do not vary have size 1."""
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
        """Note that `x` holds these channels. If they vary along two dims they cannot be cut and are held."""
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
        """The running module and the operation, as text for reasons."""
        return f"{self.stack[-1] or self.model} ({operation})" if self.stack else f"the model ({operation})"

    def take(self, operation: Any, *tensors: Tensor) -> None:
        """Hold all channels of `tensors`, because an operation takes them together."""
        where = self.where(operation if isinstance(operation, str) else ops.name(operation))
        for x in tensors:
            if self.is_owners(x):
                self.opaque[str(self.owners.name(x))] = f"{where} is not followed"
            else:
                self.channels.hold(self.ids(x), f"{where} takes them together", read=True)

    def is_owners(self, x: Tensor) -> bool:
        """Whether `x` is a parameter or buffer, or a view of one, to which no channels were noted."""
        return self.owners.name(x) is not None and x not in self._ids

    def line(self, func: Any, x: Tensor, dim: int) -> Tensor:
        """The channels of `x` along `dim`, the only one along which they may vary: [x.shape[dim]].

        If they vary along further dims, channels of single elements are joined along those, and any other
        channels are held.
        """
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
        """Hold everything that an operation without a rule takes; its results have no channels."""
        self.take(known_as or call.func, *ops.tensors(call.args, call.kwargs))
        for y in ops.tensors(call.outs, {}):
            self.note(y, torch.full([1] * y.dim(), NOBODY))
