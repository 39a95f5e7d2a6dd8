"""Which channels of a network can only leave it together, and what holds them.

A channel is a number. Whoever follows a forward pass hands numbers out to what layers make, joins those that
an operation brings together, and holds those that must stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

NOBODY = 0  # the channel of what cannot be cut, as the model's input
ANYBODY = -1  # of values that are all alike, made in the size of what they meet


@dataclass
class Weight:
    """A matrix or kernel that an operation multiplies with, and the channels of its first two dims."""

    name: str  # of the parameter
    ids: dict[int, Tensor] = field(default_factory=dict)  # dim: one channel per line
    makes: set[int] = field(default_factory=set)  # dims whose lines make a channel each
    reads: set[int] = field(default_factory=set)  # dims whose lines read one
    uses: int = 0  # how often an operation took it, in eval mode

    @property
    def layer(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def label(self) -> str:
        """What to call it beside its layer's name."""
        own = self.name.rpartition(".")[2]
        return "" if own == "weight" else f"{own}: "


@dataclass
class Held:
    """Channels that stay."""

    ids: Tensor
    reason: str
    read: bool  # whether their values are read, not only their number


@dataclass
class Placed:
    """Channels that a module lays out by numbers, and how."""

    module: str
    text: str
    ids: Tensor
    chooses: bool  # some of them, rather than all in another shape


class Channels:
    """The channels of one network."""

    def __init__(self) -> None:
        self.count = 1
        self.weights: dict[
            str, Weight
        ] = {}  # by parameter, in the order in which the forward pass reads them
        # Of a parameter or buffer that no operation multiplies with: one per element, in memory's order.
        self.loose: dict[str, Tensor] = {}
        self.widths: dict[str, Tensor] = {}  # of norms without parameters, by module: what they are given
        # By module: channels that it lays out by numbers, which its code may compute or have written into it.
        self.by_numbers: list[Placed] = []
        self.called: set[str] = set()  # layers whose weight takes part by their being called alone
        self.held: list[Held] = []
        self._starts: list[int] = []  # of loose ones
        self._ends: list[int] = []
        self._pairs: list[Tensor] = [torch.zeros(2, 0, dtype=torch.long)]

    def new(self, count: int) -> Tensor:
        """So many channels. A single one is nobody's: at least one is always left."""
        if count == 1:
            return torch.tensor([NOBODY])
        self.count += count
        return torch.arange(self.count - count, self.count)

    def new_loose(self, count: int) -> Tensor:
        """Channels of single elements of some memory, which what they meet puts in order."""
        self._starts.append(self.count)
        ids = self.new(count)
        self._ends.append(self.count)
        return ids

    def _memories(self, ids: Tensor) -> Tensor:
        """Of which memory, in the order of new_loose, each channel is a single element; -1 for none."""
        if not self._starts:
            return torch.full_like(ids, -1)
        which = torch.searchsorted(torch.tensor(self._starts), ids.contiguous(), right=True) - 1
        return torch.where(ids < torch.tensor(self._ends)[which], which, -1)

    def are_loose(self, ids: Tensor) -> bool:
        """Whether all of them are single elements, so that they may be joined along any dim."""
        return bool((self._memories(ids) >= 0).all())

    def loose_of(self, ids: Tensor) -> list[str]:
        """The parameters that some of them are elements of."""
        names = {int(own[0]): name for name, own in self.loose.items()}
        starts = (self._starts[i] for i in self._memories(ids).unique().tolist() if i >= 0)
        return [names[start] for start in starts if start in names]

    def use(self, name: str, param: Tensor, reads: int | None = None, makes: int | None = None) -> Weight:
        """A parameter that an operation multiplies with, reading and making channels along its dims."""
        weight = self.weights.setdefault(name, Weight(name))
        weight.uses += 1
        for dim, dims in ((reads, weight.reads), (makes, weight.makes)):
            if dim is not None:
                dims.add(dim)
                if dim not in weight.ids:
                    weight.ids[dim] = self.new(param.shape[dim]).expand(param.shape[dim])
        return weight

    def hold(self, ids: Tensor, reason: str, read: bool = False) -> None:
        ids = ids[ids > NOBODY].unique()
        if len(ids):
            self.held.append(Held(ids, reason, read))

    def join(self, a: Tensor, b: Tensor, reason: str = "they meet what cannot be cut") -> None:
        """`a` and `b` (which broadcast) meet element by element; with nobody's they are held."""
        pairs = torch.stack([x.flatten() for x in torch.broadcast_tensors(a, b)])
        pairs = pairs[:, (pairs[0] != pairs[1]) & (pairs >= NOBODY).all(0)]
        if pairs.numel():
            met = (pairs == NOBODY).any(0)
            self.hold(pairs[:, met].flatten(), reason)
            self._pairs.append(pairs[:, ~met])

    def touched(self) -> Tensor:
        """Per channel, whether it was joined or held: [count]."""
        touched = torch.zeros(self.count, dtype=torch.bool)
        for ids in (*self._pairs, *(held.ids for held in self.held)):
            touched[ids] = True
        return touched

    def groups(self) -> Tensor:
        """For each channel the first of those that it can only leave with, by :meth:`join`: [count]."""
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
    """Whose memory a tensor is: by name, the parameters and the buffers that are saved with a model."""

    def __init__(self, model: nn.Module) -> None:
        saved = model.state_dict(keep_vars=True)
        self.names: dict[int, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self.shared: set[str] = set()  # whose memory is a part of another's
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

    def name(self, x: Tensor) -> str | None:
        return self.names.get(self._memory(x)) if x.layout == torch.strided else None

    def part(self, x: Tensor) -> tuple[str, list[tuple[int, int]]] | None:
        """Of a matrix, or one repeated: whose it is, and per dim the owner's dim and the first line of it."""
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
    return [dim for dim, size in enumerate(ids.shape) if size > 1]


def aligned(sizes: Sequence[int], dims: int) -> tuple[int, ...]:
    """`sizes` with ones in front, as they broadcast."""
    return (*[1] * (dims - len(sizes)), *sizes)
