"""Which channels of a network can only leave it together, and what holds them.

A channel is a number. Following a forward pass (following.py) hands out numbers for what layers make, joins
those that an operation brings together, and holds those that must stay. cutting.py reads the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

NOBODY = 0  # the channel of what cannot be cut, such as the model's input
ANYBODY = -1  # the channel of values that are all alike, and could be made in any size


@dataclass
class Weight:
    """A matrix or kernel that an operation multiplies with, and the channels of its first two dims."""

    name: str  # the parameter's
    ids: dict[int, Tensor] = field(default_factory=dict)  # by dim, the channel of each line
    makes: set[int] = field(default_factory=set)  # dims whose lines make one channel each
    reads: set[int] = field(default_factory=set)  # dims whose lines read one channel each
    uses: int = 0  # how often operations took it in one pass, of the mode with more uses

    @property
    def layer(self) -> str:
        """The name of the module that holds the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def label(self) -> str:
        """What the weight is called beside its layer's name, with a colon; "" for "weight"."""
        own = self.name.rpartition(".")[2]
        return "" if own == "weight" else f"{own}: "


@dataclass
class Held:
    """Channels that stay, and why."""

    ids: Tensor
    reason: str
    read: bool  # whether their values are read, not only their number


@dataclass
class Placed:
    """Channels that a module lays out by numbers, and how."""

    module: str
    text: str
    ids: Tensor
    chooses: bool  # whether some of them are chosen, rather than all given another shape


class Channels:
    """The channels of one network."""

    def __init__(self) -> None:
        self.count = 1
        # By parameter, in the order in which the forward pass reads them.
        self.weights: dict[str, Weight] = {}
        # Parameters and buffers that no operation multiplies with: a channel per element, in memory order.
        self.loose: dict[str, Tensor] = {}
        self.widths: dict[str, Tensor] = {}  # by norm without parameters, the channels of its input
        # Channels that modules lay out by numbers, which their code may compute or have written into it.
        self.by_numbers: list[Placed] = []
        self.called: set[str] = set()  # layers whose weight is used only when they are called themselves
        self.held: list[Held] = []
        self._starts: list[int] = []  # the first channel of each memory of loose ones
        self._ends: list[int] = []  # and the channel after its last
        self._pairs: list[Tensor] = [torch.zeros(2, 0, dtype=torch.long)]

    def new(self, count: int) -> Tensor:
        """So many new channels. A single one is NOBODY's, because at least one is always left."""
        if count == 1:
            return torch.tensor([NOBODY])
        self.count += count
        return torch.arange(self.count - count, self.count)

    def new_loose(self, count: int) -> Tensor:
        """Channels of the single elements of some memory.

        Which of them leave together, and so along which dim they are cut, follows from what they are joined
        with.
        """
        self._starts.append(self.count)
        ids = self.new(count)
        self._ends.append(self.count)
        return ids

    def _memories(self, ids: Tensor) -> Tensor:
        """For each channel, the memory that it is an element of, in the order of new_loose; -1 if of none."""
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
        """Keep these channels; `read` says whether their values are read, or only their number matters."""
        ids = ids[ids > NOBODY].unique()
        if len(ids):
            self.held.append(Held(ids, reason, read))

    def join(self, a: Tensor, b: Tensor, reason: str = "they meet what cannot be cut") -> None:
        """`a` and `b` (which broadcast) meet element by element; channels that meet NOBODY's are held."""
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
        """For each channel the first of those that it can only leave with, as joined: [count]."""
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
    """Whose memory a tensor is, by the name of a parameter or of a buffer that is saved with the model."""

    def __init__(self, model: nn.Module) -> None:
        saved = model.state_dict(keep_vars=True)
        self.names: dict[int, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self.shared: set[str] = set()  # names whose memory another tensor of the model uses as well
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
        """The name of the parameter or buffer whose memory `x` uses; None if there is none."""
        return self.names.get(self._memory(x)) if x.layout == torch.strided else None

    def part(self, x: Tensor) -> tuple[str, list[tuple[int, int]]] | None:
        """Where a matrix, or one that is repeated, lies in the parameter that owns it.

        Returns:
            The owner's name, and for each dim the owner's dim and the first line of it; None if it is no such
                part.
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
    """`sizes` with ones in front, as they broadcast."""
    return (*[1] * (dims - len(sizes)), *sizes)
