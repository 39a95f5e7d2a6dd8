"""Timing that holds on a shared machine: contenders take turns, medians, separated runs."""

from __future__ import annotations

import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

Step = Callable[[], Any]
Times = dict[str, list[float]]
# Seconds of a call; told whether it must be this very call alone, because something was prepared for it.
Clock = Callable[[Step, bool], float]

RUNS = 5  # separated in time, each with tensors of its own
SECONDS_PER_RUN = 1.0
MAX_TURNS = 200
NO_KIND = ("amd", "intel", "arm", "apple", "gen", "genuine", "processor", "cpu")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def wall_clock(step: Step, once: bool = True) -> float:
    """Seconds until ``step`` returns, by the CPU's clock."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def take_turns(
    steps: Mapping[str, Step],
    before: Step | None = None,
    clock: Clock = wall_clock,
    warm_up: float = 0.0,
    seconds: float = SECONDS_PER_RUN,
) -> Times:
    """Seconds of each call, the contenders one after another in every turn, ``before`` run before each.

    Two turns go first, in which kernels are compiled, and then ``warm_up`` seconds of more.
    """
    times: Times = {name: [] for name in steps}

    def turn() -> None:
        for name, step in steps.items():
            if before is not None:
                before()
            times[name].append(clock(step, before is not None))

    turn(), turn()
    began = time.perf_counter()
    while time.perf_counter() - began < warm_up:
        turn()
    for values in times.values():
        values.clear()
    turns, began = 0, time.perf_counter()
    while turns < 5 or (time.perf_counter() - began < seconds and turns < MAX_TURNS):
        turn()
        turns += 1
    return times


def summarise(runs: list[list[Times]], baseline: str) -> dict[str, dict[str, float]]:
    """Per contender: the median over runs of its median time (ms), and of its ratios.

    Those are to ``baseline``, to torch's fused SGD and to a copy. A run is a list of sets of contenders that
    took turns; a ratio is turn by turn to the one in its own set, or else in the first of the run with one.
    """
    found: dict[str, dict[str, list[float]]] = {}
    references = {"ratio": baseline, "to_fused_sgd": "fused_sgd", "to_copy": "copy"}
    for run in runs:
        for times in run:
            for name, values in times.items():
                of = found.setdefault(name, {"ms": []})
                of["ms"].append(1e3 * median(values))
                for key, reference in references.items():
                    beside = next((t[reference] for t in (times, *run) if reference in t), None)
                    if beside is not None:
                        ratio = median(t / b for t, b in zip(values, beside))
                        of.setdefault(key, []).append(ratio)
    return {
        name: {
            **{key: median(values) for key, values in of.items()},
            **{f"{key}_low": min(of[key]) for key in ("ms", "ratio")},
            **{f"{key}_high": max(of[key]) for key in ("ms", "ratio")},
        }
        for name, of in found.items()
    }


def output(*command: str) -> str | None:
    """What a command prints; None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def last_cache_bytes() -> int:
    """Of the largest cache that Linux tells of; 32 MiB where it tells of none."""
    sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=2**25)


def l2_bytes() -> int:
    """Of each core's own; 0 where nobody tells."""
    return int(output("getconf", "LEVEL2_CACHE_SIZE") or 0)


def cpu_model() -> str:
    """As the processor calls itself: "Intel(R) Xeon(R) Processor"."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return models[0] if models else platform.processor() or "unknown"


def cpu_kind(model: str) -> str:
    """The name of a kind of machine, whose results are kept apart from others': "epyc", "xeon"."""
    words = re.findall(r"[a-z]{3,}", model.lower())
    return next((word for word in words if word not in NO_KIND), "unknown")


def environment(commit: str | None = None) -> dict[str, Any]:
    """What a reader needs to judge the numbers; ``commit`` names the sources where git cannot."""
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
