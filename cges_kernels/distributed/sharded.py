"""The plan of parameters that are sharded over ranks: DTensors, as FSDP2 and tensor parallelism make them.

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

from ..backends.gathering import on_device
from ..backends.plan import Plan, Spec
from ..backends.registry import make_plan
from ..backends.states import new_step
from ..core.checks import Inputs, check_distinct, checked_inputs, named_layouts
from ..core.groups import GroupedLayout, canonical_layout, has_groups, reduced_dims
from ..core.hyperparameters import Hyperparameters
from ..core.rules import STEP, Rule
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
    """One parameter, and the part of it that this rank holds."""

    name: str
    group: int
    param: Tensor
    local: Tensor  # shares the parameter's memory; its grad is set if an inner plan is to step it
    view: tuple[int, ...] | None  # the local shape that `reduced` refers to
    reduced: tuple[int, ...]
    mesh_dims: tuple[int, ...]  # the dims of the mesh that its groups cross
    place: tuple[Any, ...]  # the _place of `local`
    pack: Pack | None = None  # the pack in which its groups' sums travel
    axes: tuple[int, ...] = ()  # the pack's process groups that its groups cross
    copies: tuple[int, ...] = ()  # the pack's process groups over which it is replicated
    inputs: Inputs | None = None  # the local inputs of this step; None without a gradient

    @property
    def is_dtensor(self) -> bool:
        return isinstance(self.param, DTensor)

    def is_in_place(self, p: Tensor) -> bool:
        """Whether `p` is this parameter and its local part has not moved in memory."""
        return p is self.param and _place(local_part(p)) == self.place

    def crosses(self, h: Hyperparameters) -> bool:
        """Whether a step needs sums from other ranks.

        The answer is the same on all ranks, whatever gradients each of them has.
        """
        if not self.mesh_dims:
            return False
        a, b, _ = h.thresholds()
        return bool(a != 0 or b != 0) or h.freeze_zeros == "group"

    def collect(self, entry: Mapping[str, Any], rule: Rule, options: Mapping[str, Any]) -> None:
        """Take gradient and states from the parameter and its optimizer state, after checks."""
        self.inputs = None
        p = self.param
        if p.grad is None:
            return
        names = rule.states_with(options)
        found = [entry.get(key) for key in names]
        there = [x for x in found if x is not None]
        if (
            isinstance(p, DTensor)
            and not (there and rule.counts)
            and len(there) in (0, len(names))
            and all(is_companion(x, p, self.local) for x in (p.grad, *there))
        ):  # the usual case, which needs no further checks
            self.inputs = Inputs(p.grad._local_tensor, tuple(x._local_tensor for x in there))  # type: ignore[attr-defined]
            return
        grad, states, step = checked_inputs(self.name, p, entry, rule, options)
        grad = local_companion("gradient", self.name, p, grad)
        local = [local_companion(key, self.name, p, x) for key, x in zip(names, states)]
        self.inputs = Inputs(grad, tuple(local), step)

    def entry(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The state of the local part for an inner plan; `names` are the names of the rule's states."""
        if self.inputs is None or not self.inputs.states:
            return {}
        entry = {} if self.inputs.step is None else {STEP: self.inputs.step}
        return {**entry, **dict(zip(names, self.inputs.states))}

    def forget(self) -> None:
        """Drop the gradient and states of the step."""
        self.inputs = self.local.grad = None

    def like_param(self, local: Tensor) -> Tensor:
        """`local` as a DTensor placed like the parameter, if that is a DTensor."""
        if not isinstance(self.param, DTensor):
            return local
        return DTensor(local, self.param._spec, requires_grad=False)  # from_local would undo offloading


class ShardedPlan:
    """The plan of param groups that hold DTensors; plain tensors may be among them. See backends/plan.py.

    Every rank must call run as often as the others, with the same parameters and hyperparameters. Then every
    rank enters every collective, whatever gradients it has or lacks.

    For all meshes that are slices of one, a step takes one all_reduce per mesh dim that groups cross, or over
    which such a tensor is replicated; that keeps replicas equal to the bit. Exact mode takes one per round,
    at most crossing.MAX_ROUNDS = 16, where the unsharded solver may take shrinkage.MAX_SWEEPS. A second
    all_reduce over a dim is needed where some groups cross it and another tensor, whose groups cross a dim
    that comes later, is replicated over it. None is needed where no group crosses shards, or no norm is asked
    for. Other meshes take theirs one after the other, also where they share a process group; see
    meshes.Packs.

    Args:
        rule: the optimizer's update rule.
        params: the parameters of each param group; [] where another plan serves it.
        specs: (group_by, view) of each parameter.
        names: the name of each parameter, for errors.
        executors: for each param group, the executor that steps its parameters where no groups cross.

    Raises:
        ValueError: a placement, mesh or view that cannot be served.
    """

    @torch.no_grad()
    def __init__(
        self,
        rule: Rule,
        params: Sequence[list[Tensor]],
        specs: Sequence[Sequence[Spec]],
        names: Sequence[Sequence[str]],
        executors: Sequence[str],
    ) -> None:
        self._executors = list(executors)
        self._rule = rule
        self._hyperparameters = [Hyperparameters.make(rule) for _ in params]
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
        self._plans: dict[str, Plan] = {}  # {executor: the inner plan}
        for executor in sorted({e for e, group in zip(executors, params) if group}):
            served = [rows if e == executor else [] for rows, e in zip(inner, executors)]
            layouts = [[layout for layout, _ in rows] for rows in served]
            local_specs = [[spec for _, spec in rows] for rows in served]
            self._plans[executor] = make_plan(executor, rule, self._locals(executor), layouts, local_specs)

    def set_hyperparameters(self, group: int, hyperparameters: Hyperparameters) -> None:
        """Take a param group's hyperparameters, which are all numbers, no addresses.

        skip_dead has no effect: writing to a DTensor does not move the version of the local tensor that is
        stepped.
        """
        hyperparameters = hyperparameters._replace(skip_dead=False)
        self._hyperparameters[group] = hyperparameters
        if self._groups[group]:
            self._plans[self._executors[group]].set_hyperparameters(group, hyperparameters)

    @torch.no_grad()
    def gather(self, params: Sequence[list[Tensor]], state: dict[Tensor, Any]) -> bool:
        """Check and collect all inputs of a step, without a collective; False if a plan must be rebuilt.

        Raises:
            TypeError: a gradient or state of the wrong type.
            RuntimeError: a gradient or state that does not match its parameter.
        """
        self._gathered = None
        if [len(group) for group in params] != [len(group) for group in self._groups]:
            return False
        if not all(slot.is_in_place(p) for slot, p in zip(self._slots, chain(*params))):
            return False
        self._entries = {}
        for slot in self._slots:
            h = self._hyperparameters[slot.group]
            slot.collect(state.get(slot.param, {}), self._rule, h.chosen)
            slot.local.grad = None if slot.inputs is None or slot.crosses(h) else slot.inputs.grad
            self._entries[slot.local] = slot.entry(self._names(slot))
        if not all(plan.gather(self._locals(e), self._entries) for e, plan in self._plans.items()):
            return False
        self._gathered = state
        return True

    @torch.no_grad()
    def run(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> Tensor | None:
        """Run the gathered step; gradients are divided by `grad_scale` (0-d).

        If `found_inf` (0-d) is not 0 nothing changes, state included. It should be the same on all ranks, as
        torch.amp.GradScaler makes it for DTensors. If groups cross shards, an overflow on one rank counts for
        every rank, and the host reads it. Meshes that are no slices of one agree in turn, so the last may
        know of an overflow of which the first did not.

        Returns:
            `found_inf` as agreed on, for plans that step other parameters of the same optimizer.
        """
        if self._gathered is None:
            raise RuntimeError("ShardedPlan.run: expected a gather that succeeded before it, got none")
        state, self._gathered = self._gathered, None
        packs: dict[Pack, list[tuple[_Slot, CrossingTensor]]] = {pack: [] for pack in self._packs.all}
        for slot in self._slots:
            h = self._hyperparameters[slot.group]
            if slot.pack is not None and slot.crosses(h):
                part = slot.local, slot.view, slot.reduced, slot.axes, slot.copies
                grad, states, step = slot.inputs or (None, (), None)
                if grad is not None and self._rule.counts:
                    step = new_step(slot.local, h.chosen) if step is None else step
                    slot.inputs = Inputs(grad, states, step)
                count = None if step is None else step + 1 if on_device(step) else step.item() + 1
                crossing = CrossingTensor(*part, h, grad, states, count, grad_scale)
                packs[slot.pack].append((slot, crossing))
        packs = {pack: members for pack, members in packs.items() if members}
        for pack, members in packs.items():
            agreed = agree_on_groups(pack, [crossing for _, crossing in members], found_inf)
            found_inf = None if found_inf is None else agreed.to(found_inf)
        if not (packs and found_inf is not None and found_inf.item() != 0):
            for plan in self._plans.values():
                plan.run(grad_scale=grad_scale, found_inf=None if packs else found_inf)
            for slot, crossing in chain(*packs.values()):
                self._write(slot, crossing)
            self._keep_states(state)
        for slot in self._slots:
            slot.forget()
        self._entries = {}
        return found_inf

    def _write(self, slot: _Slot, crossing: CrossingTensor) -> None:
        """Write a tensor whose groups cross, and put its states where an inner plan would put them."""
        states = crossing.write()
        if slot.inputs is None or not states:
            return
        entry = self._entries[slot.local]
        if slot.inputs.step is not None:
            entry[STEP] = slot.inputs.step.add_(1)
        entry.update(zip(self._names(slot), states))

    def _keep_states(self, state: dict[Tensor, Any]) -> None:
        """Put new states into the optimizer's, and tell autograd which DTensors changed."""
        changed = []
        for slot in self._slots:
            if slot.inputs is None:
                continue
            kept = slot.entry(self._names(slot))
            for key, x in self._entries[slot.local].items():
                if x is not None and x is not kept.get(key):
                    new = x if key == STEP else slot.like_param(x)
                    state.setdefault(slot.param, {})[key] = new
            if slot.is_dtensor:
                changed.append(slot.param)
                changed += [
                    x for key, x in state.get(slot.param, {}).items() if key in self._entries[slot.local]
                ]
        increment_version(changed)

    def _names(self, slot: _Slot) -> tuple[str, ...]:
        """The names of the states that the rule keeps of this parameter."""
        return self._rule.states_with(self._hyperparameters[slot.group].chosen)

    def _locals(self, executor: str) -> list[list[Tensor]]:
        """The local parts that `executor` serves, by param group."""
        return [
            [slot.local for slot in group] if e == executor else []
            for group, e in zip(self._groups, self._executors)
        ]


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.dtype, x.device, x.shape, x.stride()


def _slot(name: str, group: int, p: Tensor, spec: Spec) -> tuple[_Slot, GroupedLayout, Spec]:
    """A parameter's slot, and the layout and spec with which an inner plan sees its local part.

    Errors that are the same on all ranks come first.
    """
    group_by, view = spec
    layout = named_layouts([name], [p], group_by, view)[0]
    local = local_part(p).detach()
    if not isinstance(p, DTensor):
        return _Slot(name, group, p, local, None, (), (), _place(local)), layout, spec
    if has_other_gradient(p):
        local.grad_dtype = None  # allows a gradient of any dtype
    became = {d: d for d in sharded_dims(name, p)}
    if view is not None:
        view, became = local_view(name, p, local, view)
    ndim = p.dim() if view is None else len(view)
    reduced = reduced_dims(ndim, group_by) if has_groups(ndim, group_by) else ()
    crossed = crossed_mesh_dims(p, became, reduced)
    slot = _Slot(name, group, p, local, view, reduced, crossed, _place(local))
    if slot.mesh_dims:  # without groups, because an inner plan steps it only if the step needs no norm
        return slot, GroupedLayout(*canonical_layout(local, ()), False), ((), None)
    return slot, named_layouts([name], [local], group_by, view)[0], (group_by, view)
