"""Measuring on a GPU or the CPU: its clock, cold caches, launches. Tests put a tiny one in their place."""

from __future__ import annotations

import gc
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cges_kernels import ops

from . import baselines
from .baselines import Contender
from .table import one_line
from .timing import Clock, Step, Times, environment, last_cache_bytes, output, take_turns, wall_clock
from .workloads import Shapes, bytes_moved, elements

COLD = 4  # tensors are stepped over until they amount to so many times the L2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUMBERED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # as the CUDA executor knows them


class DeviceClock:
    """Seconds that a call takes on the GPU, between events around a few calls after an untimed one.

    The untimed call leaves in the caches what every later one finds. A kernel that only spins goes before the
    events, so that the host has queued the calls when they begin: else a fast step would be timed by its host
    side. It grows while that fails.
    """

    CALLS = 4
    LONGEST = 2**26  # cycles, about 30 ms: a step with more launches than the queue holds never gets ahead

    def __init__(self) -> None:
        self.cycles = 2**20

    def __call__(self, step: Step, once: bool) -> float:
        calls = 1 if once else self.CALLS
        if not once:
            step()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self.cycles)
        start.record()
        for _ in range(calls):
            step()
        end.record()
        if start.query():  # the GPU began before everything was queued
            self.cycles = min(2 * self.cycles, self.LONGEST)
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls


class Lab:
    """A GPU to measure on."""

    device = "cuda"
    copy_bytes = 2**28
    warm_up, seconds = 0.05, 0.4  # per set of contenders and run

    def __init__(self) -> None:
        found = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0)
        self.l2_bytes = int(found) or 2**26

    def clock(self) -> Clock:
        return DeviceClock()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free(self) -> None:
        """Give back what earlier contenders held."""
        gc.collect()
        torch.cuda.empty_cache()

    def name(self) -> str:
        """The GPU's name as files carry it: "h200", "a100-sxm4-80gb"."""
        words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(self.device).lower())
        return "-".join(word for word in words if word not in ("nvidia", "amd", "geforce", "tesla")) or "gpu"

    def environment(self, commit: str | None = None) -> dict[str, Any]:
        """What a reader needs to judge the numbers; the clocks are read while a kernel spins."""
        torch.cuda._sleep(2**30)
        smi = ("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader")
        driver, sm, memory = (((output(*smi) or "").splitlines() or [""])[0] + ", , ").split(", ")[:3]
        return {
            **environment(commit),
            "gpu": torch.cuda.get_device_name(self.device),
            "driver": driver,
            "clocks": {"sm": sm, "memory": memory},
            "gpu_l2_bytes": self.l2_bytes,
            "cuda": torch.version.cuda,
            "triton": version_of("triton"),
        }

    def contender(
        self,
        make: Callable[..., Contender],
        shapes: Shapes,
        dtype: torch.dtype = torch.float32,
        sets: int | None = None,
    ) -> Contender:
        """``make`` on this device; unless ``sets`` says otherwise, so many in turn that the L2 stays cold."""
        held = 3 * dtype.itemsize * elements(shapes)  # weights, gradients and buffers
        sets = sets or COLD * self.l2_bytes // held + 1
        return baselines.rotating(lambda: make(shapes, dtype=dtype, device=self.device), sets)

    def turns(self, steps: Mapping[str, Step], before: Step | None = None) -> Times:
        return take_turns(steps, before, self.clock(), self.warm_up, self.seconds)

    def beside_copy(
        self, steps: Mapping[str, Step], shapes: Shapes, dtype: torch.dtype, before: Step | None = None
    ) -> Times:
        """The steps' times and "copy": what a plain copy in turn with them takes for the same bytes."""
        copy = baselines.plain_copy(self.copy_bytes, self.device).step
        times = self.turns({"copy": copy, **steps}, before)
        scale = bytes_moved(shapes, dtype) / (2 * self.copy_bytes)
        return {**times, "copy": [scale * seconds for seconds in times["copy"]]}

    def one_by_one(
        self,
        others: dict[str, Callable[..., Contender]],
        baseline: Mapping[str, Step],
        shapes: Shapes,
        dtype: torch.dtype,
        note: dict[str, Any],
        ask: Callable[[str, Contender], None] = lambda name, contender: None,
    ) -> list[Times]:
        """Each of ``others`` in turn with the baseline, then asked and gone for good: once in all runs.

        One that fails, torch.compile perhaps, says so in ``note``: it is no failure of ours.
        """
        sets = []
        while others:
            self.free()
            name, make = others.popitem()
            contender = None
            try:
                contender = self.contender(make, shapes, dtype)
                sets.append(self.turns({**baseline, name: contender.step}))
                ask(name, contender)
            except Exception as error:
                note[f"{name}_error"] = one_line(error)
        return sets

    def launches(self, step: Step, steps: int = 4) -> float | None:
        """Kernels per call, as torch's profiler sees them; None where it sees none."""
        step(), step()  # compiles, and makes the momentum buffers
        self.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(steps):
                step()
            self.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            kernels = count_kernels(json.loads(path.read_text())["traceEvents"])
        return kernels / steps or None


class Cpu(Lab):
    """The CPU in the place of a GPU, its last cache in that of the L2.

    The copy that takes turns with the steps reads and writes more than that cache holds, and so do the few
    tensors that rotate; what is small is as cold as it is in training.
    """

    device, copy_bytes, warm_up, seconds = "cpu", 2**26, 0.0, 0.15
    MOST_SETS = 16

    def __init__(self) -> None:
        self.l2_bytes = last_cache_bytes()

    def clock(self) -> Clock:
        return wall_clock

    def synchronize(self) -> None:
        pass

    def free(self) -> None:
        gc.collect()

    def contender(
        self,
        make: Callable[..., Contender],
        shapes: Shapes,
        dtype: torch.dtype = torch.float32,
        sets: int | None = None,
    ) -> Contender:
        held = 3 * dtype.itemsize * elements(shapes)
        sets = sets or min(self.l2_bytes // held + 1, self.MOST_SETS)
        contender = super().contender(make, shapes, dtype, sets)
        for _ in range(sets if sets > 1 else 0):
            contender.step()  # makes the momentum buffers, in every set before any time is taken
        return contender


def count_kernels(events: Sequence[Mapping[str, Any]]) -> int:
    """Of a profiler's trace; copies, memsets and annotations are of other categories."""
    return sum(event.get("cat") == "kernel" for event in events)


def cuda_paths(tensors: Sequence[tuple[str, tuple[int, ...]]], dtype: torch.dtype) -> dict[str, int]:
    """How many blocks of the CUDA executor work on tensors of these group specs and shapes, by path."""
    layouts = [ops.layout_tuple(torch.empty(shape, device="meta"), spec, None) for spec, shape in tensors]
    counts = ops._cuda.cuda_paths(layouts, NUMBERED.index(dtype), 0)
    return dict(zip(("block", "cluster", "ticket"), counts))


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def find(program: str) -> Lab:
    """The GPU here; without one the program ends and says so."""
    if not torch.cuda.is_available():
        sys.exit(f"{program}: expected a CUDA device, found none (torch {torch.__version__})")
    return Lab()
