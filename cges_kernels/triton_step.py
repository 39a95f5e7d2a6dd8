"""The host side of the Triton executor: cuts tensors into tiles, keeps the device's tables, launches.

How a tensor is cut depends on its layout, dtype and alignment alone, never on its neighbours or the device's
load, so its bits do not either. A step launches at most one kernel per device, dtype and path.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from . import step_plan
from .groups import Layout, LayoutTuple
from .ops import _C, is_capturing
from .reference import compute_dtype
from .triton_kernels import FREEZE_ELEMENT, FREEZE_GROUP, HYPER, MAX_SWEEPS, NUMBERS, whole_groups
from .triton_split import STATE, SUMS, split_groups
from .triton_tiles import TILES, VECTOR_BYTES, Cut, cut, launch_options, working_layout

L2_BYTES = 32 << 20  # where the device does not tell
FREEZES = {"": 0, "group": FREEZE_GROUP.value, "element": FREEZE_ELEMENT.value}
STORED = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class Batch:
    """The tensors of one device and dtype: their tables on the device, and the launches of a step."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        layouts: Sequence[Layout],
        grouped: Sequence[bool],
        rows: Sequence[int],
    ):
        self.device, self.dtype = tensors[0].device, tensors[0].dtype
        self.layouts = [working_layout(layout) for layout in layouts]
        shapes = [[x.R1, x.K2, x.R2, x.num_groups, row] for x, row in zip(self.layouts, rows)]
        self.shapes = torch.tensor(shapes, dtype=torch.int64, device=self.device)
        self.grouped = grouped
        self.one, self.zero = (
            torch.full((1,), x, dtype=torch.float32, device=self.device) for x in (1.0, 0.0)
        )
        self.addresses = np.zeros(0)  # the table as last uploaded
        self.aligned = np.zeros(0)
        self.captured = False  # a graph may have put its own addresses into the table since

    def launch(
        self,
        addresses: np.ndarray,
        hyper: Tensor,
        exact: bool,
        freeze: bool,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """One step. ``addresses`` [n, 4] as StepPlan gives them, the rest as the kernels take it."""
        self._take(addresses)
        compute = compute_dtype(self.dtype)
        constants = {
            "STORED": STORED[self.dtype],
            "COMPUTE": STORED[compute],
            "EPS": torch.finfo(compute).eps,
            "EXACT": exact,
            "FREEZE": freeze,
        }
        grad_scale = self.one if grad_scale is None else grad_scale.detach().to(self.one)
        found_inf = self.zero if found_inf is None else found_inf.detach().to(self.zero)
        nvidia = self.device.type == "cuda" and torch.version.hip is None
        with _on(self.device):
            if len(self.whole):
                whole_groups[(len(self.whole),)](
                    self.whole,
                    self.tensors,
                    self.shapes,
                    hyper,
                    grad_scale,
                    found_inf,
                    **constants,
                    **launch_options(self.whole_variants, self.dtype, exact, nvidia),
                )
            if self.windows:
                tickets = len(self.split) * (1 + (MAX_SWEEPS.value if exact else 1))
                split_groups[(tickets,)](
                    self.split,
                    self.tensors,
                    self.shapes,
                    hyper,
                    grad_scale,
                    found_inf,
                    self.scratch,
                    self.counters,
                    len(self.split) // self.windows,
                    tickets,
                    **constants,
                    **launch_options(self.split_variants, self.dtype, exact, nvidia),
                )

    def _take(self, addresses: np.ndarray) -> None:
        """Bring the table of addresses up to date; within a graph, at each replay."""
        capturing = is_capturing()
        if np.array_equal(addresses, self.addresses) and not (capturing or self.captured):
            return
        aligned = (addresses[:, :3] % VECTOR_BYTES == 0).all(axis=1)
        if not np.array_equal(aligned, self.aligned):
            if capturing:
                raise RuntimeError(
                    "backend='triton': expected tensors aligned as in the step before the capture of this one"
                )
            self._cut(aligned)
        self.addresses = addresses.copy()
        table = torch.from_numpy(self.addresses)
        if capturing:
            if self.captured:
                raise RuntimeError(
                    "backend='triton': expected one captured graph per optimizer, got a second"
                )
            table, self.captured = self.pinned.copy_(table), True
        self.tensors.copy_(table, non_blocking=capturing)

    def _cut(self, aligned: np.ndarray) -> None:
        """Cut every tensor and put the tables on the device."""
        self.aligned = aligned
        cuts = [
            cut(layout, grouped, self.dtype, bool(a))
            for layout, grouped, a in zip(self.layouts, self.grouped, aligned)
        ]
        self.tensors = torch.empty((len(cuts), 4), dtype=torch.int64, device=self.device)
        on_gpu = self.device.type == "cuda"  # what a graph copies from lives as long as the table
        self.pinned = torch.empty(self.tensors.shape, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        self.whole_variants = sorted({c.variant for c in cuts if c.whole})
        number = {v: i for i, v in enumerate(self.whole_variants)}
        rows = [
            np.column_stack(
                [np.full_like(c.panels, v) for v in (number[c.variant], i)] + [c.panels, 0 * c.panels]
            )
            for i, c in enumerate(cuts)
            if c.whole
        ]
        self.whole = self._upload(np.concatenate(rows) if rows else np.zeros((0, 4)))
        self._cut_split(cuts)

    def _cut_split(self, cuts: list[Cut]) -> None:
        """Items of long groups, in windows of whole panels of one length (padded with idle items)."""
        self.split_variants = sorted({c.variant for c in cuts if not c.whole})
        number = {v: i for i, v in enumerate(self.split_variants)}
        panels: list[np.ndarray] = []  # each one [chunks, 8]
        slots = 0
        for i, c in enumerate(cuts):
            if c.whole:
                continue
            first = np.arange(0, self.layouts[i].group_size, c.variant.red)
            for g0 in c.panels:
                items = np.zeros((len(first), 8), dtype=np.int64)
                items[:] = (number[c.variant], i, g0, 0, len(panels), 0, len(first), slots)
                items[:, 3], items[:, 5] = first, np.arange(len(first))
                panels.append(items)
                slots += (STATE.value + SUMS.value * len(first)) * c.variant.keep
        tile_bytes = 3 * self.dtype.itemsize * max((v.red * v.keep for v in self.split_variants), default=1)
        per_window = max([_l2_bytes(self.device) // 2 // tile_bytes, *map(len, panels)])
        windows: list[list[np.ndarray]] = []
        room = 0
        for panel in panels:
            if len(panel) > room:
                windows.append([])
                room = per_window
            windows[-1].append(panel)
            room -= len(panel)
        if len(windows) == 1:
            per_window -= room
        table = np.zeros((len(windows), per_window, 8), dtype=np.int64)
        table[:, :, 0] = -1
        for row, window in zip(table, windows):
            items = np.concatenate(window)
            row[: len(items)] = items
        self.windows = len(windows)
        self.split = self._upload(table.reshape(-1, 8))
        self.scratch = torch.zeros(slots, dtype=compute_dtype(self.dtype), device=self.device)
        self.counters = torch.zeros(1 + 3 * len(panels), dtype=torch.int32, device=self.device)

    def _upload(self, table: np.ndarray) -> Tensor:
        return torch.from_numpy(table.astype(np.int64)).to(self.device)


class TritonStep:
    """Steps over a fixed list of tensors, batched by device and dtype."""

    def __init__(
        self, tensors: Sequence[Tensor], layouts: Sequence[LayoutTuple], rows: Sequence[int], num_rows: int
    ):
        """``rows[i]`` is the index of tensor i's hyperparameters, of ``num_rows``."""
        self.values: list[tuple[float, ...]] = [(0.0,) * NUMBERS.value] * num_rows
        self.sources: list[Sequence[int]] = [(0, 0, 0, 0)] * num_rows
        places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, w in enumerate(tensors):
            if w.numel() > 0:
                places.setdefault((w.device, w.dtype), []).append(i)
        self.batches = []
        for indices in places.values():
            batch = Batch(
                [tensors[i] for i in indices],
                [Layout(*layouts[i][:4]) for i in indices],
                [layouts[i][4] for i in indices],
                [rows[i] for i in indices],
            )
            self.batches.append((np.array(indices), batch))
        self.hyper: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.in_graphs: list[Tensor] = []  # tables that captured graphs come back to

    def set_hyperparameters(self, row: int, values: Mapping[str, Any]) -> None:
        """``values``: lr, momentum, dampening, weight_decay, nesterov, maximize, a, b, c, exact, freeze."""
        v = values.get
        new = (
            *(v("lr", 0.0), v("momentum", 0.0), 1 - v("dampening", 0.0), v("weight_decay", 0.0)),
            *(-1.0 if v("maximize") else 1.0, float(v("nesterov", False))),
            *(v("a", 0.0), v("b", 0.0), v("c", 0.0)),
            *(float(v("exact", False)), float(FREEZES[v("freeze", "")]), float(any(v("device", ())))),
        )
        sources = tuple(v("device", (0, 0, 0, 0)))
        if (new, sources) != (self.values[row], self.sources[row]):
            self.values[row], self.sources[row] = new, sources
            self.hyper.clear()

    def launch(
        self, addresses: Tensor, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> None:
        """One step; ``addresses`` is StepPlan's table [n, 4]."""
        table = addresses.numpy()
        exact, freeze = any(row[9] for row in self.values), any(row[10] for row in self.values)
        for indices, batch in self.batches:
            key = batch.device, compute_dtype(batch.dtype)
            if key not in self.hyper:
                self.hyper[key] = self._hyper_table(key[1]).to(batch.device)
            if is_capturing():
                self.in_graphs.append(self.hyper[key])
            batch.launch(table[indices], self.hyper[key], exact, freeze, grad_scale, found_inf)

    def _hyper_table(self, dtype: torch.dtype) -> Tensor:
        table = np.zeros((len(self.values), HYPER.value), str(dtype).removeprefix("torch."))
        table[:, : NUMBERS.value] = self.values
        addresses = table[:, NUMBERS.value :].view(np.int64)
        addresses[:, :4] = self.sources
        return torch.from_numpy(table)


class TritonPlan:
    """What ProxSGD drives: a StepPlan that checks and gathers, and the launches on what it has gathered."""

    def __init__(self, params: Sequence[list[Tensor]], layouts: Sequence[Sequence[LayoutTuple]]):
        self._plan = (_C or step_plan).StepPlan(params, layouts)
        rows = [i for i, group in enumerate(params) for _ in group]
        self._step = TritonStep(list(chain(*params)), list(chain(*layouts)), rows, len(params))
        self.gather = self._plan.gather

    def set_hyperparameters(self, group: int, **values: Any) -> None:
        self._plan.set_hyperparameters(group, **values)
        self._step.set_hyperparameters(group, values)

    def run(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        self._plan.run(lambda table: self._step.launch(table, grad_scale, found_inf), grad_scale, found_inf)


KEPT = 8
_kept: OrderedDict[Hashable, TritonStep] = OrderedDict()  # of step_, by kind of list; the last used last


def step_(
    tensors: Sequence[Tensor],
    layouts: Sequence[LayoutTuple],
    rows: Sequence[Sequence[int]],
    groups: Sequence[int],
    values: Sequence[Mapping[str, Any]],
    capturing: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step by StepPlan's ``rows``; tables on the device are kept for the next such list."""
    devices = dict.fromkeys(w.device for w in tensors)
    kinds = tuple((w.device, w.dtype) for w in tensors)
    streams = tuple(map(_stream, devices))
    key = (
        tuple(layouts),
        kinds,
        tuple(groups),
        len(values),
        streams,
        torch.is_inference_mode_enabled(),
        tuple(TILES.values()),
    )
    kept = OrderedDict() if capturing else _kept  # others' addresses would come into the graph's tables
    step = kept.pop(key, None) or TritonStep(tensors, layouts, groups, len(values))
    for i, of_group in enumerate(values):
        step.set_hyperparameters(i, of_group)
    table = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 4)
    step.launch(table, grad_scale, found_inf)
    kept[key] = step  # only now: what is in use, or has failed, serves no other call
    if len(kept) > KEPT:
        kept.popitem(last=False)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _stream(device: torch.device) -> Hashable:
    """What orders the launches on a device."""
    return None if device.type == "cpu" else torch.get_device_module(device).current_stream(device)


def _l2_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return L2_BYTES
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", L2_BYTES)) or L2_BYTES
