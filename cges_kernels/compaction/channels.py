"""The channels of a network: which of them can only be removed together, and which must stay.

A channel is a number. Following a forward pass (following.py) numbers the channels that layers make, joins
those that an operation brings together, and holds those that must stay. cutting.py reads the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

NOBODY = 0  # the channel of elements that cannot be cut, such as those of the model's input
ANYBODY = -1  # the channel of values that are all alike, of which any number could be made


@dataclass
class Weight:
    """A matrix or kernel that an operation multiplies with, and the channels of its first two dims."""

    name: str  # the name of the parameter
    ids: dict[int, Tensor] = field(default_factory=dict)  # {dim: the channel of each line along it}
    makes: set[int] = field(default_factory=set)  # dims along which each line makes one channel
    reads: set[int] = field(default_factory=set)  # dims along which each line reads one channel
    uses: int = 0  # the most operations that took it in one pass, in eval or in training mode

    @property
    def layer(self) -> str:
        """The name of the module that holds the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def label(self) -> str:
        """The weight's own name, with a colon, to put after its layer's name; "" if it is "weight"."""
        own = self.name.rpartition(".")[2]
        return "" if own == "weight" else f"{own}: "


@dataclass
class Held:
    """Channels that must stay, and the reason."""

    ids: Tensor
    reason: str
    read: bool  # whether their values matter, and not only their number


@dataclass
class Placed:
    """Channels that a module reshapes or slices by numbers, which its code may contain as constants."""

    module: str
    text: str  # the operation with its numbers
    ids: Tensor
    chooses: bool  # whether the operation selects some of them, instead of giving all another shape


class Channels:
    """The channels of one network."""

    def __init__(self) -> None:
        self.count = 1
        # {parameter: its Weight}, in the order in which the forward pass reads them
        self.weights: dict[str, Weight] = {}
        # {parameter or buffer that no operation multiplies with: the channel of each element in memory
        # order}. These channels are loose: each element has its own until it is joined with others.
        self.loose: dict[str, Tensor] = {}
        self.widths: dict[str, Tensor] = {}  # {norm without parameters: the channels of its input}
        self.by_numbers: list[Placed] = []
        self.called: dict[str, int] = {}  # {layer whose weight is used only by its own calls: their number}
        self.held: list[Held] = []
        # Channels that were joined although no element of one meets those of another, and why.
        self.tied: list[tuple[Tensor, str]] = []
        self._starts: list[int] = []  # the first channel of each call of new_loose
        self._ends: list[int] = []  # the channel after the last one of each call of new_loose
        self._pairs: list[Tensor] = [torch.zeros(2, 0, dtype=torch.long)]  # the pairs that were joined

    def new(self, count: int) -> Tensor:
        """`count` new channels. A single one is NOBODY, because at least one is always left."""
        if count == 1:
            return torch.tensor([NOBODY])
        self.count += count
        return torch.arange(self.count - count, self.count)

    def new_loose(self, count: int) -> Tensor:
        """New channels for the single elements of some memory.

        The channels that they are later joined with determine which of them are removed together, and so
        along which dim the memory is cut.
        """
        self._starts.append(self.count)
        ids = self.new(count)
        self._ends.append(self.count)
        return ids

    def _memories(self, ids: Tensor) -> Tensor:
        """For each channel the index of the call of new_loose that made it; -1 if none did."""
        if not self._starts:
            return torch.full_like(ids, -1)
        which = torch.searchsorted(torch.tensor(self._starts), ids.contiguous(), right=True) - 1
        return torch.where(ids < torch.tensor(self._ends)[which], which, -1)

    def are_loose(self, ids: Tensor) -> bool:
        """Whether all `ids` are channels of single elements, so that they may be joined along any dim."""
        return bool((self._memories(ids) >= 0).all())

    def loose_of(self, ids: Tensor) -> list[str]:
        """The names of the parameters and buffers whose elements have some of the channels `ids`."""
        names = {int(own[0]): name for name, own in self.loose.items()}
        starts = (self._starts[i] for i in self._memories(ids).unique().tolist() if i >= 0)
        return [names[start] for start in starts if start in names]

    def use(self, name: str, param: Tensor, reads: int | None = None, makes: int | None = None) -> Weight:
        """Note that an operation multiplies with a parameter, and reads and makes channels along its dims."""
        weight = self.weights.setdefault(name, Weight(name))
        weight.uses += 1
        for dim, dims in ((reads, weight.reads), (makes, weight.makes)):
            if dim is not None:
                dims.add(dim)
                if dim not in weight.ids:
                    weight.ids[dim] = self.new(param.shape[dim]).expand(param.shape[dim])
        return weight

    def hold(self, ids: Tensor, reason: str, read: bool = False) -> None:
        """Mark channels as not removable.

        If `read` is false only their number must stay, so their values may change.
        """
        ids = ids[ids > NOBODY].unique()
        if len(ids):
            self.held.append(Held(ids, reason, read))

    def join(self, a: Tensor, b: Tensor, reason: str = "they meet what cannot be cut") -> None:
        """Join the channels `a` and `b` (which broadcast) pair by pair; those paired with NOBODY are held."""
        pairs = torch.stack([x.flatten() for x in torch.broadcast_tensors(a, b)])
        pairs = pairs[:, (pairs[0] != pairs[1]) & (pairs >= NOBODY).all(0)]
        if pairs.numel():
            met = (pairs == NOBODY).any(0)
            self.hold(pairs[:, met].flatten(), reason)
            self._pairs.append(pairs[:, ~met])

    def touched(self) -> Tensor:
        """For each channel, whether it was joined or held: [count]."""
        touched = torch.zeros(self.count, dtype=torch.bool)
        for ids in (*self._pairs, *(held.ids for held in self.held)):
            touched[ids] = True
        return touched

    def groups(self) -> Tensor:
        """For each channel the first one of its group, the channels that it can only leave with: [count]."""
        a, b = torch.cat(self._pairs, 1)
        first = torch.arange(self.count)
        while True:
            low = torch.minimum(first[a], first[b])
            lower = first.scatter_reduce(0, torch.cat([first[a], first[b]]), low.repeat(2), "amin")
            lower = lower[lower]
            if torch.equal(lower, first):
                return first
            first = lower


class Owners:
    """Finds the parameter, or the buffer in the model's state_dict, whose memory a tensor uses."""

    def __init__(self, model: nn.Module) -> None:
        saved = model.state_dict(keep_vars=True)
        self.names: dict[int, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self.shared: set[str] = set()  # names whose memory another tensor of the model uses as well
        self.multiples: list[Tensor] = []  # kept, so that no other tensor gets their memory
        for name, x in saved.items():
            if not isinstance(x, Tensor) or not x.numel():
                continue
            first = self.names.setdefault(self._memory(x), name)
            if first == name:
                self.tensors[name] = x
            elif self.tensors[first] is not x:
                self.shared.add(first)

    @staticmethod
    def _memory(x: Tensor) -> int:
        return x.untyped_storage().data_ptr()

    def whole(self, x: Tensor) -> str | None:
        """The name of the parameter that `x` is, or a multiple of it; None if it is none or a part of one."""
        if (name := self.name(x)) is None or name in self.shared:
            return None
        whole = self.tensors[name]
        same = x.shape == whole.shape and x.stride() == whole.stride()
        return name if same else None

    def add_multiple(self, x: Tensor, of: Tensor) -> bool:
        """Take `x` for the parameter `of`, of which it is a multiple or a cast; returns whether it can be."""
        name = self.whole(of)
        if name is None or of.storage_offset() or x.stride() != of.stride():
            return False
        self.names[self._memory(x)] = name
        self.multiples.append(x)
        return True

    def name(self, x: Tensor) -> str | None:
        """The name of the parameter or buffer whose memory `x` uses; None if there is none."""
        return self.names.get(self._memory(x)) if x.layout == torch.strided else None

    def part(self, x: Tensor) -> tuple[str, list[tuple[int, int]]] | None:
        """Where a matrix, or a matrix repeated by expand, lies in the parameter whose memory it uses.

        Returns:
            The parameter's name, and for each dim of the matrix the parameter's dim and first line there.
                None if `x` is not such a part of a parameter.
        """
        if (name := self.name(x)) is None or name in self.shared:
            return None
        while x.dim() > 2 and x.stride(0) == 0:
            x = x[0]
        if x.dim() != 2:
            return None
        whole = self.tensors[name]
        if whole.dim() < 2 or whole[0, 0].numel() > 1:
            return None
        first = x.storage_offset() - whole.storage_offset()
        for dims in ((0, 1), (1, 0)):
            if all(x.shape[i] == 1 or x.stride(i) == whole.stride(dim) for i, dim in enumerate(dims)):
                large = max((0, 1), key=whole.stride)
                at = {large: first // whole.stride(large), 1 - large: int(first % whole.stride(large))}
                at[1 - large] //= whole.stride(1 - large)
                if all(at[dim] + x.shape[i] <= whole.shape[dim] for i, dim in enumerate(dims)):
                    return name, [(dim, at[dim]) for dim in dims]
        return None


def narrowed(ids: Tensor) -> Tensor:
    """`ids` with size 1 along every dim along which they do not vary."""
    for dim in range(ids.dim()):
        one = ids.narrow(dim, 0, 1)
        if ids.shape[dim] > 1 and (ids.stride(dim) == 0 or bool((ids == one).all())):
            ids = one
    return ids


def varying(ids: Tensor) -> list[int]:
    """The dims along which `ids` vary."""
    return [dim for dim, size in enumerate(ids.shape) if size > 1]


def aligned(sizes: Sequence[int], dims: int) -> tuple[int, ...]:
    """`sizes` as `dims` sizes, with ones in front as in broadcasting."""
    return (*[1] * (dims - len(sizes)), *sizes)
