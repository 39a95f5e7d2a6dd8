"""Timing that holds on a shared machine: contenders take turns, medians, separated runs."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

Times = dict[str, list[float]]

RUNS = 5  # separated in time, each with tensors of its own
SECONDS_PER_RUN = 1.0
MAX_TURNS = 200


def take_turns(steps: Mapping[str, Callable[[], Any]], before: Callable[[], Any] | None = None) -> Times:
    """Seconds of each call, the contenders one after another in every turn; two turns to warm up."""
    times: Times = {name: [] for name in steps}
    turns, began = 0, time.perf_counter()
    while turns < 2 + 5 or (time.perf_counter() - began < SECONDS_PER_RUN and turns < 2 + MAX_TURNS):
        for name, step in steps.items():
            if before is not None:
                before()
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
        turns += 1
    return {name: values[2:] for name, values in times.items()}


def summarise(runs: list[list[Times]], baseline: str) -> dict[str, dict[str, float]]:
    """Per contender: the median over runs of its median time (ms), and of its ratio to ``baseline``.

    A run is a list of sets of contenders that took turns; each set holds the baseline.
    """
    medians: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    for times in (times for run in runs for times in run):
        for name, values in times.items():
            medians.setdefault(name, []).append(median(values))
            ratios.setdefault(name, []).append(median(t / b for t, b in zip(values, times[baseline])))
    return {
        name: {
            "ms": 1e3 * median(medians[name]),
            "ratio": median(ratios[name]),
            "ratio_low": min(ratios[name]),
            "ratio_high": max(ratios[name]),
        }
        for name in medians
    }


def environment() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    cpu = platform.processor() or "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        cpu = models[0] if models else cpu
    changed = output("git", "status", "--porcelain", "--", "csrc", "cges_kernels")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": output("git", "rev-parse", "--short", "HEAD") + (" with changes" if changed else ""),
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "l2_bytes": int(output("getconf", "LEVEL2_CACHE_SIZE") or 0),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
