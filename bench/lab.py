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

from cges_kernels.backends.extension import BUILT
from cges_kernels.core.groups import grouped_layout

from . import baselines
from .baselines import Contender
from .counts import count_once
from .table import one_line
from .timing import (
    Clock,
    Step,
    Times,
    cpu_kind,
    cpu_model,
    environment,
    last_cache_bytes,
    output,
    take_turns,
    wall_clock,
)
from .workloads import Shapes, bytes_moved, elements

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
    cold = 4  # tensors are stepped over until they amount to so many times the L2,
    most_sets = 256  # or to so many sets

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

    def sets(self, shapes: Shapes, dtype: torch.dtype) -> int:
        """Of tensors, over which a contender's steps go in turn: as many as keep the L2 cold, if it can."""
        return min(self.cold * self.l2_bytes // held_bytes(shapes, dtype) + 1, self.most_sets)

    def cache(self, shapes: Shapes, dtype: torch.dtype) -> str:
        """Whether the L2 is "cold", or so small are the tensors that it holds all of them: "warm"."""
        held = self.sets(shapes, dtype) * held_bytes(shapes, dtype)
        return "cold" if held > self.l2_bytes else "warm"

    def contender(
        self,
        make: Callable[..., Contender],
        shapes: Shapes,
        dtype: torch.dtype = torch.float32,
        sets: int | None = None,
    ) -> Contender:
        """``make`` on this device, on so many sets of tensors in turn, each with its momentum buffers."""
        sets = sets or self.sets(shapes, dtype)
        contender = baselines.rotating(lambda: make(shapes, dtype=dtype, device=self.device), sets)
        for _ in range(sets if sets > 1 else 0):
            contender.step()
        return contender

    def turns(self, contenders: Mapping[str, Contender], before: Step | None = None) -> Times:
        steps = {name: contender.step for name, contender in contenders.items()}
        return take_turns(steps, before, self.clock(), self.warm_up, self.seconds)

    def beside_copy(
        self,
        contenders: Mapping[str, Contender],
        shapes: Shapes,
        dtype: torch.dtype,
        note: dict[str, Any] | None = None,
        before: Step | None = None,
        states: int = 1,
    ) -> Times:
        """The contenders' times and "copy": what a plain copy in turn with them takes for the same bytes.

        ``states`` are those that their update keeps. What is counted of each goes into ``note``, if there is
        one, once.
        """
        everyone = {"copy": baselines.plain_copy(self.copy_bytes, self.device), **contenders}
        times = self.turns(everyone, before)
        if note is not None:
            count_once(note, everyone, self.device)
        scale = bytes_moved(shapes, dtype, states) / (2 * self.copy_bytes)
        return {**times, "copy": [scale * seconds for seconds in times["copy"]]}

    def one_by_one(
        self,
        others: dict[str, Callable[..., Contender]],
        baseline: Mapping[str, Contender],
        shapes: Shapes,
        dtype: torch.dtype,
        note: dict[str, Any],
    ) -> list[Times]:
        """Each of ``others`` in turn with the baseline, then counted and gone for good: once in all runs.

        One that fails, torch.compile perhaps, says so in ``note``: it is no failure of ours.
        """
        sets = []
        while others:
            self.free()
            name, make = others.popitem()
            contender = None
            try:
                contender = self.contender(make, shapes, dtype)
                times = self.turns({**baseline, name: contender})
                count_once(note, {name: contender}, self.device)
                sets.append(times)
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
    cold, most_sets = 1, 16

    def __init__(self) -> None:
        self.l2_bytes = last_cache_bytes()

    def clock(self) -> Clock:
        return wall_clock

    def synchronize(self) -> None:
        pass

    def free(self) -> None:
        gc.collect()

    def name(self) -> str:
        """Of this kind of machine, as files carry it: "cpu-epyc", "cpu-xeon"."""
        return f"cpu-{cpu_kind(cpu_model())}"

    def environment(self, commit: str | None = None) -> dict[str, Any]:
        return environment(commit)


def held_bytes(shapes: Shapes, dtype: torch.dtype) -> int:
    """Of weights, gradients and momentum buffers."""
    return 3 * dtype.itemsize * elements(shapes)


def count_kernels(events: Sequence[Mapping[str, Any]]) -> int:
    """Of a profiler's trace; copies, memsets and annotations are of other categories."""
    return sum(event.get("cat") == "kernel" for event in events)


def cuda_paths(tensors: Sequence[tuple[str, tuple[int, ...]]], dtype: torch.dtype) -> dict[str, int]:
    """How many blocks of the CUDA executor work on tensors of these group specs and shapes, by path."""
    layouts = [grouped_layout(torch.empty(shape, device="meta"), spec, None) for spec, shape in tensors]
    counts = BUILT["cuda"].cuda_paths(layouts, NUMBERED.index(dtype), 0)
    return dict(zip(("rows", "tile", "shared", "ticket"), counts))


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
