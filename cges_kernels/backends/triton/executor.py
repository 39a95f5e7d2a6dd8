"""The host side of the Triton executor: cuts tensors into tiles, keeps the device's tables, launches.

How a tensor is cut depends on its layout, dtype and alignment alone, never on its neighbours or the device's
load, so its bits do not either. A step launches at most one kernel per device, dtype and path.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from ...core.groups import GroupedLayout, Layout
from ...core.hyperparameters import Hyperparameters
from ...core.rules import Rule
from ...core.shrinkage import MAX_SWEEPS, compute_dtype
from .. import gathering
from ..extension import BUILT
from ..gathering import Row
from ..graphs import is_capturing
from .items import split_items, whole_items
from .split import split_groups
from .tables import (
    COUNTER_PANELS,
    PANEL_COUNTERS,
    SHAPE_COLUMNS,
    SHAPE_GROUPS,
    SHAPE_HYPER,
    SHAPE_K2,
    SHAPE_R1,
    SHAPE_R2,
    TENSOR_COLUMNS,
    TENSOR_PHASE,
    TENSOR_RATIO,
    hyper_table,
)
from .tiles import VECTOR_BYTES, Tiling, cut, launch_options, working_layout
from .updates import RULES, count_steps
from .whole import whole_groups

L2_BYTES = 32 << 20  # assumed if the size of the device's L2 is unknown
COUNT_BLOCK = 256  # the number of tensors whose steps one program counts
STORED = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class CutTables:
    """The tables and the scratch memory on the device that depend on how tensors are cut."""

    def __init__(
        self, tilings: Sequence[Tiling], layouts: Sequence[Layout], dtype: torch.dtype, device: torch.device
    ):
        whole, split = whole_items(tilings), split_items(tilings, layouts, dtype, _l2_bytes(device) // 2)
        self.whole_variants, self.split_variants = whole.variants, split.variants
        self.whole, self.split = (torch.from_numpy(x.table).to(device) for x in (whole, split))
        self.windows = split.windows
        self.scratch = torch.zeros(split.scratch, dtype=compute_dtype(dtype), device=device)
        counters = COUNTER_PANELS.value + PANEL_COUNTERS.value * split.panels
        self.counters = torch.zeros(counters, dtype=torch.int32, device=device)
        shape = len(tilings), TENSOR_COLUMNS.value
        self.tensors = torch.empty(shape, dtype=torch.int64, device=device)
        on_gpu = device.type == "cuda"
        # Replays of a captured graph copy `tensors` from here, so this lives as long as the table.
        self.pinned = torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        self.captured = False  # whether replays of a graph may have written their addresses into `tensors`


class DeviceTables:
    """The tensors of one device and dtype: their tables on the device, and the launches of a step."""

    cut_tables: CutTables

    def __init__(
        self,
        rule: Rule,
        tensors: Sequence[Tensor],
        layouts: Sequence[Layout],
        grouped: Sequence[bool],
        param_groups: Sequence[int],
    ):
        self.rule = rule
        self.device, self.dtype = tensors[0].device, tensors[0].dtype
        self.layouts = [working_layout(layout) for layout in layouts]
        shapes = np.zeros((len(tensors), SHAPE_COLUMNS), dtype=np.int64)
        shapes[:, SHAPE_R1] = [x.R1 for x in self.layouts]
        shapes[:, SHAPE_K2] = [x.K2 for x in self.layouts]
        shapes[:, SHAPE_R2] = [x.R2 for x in self.layouts]
        shapes[:, SHAPE_GROUPS] = [x.num_groups for x in self.layouts]
        shapes[:, SHAPE_HYPER] = param_groups
        self.shapes = torch.from_numpy(shapes).to(self.device)
        self.grouped = grouped
        self.one, self.zero = (
            torch.full((1,), x, dtype=torch.float32, device=self.device) for x in (1.0, 0.0)
        )
        self.rows = np.zeros(0)  # the rows that were last uploaded into `tensors`
        self.aligned = np.zeros(0)
        self.counts = np.zeros(len(tensors), dtype=np.int64)  # addresses of counts on the device, else 0
        self.counts_there = torch.from_numpy(self.counts).to(self.device)
        self.in_graphs: list[CutTables] = []  # kept because replays of captured graphs read them

    def launch(
        self,
        rows: np.ndarray,
        counts: np.ndarray,
        hyper: Tensor,
        exact: bool,
        freeze: bool,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """One step. `rows` are those of `tensors`; `counts` are the addresses of counts on the device."""
        self._take(rows)
        self._take_counts(counts)
        tables = self.cut_tables
        compute = compute_dtype(self.dtype)
        constants = {
            "STORED": STORED[self.dtype],
            "COMPUTE": STORED[compute],
            "EPS": torch.finfo(compute).eps,
            "EXACT": exact,
            "FREEZE": freeze,
            "LOAD": RULES[self.rule.name].load,
            "UPDATE": RULES[self.rule.name].update,
            "STATES": len(self.rule.states),
        }
        grad_scale = self.one if grad_scale is None else grad_scale.detach().to(self.one)
        found_inf = self.zero if found_inf is None else found_inf.detach().to(self.zero)
        nvidia = self.device.type == "cuda" and torch.version.hip is None
        args = tables.tensors, self.shapes, hyper, grad_scale, found_inf
        stepped = False
        with _on(self.device):
            self._count(hyper, found_inf, 1.0)
            try:
                if len(tables.whole):
                    options = launch_options(tables.whole_variants, self.dtype, exact, nvidia)
                    whole_groups[(len(tables.whole),)](tables.whole, *args, **constants, **options)
                    stepped = True
                if tables.windows:
                    tickets = len(tables.split) * (1 + (MAX_SWEEPS if exact else 1))
                    windows = tables.scratch, tables.counters, len(tables.split) // tables.windows, tickets
                    options = launch_options(tables.split_variants, self.dtype, exact, nvidia)
                    split_groups[(tickets,)](tables.split, *args, *windows, **constants, **options)
            except BaseException:  # an interrupt too: the first step waits while kernels are compiled
                if not stepped:  # no weight has moved, so no count may have
                    self._count(hyper, found_inf, -1.0)
                raise

    def _count(self, hyper: Tensor, found_inf: Tensor, by: float) -> None:
        """Count steps on the device, and form the numbers that depend on their counts."""
        if self.counts.any():
            n = len(self.counts)
            args = self.cut_tables.tensors, self.shapes, hyper, self.counts_there, found_inf, n, by
            count_steps[(-(-n // COUNT_BLOCK),)](*args, BLOCK=COUNT_BLOCK)

    def _take_counts(self, counts: np.ndarray) -> None:
        """Upload the addresses of counts if they have changed; impossible while a graph is captured."""
        if np.array_equal(counts, self.counts):
            return
        if is_capturing():
            raise RuntimeError(
                "backend='triton': expected counts of steps where they were in the step before the capture"
            )
        self.counts = counts.copy()
        self.counts_there = torch.from_numpy(self.counts).to(self.device)

    def _take(self, rows: np.ndarray) -> None:
        """Bring `tensors` up to date. Within a captured graph this happens at each replay."""
        capturing = is_capturing()
        if np.array_equal(rows, self.rows) and not (capturing or self.cut_tables.captured):
            return
        aligned = (rows[:, :TENSOR_PHASE] % VECTOR_BYTES == 0).all(axis=1)  # addresses come before the phase
        if not np.array_equal(aligned, self.aligned):
            if capturing:
                raise RuntimeError(
                    "backend='triton': expected tensors aligned as in the step before the capture of this one"
                )
            self._cut(aligned)
        self.rows = rows.copy()
        table = torch.from_numpy(self.rows)
        if capturing:
            if self.cut_tables.captured:
                raise RuntimeError(
                    "backend='triton': expected one captured graph per optimizer, got a second"
                )
            table, self.cut_tables.captured = self.cut_tables.pinned.copy_(table), True
            self.in_graphs.append(self.cut_tables)
        self.cut_tables.tensors.copy_(table, non_blocking=capturing)

    def _cut(self, aligned: np.ndarray) -> None:
        """Cut every tensor anew. Tables that a graph has captured stay as they are."""
        tilings = [
            cut(layout, grouped, self.dtype, bool(a))
            for layout, grouped, a in zip(self.layouts, self.grouped, aligned)
        ]
        self.cut_tables = CutTables(tilings, self.layouts, self.dtype, self.device)
        self.aligned = aligned


class TritonExecutor:
    """Steps tensors of fixed shapes, device by device and dtype by dtype."""

    def __init__(
        self,
        rule: Rule,
        tensors: Sequence[Tensor],
        layouts: Sequence[GroupedLayout],
        param_groups: Sequence[int],
        num_param_groups: int,
    ):
        """Tensor i takes the hyperparameters at index `param_groups[i]`, out of `num_param_groups`."""
        self.rule, self.param_groups = rule, np.array(param_groups, dtype=np.int64)
        self.hyperparameters = [Hyperparameters.make(rule)] * num_param_groups
        places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, w in enumerate(tensors):
            if w.numel() > 0:
                places.setdefault((w.device, w.dtype), []).append(i)
        self.tables: list[tuple[np.ndarray, DeviceTables]] = []  # (indices of the tensors, their tables)
        for indices in places.values():
            tables = DeviceTables(
                rule,
                [tensors[i] for i in indices],
                [layouts[i].layout for i in indices],
                [layouts[i].has_groups for i in indices],
                [param_groups[i] for i in indices],
            )
            self.tables.append((np.array(indices), tables))
        self.hyper: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.in_graphs: list[Tensor] = []  # `hyper` tables kept because replays of captured graphs read them

    def set_hyperparameters(self, param_group: int, h: Hyperparameters) -> None:
        if h != self.hyperparameters[param_group]:
            self.hyperparameters[param_group] = h
            self.hyper.clear()

    def launch(
        self, table: Tensor, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> None:
        """One step; `table` has a gathering.Row for each tensor."""
        counts = table.numpy()[:, Row._fields.index("steps_address")]
        rows = self._rows_of(table.numpy())
        exact = any(h.exact for h in self.hyperparameters)
        freeze = any(h.freeze_zeros is not None for h in self.hyperparameters)
        for indices, tables in self.tables:
            key = tables.device, compute_dtype(tables.dtype)
            if key not in self.hyper:
                fill = RULES[self.rule.name].fill
                self.hyper[key] = hyper_table(self.hyperparameters, fill, key[1]).to(tables.device)
            if is_capturing():
                self.in_graphs.append(self.hyper[key])
            args = rows[indices], counts[indices], self.hyper[key], exact, freeze
            tables.launch(*args, grad_scale, found_inf)

    def _rows_of(self, table: np.ndarray) -> np.ndarray:
        """The rows of `tensors`, with two numbers for steps that the host counts; see csrc/common/adamw.h."""
        rows, at = table.copy(), TENSOR_RATIO.value
        rows[:, at:] = 0
        if not self.rule.counts:
            return rows
        betas = np.array([h.chosen["betas"] for h in self.hyperparameters], dtype=np.float64)
        count = table[:, Row._fields.index("steps"), None]
        far = np.where(count > 0, 1 - betas[self.param_groups] ** count, 1.0)
        root = np.sqrt(far[:, 1])
        rows[:, at:].view(np.float64)[:] = np.where(
            count > 0, np.stack([root / far[:, 0], root], axis=1), 0.0
        )
        return rows

    def step(
        self,
        rows: Sequence[Row],
        hyperparameters: Sequence[Hyperparameters],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        for param_group, h in enumerate(hyperparameters):
            self.set_hyperparameters(param_group, h)
        table = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, len(Row._fields))
        self.launch(table, grad_scale, found_inf)


class TritonPlan:
    """The plan of the Triton executor: a StepPlan checks and gathers rows, which the executor steps."""

    def __init__(
        self, rule: Rule, params: Sequence[list[Tensor]], layouts: Sequence[Sequence[GroupedLayout]]
    ):
        self._plan = BUILT.get("cpu", gathering).StepPlan(params, layouts, rule.name)
        param_groups = [i for i, group in enumerate(params) for _ in group]
        tensors = list(chain(*params))
        self._executor = TritonExecutor(rule, tensors, list(chain(*layouts)), param_groups, len(params))
        self.gather = self._plan.gather

    def set_hyperparameters(self, group: int, h: Hyperparameters) -> None:
        self._plan.set_hyperparameters(group, h)
        self._executor.set_hyperparameters(group, h)

    def run(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        launch = self._executor.launch
        self._plan.run(lambda table: launch(table, grad_scale, found_inf), grad_scale, found_inf)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which `device` is the current one, on which Triton launches."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _l2_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return L2_BYTES
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", L2_BYTES)) or L2_BYTES
