"""The step of tensors whose groups lie on several ranks, which exchange nothing but the groups' sums.

A step goes from local sums over a packed all_reduce to (s, t) per group, the same on all ranks that share the
group, and then to the local weights. The formulas are the reference's. ShardedPlan (sharded.py) makes a
CrossingTensor per tensor and step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.states import new_like
from ..core import reference, shrinkage
from ..core.hyperparameters import Hyperparameters
from ..core.rules import STEP
from ..core.shrinkage import GroupStats, Search, compute_dtype
from .meshes import Pack

MAX_ROUNDS = 16  # the most rounds of sums and all_reduces in exact mode; the hardest groups seen took 13


class CrossingTensor:
    """One step of this rank's part of a tensor, some of whose groups continue on other ranks.

    The calls are `sums` and `receive`, in as many rounds as agree_on_groups takes, and then `write`. z is
    computed anew in each round, because keeping it would cost as much memory as the weights, or twice as much
    for 16-bit weights. Only numbers per group are kept, shaped like the local view with the reduced dims of
    size 1.

    Args:
        local: this rank's part of the weights, of any size, 0 too.
        view: the local shape that `reduced` refers to, or None.
        reduced: the dims that groups run over.
        axes: the pack's process groups that the tensor's groups cross.
        copies: the pack's process groups over which the tensor is replicated.
        hyperparameters: those of its param group, all numbers.
        grad: the local gradient. If it is None this part stays as it is, and counts in its groups' norms.
        states: the rule's local states, () before the first step.
        count: the number of the tensor's steps, this one included, if the rule counts.
        grad_scale: the number that gradients are divided by (0-d), or None.
    """

    def __init__(
        self,
        local: Tensor,
        view: Sequence[int] | None,
        reduced: tuple[int, ...],
        axes: tuple[int, ...],
        copies: tuple[int, ...],
        hyperparameters: Hyperparameters,
        grad: Tensor | None,
        states: Sequence[Tensor],
        count: float | Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> None:
        self.local, self.axes, self.copies, self.dtype = local, axes, copies, compute_dtype(local.dtype)
        self._view, self._reduced = view, reduced
        shape = local.shape if view is None else view
        self._shape = [1 if d in reduced else n for d, n in enumerate(shape)]  # shape of group sums
        self._grad, self._states, self._grad_scale = grad, tuple(states), grad_scale
        rule, counted = hyperparameters.rule, {} if count is None else {STEP: count}
        told = rule.told(hyperparameters.chosen)
        self._rule_update = partial(rule.update, lr=hyperparameters.lr, **told, **counted)
        self._thresholds = hyperparameters.thresholds()
        self._freeze = hyperparameters.freeze_zeros
        self.searches = bool(hyperparameters.exact and self._thresholds.b != 0)  # takes several rounds
        self._search: Search | None = None
        self._dead: Tensor | None = None
        self._s = self._t = torch.empty(0)

    @property
    def unfinished(self) -> Tensor:
        """Whether some group here needs another round: a bool tensor without dims."""
        assert self._search is not None  # the first round has begun it
        return ~self._search.done.all()

    @property
    def _num_rows(self) -> int:
        """The number of sums per group in this round: two norms, the count, whether any weight is nonzero."""
        return 2 + self.searches + (self._search is None and self._freeze == "group")

    def no_sums(self) -> Tensor:
        """Zeros that travel in place of `sums` from a rank whose groups are all finished."""
        return torch.zeros(self._num_rows * prod(self._shape), dtype=self.dtype, device=self.local.device)

    def sums(self) -> Tensor:
        """This rank's part of every group's sums in this round, as a flat tensor."""
        z, *_ = self._update()
        t = self._thresholds.c if self._search is None else self._search.t
        alive, l1, l2 = shrinkage.group_stats(z, t, self._reduced, with_count=self.searches)
        rows = [l1, l2.square()] if alive is None else [l1, l2.square(), alive]
        if len(rows) < self._num_rows:
            rows.append((self._viewed(self.local) != 0).sum(self._reduced, keepdim=True).to(self.dtype))
        return torch.stack(rows).flatten()

    def receive(self, totals: Tensor) -> None:
        """Take the sums over all ranks, in the order of `sums`."""
        rows = list(totals.to(self.local.device, self.dtype).view(self._num_rows, *self._shape))
        if self._search is None and self._freeze == "group":
            self._dead = rows.pop() == 0
            rows = [torch.where(self._dead, 0.0, row) for row in rows]  # z is 0 where a group is frozen
        stats = GroupStats(rows[2] if self.searches else None, rows[0], rows[1].sqrt())
        if not self.searches:
            self._s, self._t = shrinkage.sequential_shrinkage(stats, self._thresholds)
            return
        search = self._search or shrinkage.start_search(stats, self._thresholds)
        self._search = shrinkage.sweep(search, stats, self._thresholds)
        self._s, self._t = self._search.s, self._search.t

    def write(self) -> tuple[Tensor, ...]:
        """Write the local weights and states; returns the states, which the first step makes."""
        if self._grad is None:
            return ()
        z, *states = self._update()
        w = shrinkage.apply_shrinkage(z, self._s, self._t) if any(self._thresholds) else z
        w = w.to(self.local.dtype)
        self.local.copy_((w + 0.0 if any(self._thresholds) else w).reshape(self.local.shape))
        new = [x for x in states if x is not None]
        kept = self._states or tuple(new_like(self.local) for _ in new)
        return tuple(to.copy_(x.reshape(self.local.shape)) for to, x in zip(kept, new))

    def _viewed(self, x: Tensor) -> Tensor:
        return x if self._view is None else x.reshape(self._view)

    def _update(self) -> tuple[Any, ...]:
        """z and the new states, in the compute dtype and the shape of the view."""
        w = self._viewed(self.local).to(self.dtype)
        if self._grad is None:
            return (w,)
        grad, *states = (self._viewed(x).to(self.dtype) for x in (self._grad, *self._states))
        if self._grad_scale is not None:
            grad = grad / self._grad_scale.to(grad.device)
        frozen = w == 0 if self._freeze == "element" else self._dead
        return reference.frozen_update(frozen, *self._rule_update(w, grad, *states))


def agree_on_groups(pack: Pack, tensors: Sequence[CrossingTensor], found_inf: Tensor | None = None) -> Tensor:
    """Let all ranks of a pack agree on all sums of its tensors; nothing is written.

    Every rank of the pack must call it with the same tensors in the same order. It takes one all_reduce per
    process group (a second if one tensor is replicated and another summed over it; see _all_reduce). If some
    tensor is in exact mode it takes one in each of at most MAX_ROUNDS rounds: as many as the slowest group
    takes, and one to learn that it was the last. Flags that are reduced with the sums end the rounds. They
    pass over every process group that is used, so that no two ranks that could wait for each other hold
    different flags.

    Returns:
        `found_inf` (0-d) as the ranks have agreed on it.
    """
    axes = tuple(sorted(set(chain(*(x.axes + x.copies for x in tensors)))))
    flags = torch.zeros(1) if found_inf is None else found_inf.ne(0).reshape(1)
    *totals, flags = _all_reduce(pack, axes, tensors, [x.sums() for x in tensors], flags)
    agreed = flags.reshape(())
    for x, total in zip(tensors, totals):
        x.receive(total)
    searching = [x for x in tensors if x.searches]
    for _ in range(MAX_ROUNDS - 1):
        if not searching:
            break
        flags = torch.stack([x.unfinished for x in searching])
        parts = [x.sums() if unfinished else x.no_sums() for x, unfinished in zip(searching, flags.tolist())]
        *totals, flags = _all_reduce(pack, axes, searching, parts, flags)
        unfinished = [(x, total) for x, total, flag in zip(searching, totals, flags.tolist()) if flag]
        for x, total in unfinished:
            x.receive(total)
        searching = [x for x, _ in unfinished]
    return agreed


def _all_reduce(
    pack: Pack,
    axes: tuple[int, ...],
    tensors: Sequence[CrossingTensor],
    parts: Sequence[Tensor],
    flags: Tensor,
) -> list[Tensor]:
    """Each tensor's part summed over the axes that it crosses, and the flags summed over all `axes`.

    Replicas would sum to equal numbers, but perhaps in another order, so that they would differ in the last
    bits. Therefore all replicas take the sums of the first one: in an all_reduce over them, the others add
    zeros. It must come after all axes that the tensor is summed over. An axis that comes too early for that
    is taken in a second turn over the axes.
    """
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    home = tensors[0].local.device
    pieces = [x.to(home, dtype) for x in (*parts, flags)]
    summed = [x.axes for x in tensors] + [axes]
    for late in (False, True):
        for axis in axes:
            group = pack.groups[axis]
            copied = [i for i, x in enumerate(tensors) if axis in x.copies and late == (axis < max(x.axes))]
            travelling = [i for i, on in enumerate(summed) if axis in on and not late] + copied
            if not travelling:
                continue
            if dist.get_rank(group) != 0:
                for i in copied:
                    pieces[i] = torch.zeros_like(pieces[i])
            packed = torch.cat([pieces[i] for i in travelling])
            if home.type != pack.device_type:  # weights that are offloaded to the CPU between steps
                packed = packed.to(pack.device_type)
            dist.all_reduce(packed, group=group)
            split = packed.to(home).split([pieces[i].numel() for i in travelling])
            for i, piece in zip(travelling, split):
                pieces[i] = piece
    return pieces
