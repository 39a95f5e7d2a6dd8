"""The step of parameters that are sharded over ranks: DTensors, as FSDP2 and tensor parallelism make them.

Tensors whose groups lie whole on one rank take an ordinary executor on their local part. Where groups cross
shards their sums are agreed on first (crossing.py); neither weights nor gradients ever travel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor

from ..backends.plan import Plan, Spec
from ..backends.registry import make_plan
from ..core.checks import check_distinct, checked_inputs, named_layouts
from ..core.groups import GroupedLayout, canonical_layout, has_groups, reduced_dims
from ..core.hyperparameters import SGD_STATE, Hyperparameters
from ..core.tensors import has_other_gradient
from .crossing import CrossingTensor, agree_on_groups
from .meshes import Pack, Packs
from .placements import (
    copied_mesh_dims,
    crossed_mesh_dims,
    is_companion,
    local_companion,
    local_part,
    local_view,
    sharded_dims,
)


@dataclass
class _Slot:
    """One parameter, and what of it this rank holds."""

    name: str
    group: int
    param: Tensor
    local: Tensor  # shares the parameter's memory; its grad is what the inner plan is to step
    view: tuple[int, ...] | None  # of local
    reduced: tuple[int, ...]
    mesh_dims: tuple[int, ...]  # that its groups cross
    place: tuple[Any, ...]  # of local
    pack: Pack | None = None  # what its groups' sums travel with; and there:
    axes: tuple[int, ...] = ()  # the process groups that its groups cross
    copies: tuple[int, ...] = ()  # and those over which it is replicated
    grad: Tensor | None = None  # these two are local, and held during a step only
    buf: Tensor | None = None

    @property
    def is_dtensor(self) -> bool:
        return isinstance(self.param, DTensor)

    def is_in_place(self, p: Tensor) -> bool:
        return p is self.param and _place(local_part(p)) == self.place

    def crosses(self, h: Hyperparameters) -> bool:
        """Whether a step asks other ranks; by what all ranks hold alike, whatever is the matter with one."""
        if not self.mesh_dims:
            return False
        a, b, _ = h.thresholds()
        return bool(a != 0 or b != 0) or h.freeze_zeros == "group"

    def collect(self, entry: Mapping[str, Any], keeps_state: bool) -> None:
        """Take gradient and momentum buffer, after checks."""
        self.grad = self.buf = None
        p, grad = self.param, self.param.grad
        if grad is None:
            return
        buf = entry.get(SGD_STATE) if keeps_state else None
        if (
            isinstance(p, DTensor)
            and (buf is None or is_companion(buf, p, self.local))
            and is_companion(grad, p, self.local)
        ):
            self.grad, self.buf = grad._local_tensor, None if buf is None else buf._local_tensor
            return
        grad, buf = checked_inputs(self.name, p, entry, keeps_state)
        self.grad = local_companion("gradient", self.name, p, grad)
        self.buf = None if buf is None else local_companion(SGD_STATE, self.name, p, buf)

    def forget(self) -> None:
        self.grad = self.buf = self.local.grad = None

    def like_param(self, local: Tensor) -> Tensor:
        """``local`` as a tensor of the parameter's kind."""
        if not isinstance(self.param, DTensor):
            return local
        return DTensor(local, self.param._spec, requires_grad=False)  # from_local moves what is offloaded


class ShardedPlan:
    """Param groups that hold DTensors, plain tensors among them too; the interface is backends.plan's.

    Every rank must call run as often as the others, with the same parameters and hyperparameters. Then every
    rank enters every collective, whatever its gradients hold or lack. For all meshes that are slices of one,
    a step takes one all_reduce per mesh dim that groups cross, or over which such a tensor is replicated: so
    do replicas stay equal to the bit. (Exact mode: one per round, at most crossing.MAX_ROUNDS = 16, where the
    unsharded solver may take reference.MAX_SWEEPS.) It takes a second one over a dim that some groups cross
    and over which another tensor is replicated whose groups cross a dim that comes later; none where no group
    crosses shards, or no norm is asked for. Other meshes take theirs one after the other, also where they
    share a process group; see meshes.Packs.

    Args:
        params: the parameters of each param group; [] where another plan serves it.
        specs: (group_by, view) of each parameter.
        names: of each parameter, for errors.
        executors: of each param group, what steps its parameters where no groups cross.

    Raises:
        ValueError: a placement, mesh or view that cannot be served.
    """

    @torch.no_grad()
    def __init__(
        self,
        params: Sequence[list[Tensor]],
        specs: Sequence[Sequence[Spec]],
        names: Sequence[Sequence[str]],
        executors: Sequence[str],
    ) -> None:
        self._executors = list(executors)
        self._hyperparameters = [Hyperparameters() for _ in params]
        self._gathered: dict[Tensor, Any] | None = None
        self._entries: dict[Tensor, dict[str, Any]] = {}  # the optimizer's state, as inner plans see it
        self._groups: list[list[_Slot]] = []
        inner: list[list[tuple[GroupedLayout, Spec]]] = []
        for g, group in enumerate(params):
            made = [_slot(name, g, p, spec) for name, p, spec in zip(names[g], group, specs[g])]
            self._groups.append([slot for slot, *_ in made])
            inner.append([(layout, spec) for _, layout, spec in made])
        self._slots = list(chain(*self._groups))
        self._packs = Packs()
        for slot in self._slots:
            if isinstance(slot.param, DTensor) and slot.mesh_dims:
                mesh, copied = slot.param.device_mesh, copied_mesh_dims(slot.param)
                slot.pack, slot.axes, slot.copies = self._packs.join(mesh, slot.mesh_dims, copied)
        check_distinct([slot.name for slot in self._slots], [slot.local for slot in self._slots])
        self._plans: dict[str, Plan] = {}  # by executor
        for executor in sorted({e for e, group in zip(executors, params) if group}):
            served = [rows if e == executor else [] for rows, e in zip(inner, executors)]
            layouts = [[layout for layout, _ in rows] for rows in served]
            local_specs = [[spec for _, spec in rows] for rows in served]
            self._plans[executor] = make_plan(executor, self._locals(executor), layouts, local_specs)

    def set_hyperparameters(self, group: int, hyperparameters: Hyperparameters) -> None:
        """A param group's; all numbers, no addresses."""
        self._hyperparameters[group] = hyperparameters
        if self._groups[group]:
            self._plans[self._executors[group]].set_hyperparameters(group, hyperparameters)

    @torch.no_grad()
    def gather(self, params: Sequence[list[Tensor]], state: dict[Tensor, Any]) -> bool:
        """Check and collect what a step reads, without a collective; False where the plan must be rebuilt.

        Raises:
            TypeError, RuntimeError: a gradient or momentum buffer that does not match its parameter.
        """
        self._gathered = None
        if [len(group) for group in params] != [len(group) for group in self._groups]:
            return False
        if not all(slot.is_in_place(p) for slot, p in zip(self._slots, chain(*params))):
            return False
        self._entries = {}
        for slot in self._slots:
            h = self._hyperparameters[slot.group]
            slot.collect(state.get(slot.param, {}), h.keeps_state)
            slot.local.grad = None if slot.crosses(h) else slot.grad
            self._entries[slot.local] = {} if slot.buf is None else {SGD_STATE: slot.buf}
        if not all(plan.gather(self._locals(e), self._entries) for e, plan in self._plans.items()):
            return False
        self._gathered = state
        return True

    @torch.no_grad()
    def run(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> Tensor | None:
        """Step what was gathered; gradients are divided by ``grad_scale`` (0-d).

        Where ``found_inf`` (0-d) is not 0 nothing changes, state included. It should be the same on all
        ranks, as torch.amp.GradScaler makes it for DTensors; where groups cross, one rank's is every rank's,
        and the host reads it; meshes that are no slices of one agree in turn, so that the last may know
        more than the first. Returns what ``found_inf`` was agreed to be (None where it is), for plans that
        step other parameters of the same optimizer.
        """
        if self._gathered is None:
            raise RuntimeError("ShardedPlan.run: expected a gather that succeeded before it, got none")
        state, self._gathered = self._gathered, None
        packs: dict[Pack, list[tuple[_Slot, CrossingTensor]]] = {pack: [] for pack in self._packs.all}
        for slot in self._slots:
            h = self._hyperparameters[slot.group]
            if slot.pack is not None and slot.crosses(h):
                part = slot.local, slot.view, slot.reduced, slot.axes, slot.copies
                crossing = CrossingTensor(*part, h, slot.grad, slot.buf, grad_scale)
                packs[slot.pack].append((slot, crossing))
        packs = {pack: members for pack, members in packs.items() if members}
        for pack, members in packs.items():
            agreed = agree_on_groups(pack, [crossing for _, crossing in members], found_inf)
            found_inf = None if found_inf is None else agreed.to(found_inf)
        if not (packs and found_inf is not None and found_inf.item() != 0):
            for plan in self._plans.values():
                plan.run(grad_scale=grad_scale, found_inf=None if packs else found_inf)
            for slot, crossing in chain(*packs.values()):
                self._entries[slot.local][SGD_STATE] = crossing.write()
            self._keep_buffers(state)
        for slot in self._slots:
            slot.forget()
        self._entries = {}
        return found_inf

    def _keep_buffers(self, state: dict[Tensor, Any]) -> None:
        """Put new momentum buffers into the optimizer's state, and tell autograd what DTensors changed."""
        changed = []
        for slot in self._slots:
            if slot.grad is None:
                continue
            buf = self._entries[slot.local].get(SGD_STATE)
            if buf is not None and buf is not slot.buf:
                state.setdefault(slot.param, {})[SGD_STATE] = slot.like_param(buf)
            if slot.is_dtensor:
                changed.append(slot.param)
                if buf is not None:
                    changed.append(state[slot.param][SGD_STATE])
        increment_version(changed)

    def _locals(self, executor: str) -> list[list[Tensor]]:
        return [
            [slot.local for slot in group] if e == executor else []
            for group, e in zip(self._groups, self._executors)
        ]


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.dtype, x.device, x.shape, x.stride()


def _slot(name: str, group: int, p: Tensor, spec: Spec) -> tuple[_Slot, GroupedLayout, Spec]:
    """A parameter's slot, and how an inner plan is to see its local part.

    Errors that are the same on all ranks come first.
    """
    group_by, view = spec
    layout = named_layouts([name], [p], group_by, view)[0]
    local = local_part(p).detach()
    if not isinstance(p, DTensor):
        return _Slot(name, group, p, local, None, (), (), _place(local)), layout, spec
    if has_other_gradient(p):
        local.grad_dtype = None  # any
    became = {d: d for d in sharded_dims(name, p)}
    if view is not None:
        view, became = local_view(name, p, local, view)
    ndim = p.dim() if view is None else len(view)
    reduced = reduced_dims(ndim, group_by) if has_groups(ndim, group_by) else ()
    crossed = crossed_mesh_dims(p, became, reduced)
    slot = _Slot(name, group, p, local, view, reduced, crossed, _place(local))
    if slot.mesh_dims:  # as single elements: an inner plan steps it only where no norm is asked for
        return slot, GroupedLayout(*canonical_layout(local, ()), False), ((), None)
    return slot, named_layouts([name], [local], group_by, view)[0], (group_by, view)
