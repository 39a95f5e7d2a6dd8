"""Breaks of cges_kernels/distributed, which steps parameters that are sharded over ranks."""

from .mutant import Mutant

CROSSING = "cges_kernels/distributed/crossing.py"
SHARDED = "cges_kernels/distributed/sharded.py"

MUTANTS = (
    Mutant(
        "norms of ranks are added without their squares",
        CROSSING,
        old="rows = [l1, l2.square()] if alive is None else [l1, l2.square(), alive]",
        new="rows = [l1, l2] if alive is None else [l1, l2, alive]",
        seen_by=("test_sharded",),
    ),
    Mutant(
        "an overflow on one rank is not told",
        CROSSING,
        old="flags = torch.zeros(1) if found_inf is None else found_inf.ne(0).reshape(1)",
        new="flags = torch.zeros(1)",
        seen_by=("test_sharded",),
    ),
    Mutant(
        "replicas count as often as they are",
        CROSSING,
        old="if dist.get_rank(group) != 0:",
        new="if dist.get_rank(group) < 0:",
        seen_by=("test_sharded",),
    ),
    Mutant(
        "zeros of shards keep their sign",
        CROSSING,
        old="self.local.copy_((w + 0.0 if any(self._thresholds) else w).reshape(self.local.shape))",
        new="self.local.copy_(w.reshape(self.local.shape))",
        seen_by=("test_sharded",),
    ),
    Mutant(
        "what crosses shards is stepped within them as well",
        SHARDED,
        old="slot.local.grad = None if slot.inputs is None or slot.crosses(h) else slot.inputs.grad",
        new="slot.local.grad = None if slot.inputs is None else slot.inputs.grad",
        seen_by=("test_sharded",),
    ),
    Mutant(
        "sharded parameters keep their version",
        SHARDED,
        old="        increment_version(changed)\n",
        new="",
        seen_by=("test_sharded",),
    ),
    Mutant(
        "dims of a view are taken for those of the parameter",
        "cges_kernels/distributed/placements.py",
        old="and became.get(placement.dim, -1) in reduced",
        new="and placement.dim in reduced",
        seen_by=("test_sharded",),
    ),
)
