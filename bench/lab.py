"""The machine that is measured, a GPU or the CPU. Tests put a tiny one in its place."""

from __future__ import annotations

import gc
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from .baselines import Contender, Maker
from .timing import Clock, DeviceClock, Step, Times, take_turns, wall_clock
from .workloads import Shapes, held_bytes

NO_KIND = ("amd", "intel", "arm", "apple", "gen", "genuine", "processor", "cpu")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


class Lab:
    """A GPU to measure on."""

    device = "cuda"
    copy_bytes = 2**28  # the size of the copy that takes turns with every step
    warm_up, seconds = 0.05, 0.4  # for each set of contenders in each run
    cold = 4  # a contender steps over copies of its tensors, which together are this many times the L2
    most_sets = 256  # the most copies, even if they are smaller than that together

    def __init__(self) -> None:
        found = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0)
        self.cache_bytes = int(found) or 2**26

    def clock(self) -> Clock:
        return DeviceClock()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free(self) -> None:
        """Give back the memory of earlier contenders."""
        gc.collect()
        torch.cuda.empty_cache()

    def name(self) -> str:
        """The machine's name in file names: "gpu-h200", "gpu-a100-sxm4-80gb"."""
        words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(self.device).lower())
        return "-".join(["gpu", *(w for w in words if w not in ("nvidia", "amd", "geforce", "tesla"))])

    def environment(self, commit: str | None = None) -> dict[str, Any]:
        """The facts about machine and software for the results; clocks are read while a kernel spins."""
        torch.cuda._sleep(2**30)
        smi = ("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader")
        driver, sm, memory = (((output(*smi) or "").splitlines() or [""])[0] + ", , ").split(", ")[:3]
        return {
            **environment(commit),
            "gpu": torch.cuda.get_device_name(self.device),
            "driver": driver,
            "clocks": {"sm": sm, "memory": memory},
            "gpu_l2_bytes": self.cache_bytes,
            "cuda": torch.version.cuda,
            "triton": version_of("triton"),
        }

    def sets(self, shapes: Shapes, dtype: torch.dtype) -> int:
        """The number of copies of its tensors that a contender steps over, so that none is in the L2."""
        return min(self.cold * self.cache_bytes // held_bytes(shapes, dtype) + 1, self.most_sets)

    def contender(
        self, make: Maker, shapes: Shapes, dtype: torch.dtype, sets: int | None = None
    ) -> Contender:
        many = range(sets or self.sets(shapes, dtype))
        contenders = [make(shapes, dtype=dtype, device=self.device) for _ in many]
        for contender in contenders if len(many) > 1 else []:
            contender.step()
        turns = cycle(contenders)
        return Contender(lambda: next(turns).step(), [p for c in contenders for p in c.params])

    def turns(
        self,
        contenders: Mapping[str, Contender],
        before: Mapping[str, Step] | None = None,
        seconds: float | None = None,
    ) -> Times:
        steps = {name: contender.step for name, contender in contenders.items()}
        return take_turns(steps, self.clock(), seconds or self.seconds, self.warm_up, before)

    def launches(self, step: Step, steps: int = 4) -> float | None:
        """Kernels per call, as torch's profiler sees them; None where it sees none."""
        step(), step()  # untimed: compile kernels and make the momentum buffers
        self.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(steps):
                step()
            self.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            return count_kernels(json.loads(path.read_text())["traceEvents"]) / steps or None


class Cpu(Lab):
    """The CPU. The copy that takes turns with the steps replaces their data in the caches."""

    device, copy_bytes, warm_up, seconds = "cpu", 2**26, 0.0, 0.15
    most_sets = 1

    def __init__(self) -> None:
        self.cache_bytes = last_cache_bytes()

    def clock(self) -> Clock:
        return wall_clock

    def synchronize(self) -> None:
        pass

    def free(self) -> None:
        gc.collect()

    def name(self) -> str:
        """The kind of machine, in file names: "cpu-epyc", "cpu-xeon"."""
        return f"cpu-{cpu_kind(cpu_model())}"

    def environment(self, commit: str | None = None) -> dict[str, Any]:
        return {**environment(commit), "torchao": version_of("torchao")}


def count_kernels(events: Sequence[Mapping[str, Any]]) -> int:
    """The number of kernels in a profiler's trace; copies, memsets and annotations have other categories."""
    return sum(event.get("cat") == "kernel" for event in events)


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def find(program: str) -> Lab:
    """The lab of this machine's GPU; without a GPU the program ends with a message."""
    if not torch.cuda.is_available():
        sys.exit(f"{program}: expected a CUDA device, found none (torch {torch.__version__})")
    return Lab()


def output(*command: str) -> str | None:
    """The output of a command; None if the command is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def last_cache_bytes() -> int:
    """The size of the largest cache that Linux lists; 32 MiB if it lists none."""
    sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=2**25)


def l2_bytes() -> int:
    """The size of each core's own L2; 0 where the system does not say."""
    return int(output("getconf", "LEVEL2_CACHE_SIZE") or 0)


def cpu_model() -> str:
    """The model name that the processor reports: "Intel(R) Xeon(R) Processor"."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return found[1].strip() if found else platform.processor() or "unknown"


def cpu_kind(model: str) -> str:
    """The kind of CPU, whose results are kept apart from those of others: "epyc", "xeon"."""
    words = re.findall(r"[a-z]{3,}", model.lower())
    return next((word for word in words if word not in NO_KIND), "unknown")


def environment(commit: str | None = None) -> dict[str, Any]:
    """The facts that go into every file of results; ``commit`` names the sources if git cannot."""
    changed = output("git", "status", "--porcelain", "--", "csrc", "cges_kernels")
    found = output("git", "rev-parse", "--short", "HEAD") or "unknown"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit or found + (" with changes" if changed else ""),
        "cpu": cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "l2_bytes": l2_bytes(),
        "last_cache_bytes": last_cache_bytes(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
