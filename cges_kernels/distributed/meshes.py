"""Finds the process groups that tensors of a model's meshes can share for their sums, and their order.

ShardedPlan (sharded.py) lets its tensors join packs; crossing.py makes one set of collectives per pack.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh


class Digit(NamedTuple):
    """How the process groups of a mesh dim divide a list of ranks: into `size` ranks each, `stride` apart."""

    stride: int
    size: int

    def fits(self, other: Digit) -> bool:
        """Whether the two are equal, or are different digits of a rank's position in the list."""
        low, high = sorted((self, other))
        return low == high or high.stride % (low.stride * low.size) == 0


class Pack:
    """Process groups over which tensors may travel together, in an order that is the same on all ranks.

    No rank can tell from its own process groups which ones others share: two of its mesh dims may be one
    group here and two elsewhere. So mesh dims are compared by how they divide the ranks of their root mesh,
    which is the same on all of these ranks. The mesh dims in a pack are digits of a rank's position there.
    Therefore a sum that is reduced over each group once, in any order, reaches every rank that is connected
    through a chain of these groups.
    """

    def __init__(self, ranks: Hashable, device_type: str) -> None:
        self.ranks, self.device_type = ranks, device_type
        self.groups: list[ProcessGroup] = []
        self._digits: list[Digit] = []

    def takes(self, ranks: Hashable, digits: Sequence[Digit]) -> bool:
        """Whether a tensor whose mesh dims divide `ranks` by these digits fits into the pack."""
        return ranks == self.ranks and all(new.fits(digit) for new in digits for digit in self._digits)

    def axis(self, digit: Digit, mesh: DeviceMesh, m: int) -> int:
        """The index in `groups` of the process group of mesh dim `m`, which is added where it is missing."""
        if digit not in self._digits:
            self._digits.append(digit)
            self.groups.append(mesh.get_group(m))
        return self._digits.index(digit)


class Packs:
    """All packs of a model: one if its meshes are slices of one, as FSDP's with tensor parallelism are.

    Tensors whose mesh dims do not fit together have packs, and thus collectives, of their own, also where
    they share some process group. This concerns meshes of other ranks or of ranks in another order, dims that
    overlap without being the same (one of them flattened, say), and flattened dims that are not neighbours.
    """

    def __init__(self) -> None:
        self.all: list[Pack] = []  # ranks enter the collectives of packs in this order
        self._digits: dict[DeviceMesh, tuple[Hashable, list[Digit]]] = {}

    def join(
        self, mesh: DeviceMesh, crossed: Sequence[int], copied: Sequence[int]
    ) -> tuple[Pack, tuple[int, ...], tuple[int, ...]]:
        """A pack for a tensor that is summed over some dims of its mesh and replicated over others.

        Every rank of the mesh must call it for the same tensors in the same order.

        Returns:
            The pack, and the indices in it of the process groups of `crossed` and of `copied`. Those of
                `crossed` are added first, because replicas take copies of the sums after these have been
                formed.
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
    """The ranks that a mesh's dims divide, comparable between meshes, and how each dim divides them."""
    root = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh
    ranks = root.mesh.flatten().tolist()
    position = {rank: i for i, rank in enumerate(ranks)}
    digits, here = [], mesh.get_coordinate()
    assert here is not None  # placements.sharded_dims has refused meshes that this rank is not in
    for m in range(mesh.ndim):
        along = mesh.mesh[tuple(slice(None) if d == m else i for d, i in enumerate(here))].tolist()
        steps = {position[b] - position[a] for a, b in pairwise(along)} or {1}
        if len(steps) > 1 or min(steps) <= 0:  # no digit in the root mesh: count positions in this mesh
            return mesh, [Digit(prod(mesh.shape[d + 1 :]), mesh.size(d)) for d in range(mesh.ndim)]
        digits.append(Digit(steps.pop(), len(along)))
    return (mesh.device_type, *ranks), digits
