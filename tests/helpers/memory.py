"""The memory that ProxSGD's first steps on a CPU take beyond parameters, gradients and buffers (Linux)."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch

from bench import baselines
from bench.timing import Step
from bench.workloads import matrix


class Case(NamedTuple):
    """A matrix grouped by feature: ``rows`` to a group."""

    rows: int
    columns: int
    prox_mode: str = "sequential"
    dtype: str = "float32"

    def name(self) -> str:
        others = [x for x, usual in zip(self[2:], self._field_defaults.values(), strict=True) if x != usual]
        return " ".join([f"{self.rows:,}x{self.columns:,}", *others])


CASES = (
    Case(4096, 4128),
    Case(4096, 4096),
    Case(8192, 4096),
    Case(50_000, 1024),
    Case(4096, 4128, "exact"),
    Case(4096, 4128, dtype="bfloat16"),
)
# With this glibc takes new pages for every array of some size, so that freed memory hides nothing.
NEW_PAGES = {"MALLOC_MMAP_THRESHOLD_": "16384"}


def peak() -> int:
    """The most bytes that this process has held since its peak was cleared."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def growth(case: Case, threads: int) -> int:
    """The bytes by which three steps raise a process's peak, after small steps have started its threads."""
    torch.set_num_threads(threads)

    def made(rows: int, columns: int, **options: float) -> Step:
        dtype, mode = getattr(torch, case.dtype), case.prox_mode
        step, params = baselines.prox_sgd(matrix(rows, columns), dtype=dtype, prox_mode=mode, **options)
        for p in params:
            step.__self__.state[p]["momentum_buffer"] = torch.randn_like(p)
        return step

    made(300, 300, group_lasso=0.0, exclusive_lasso=0.0)()
    made(8, 8)()
    step = made(case.rows, case.columns)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak()
    for _ in range(3):
        step()
    return peak() - before


def peak_extra_memory(threads: int, cases: tuple[Case, ...] = CASES) -> dict[str, int]:
    """Each case's growth in bytes a thread, in a process of its own, as a peak only ever rises."""
    found, spawn = {}, multiprocessing.get_context("spawn")
    for case in cases:
        with patch.dict(os.environ, NEW_PAGES), ProcessPoolExecutor(1, spawn) as pool:
            found[case.name()] = pool.submit(growth, case, threads).result() // threads
    return found
