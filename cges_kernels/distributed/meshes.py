"""Which process groups the tensors of a model's meshes can share for their sums, and in which order."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh


class Digit(NamedTuple):
    """How the process groups of a mesh dim part a list of ranks: `size` of them each, `stride` apart."""

    stride: int
    size: int

    def fits(self, other: Digit) -> bool:
        """Whether both are the same, or digits apart in the ranks' positions."""
        low, high = sorted((self, other))
        return low == high or high.stride % (low.stride * low.size) == 0


class Pack:
    """Process groups over which tensors may travel together, in an order that is the same on all ranks.

    No rank can tell from its own process groups which ones others share: two of its mesh dims may be one
    group here and two elsewhere. So mesh dims are compared by how they part their root mesh's ranks, which is
    the same on all of these. A pack's are digits of a rank's position there, so that what passes over each
    group once, in any order, has reached every rank that some chain of these groups leads to.
    """

    def __init__(self, ranks: Hashable, device_type: str) -> None:
        self.ranks, self.device_type = ranks, device_type
        self.groups: list[ProcessGroup] = []
        self._digits: list[Digit] = []

    def takes(self, ranks: Hashable, digits: Sequence[Digit]) -> bool:
        return ranks == self.ranks and all(new.fits(digit) for new in digits for digit in self._digits)

    def axis(self, digit: Digit, mesh: DeviceMesh, m: int) -> int:
        """Which of `groups` dim `m` of the mesh is; it joins them where it is none yet."""
        if digit not in self._digits:
            self._digits.append(digit)
            self.groups.append(mesh.get_group(m))
        return self._digits.index(digit)


class Packs:
    """All packs of a model: one where its meshes are slices of one, as FSDP's with tensor parallelism are.

    Tensors whose dims do not fit together have packs, and thus collectives, of their own, also where they
    share some process group: on meshes of other ranks or in another order, on dims that overlap without
    being the same (one of them flattened, say), and on flattened dims that are no neighbours.
    """

    def __init__(self) -> None:
        self.all: list[Pack] = []  # in the order in which collectives are entered
        self._digits: dict[DeviceMesh, tuple[Hashable, list[Digit]]] = {}

    def join(
        self, mesh: DeviceMesh, crossed: Sequence[int], copied: Sequence[int]
    ) -> tuple[Pack, tuple[int, ...], tuple[int, ...]]:
        """A pack for a tensor that is summed over some dims of its mesh and replicated over others.

        Every rank of the mesh must call it for the same tensors in the same order. Returns the pack and what
        these dims are in it; summed ones come first, because copies of the sums are to be taken after them.
        """
        if mesh not in self._digits:
            self._digits[mesh] = digits_of(mesh)
        ranks, every = self._digits[mesh]
        digits = [every[m] for m in (*crossed, *copied)]
        pack = next((pack for pack in self.all if pack.takes(ranks, digits)), None)
        if pack is None:
            pack = Pack(ranks, mesh.device_type)
            self.all.append(pack)
        axes, copies = (tuple(pack.axis(every[m], mesh, m) for m in dims) for dims in (crossed, copied))
        return pack, axes, copies


def digits_of(mesh: DeviceMesh) -> tuple[Hashable, list[Digit]]:
    """The ranks that a mesh's dims part, comparable between meshes, and how each dim parts them."""
    root = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh
    ranks = root.mesh.flatten().tolist()
    position = {rank: i for i, rank in enumerate(ranks)}
    digits, here = [], mesh.get_coordinate()
    assert here is not None  # placements.sharded_dims has refused a mesh that this rank is not in
    for m in range(mesh.ndim):
        along = mesh.mesh[tuple(slice(None) if d == m else i for d, i in enumerate(here))].tolist()
        steps = {position[b] - position[a] for a, b in pairwise(along)} or {1}
        if len(steps) > 1 or min(steps) <= 0:  # no digit of the position there, but always one in the mesh
            return mesh, [Digit(prod(mesh.shape[d + 1 :]), mesh.size(d)) for d in range(mesh.ndim)]
        digits.append(Digit(steps.pop(), len(along)))
    return (mesh.device_type, *ranks), digits
