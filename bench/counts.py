"""Counts for a contender beside its time: operations, extra memory, and time on the host.

Each is found once per row, outside of the timed turns, which profilers and further tensors would disturb.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

from .timing import Step

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints when it starts and stops


class OpCounter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def dispatched_ops(step: Step) -> int:
    """The number of calls through torch's dispatcher in one step, calls that make views included."""
    with OpCounter() as counter:
        step()
    return counter.count


def extra_bytes(step: Step, device: str = "cpu") -> int:
    """The most bytes that torch holds during one step beyond the bytes that it held before the step."""
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def host_us(idle: Step) -> float:
    """Microseconds of the CPU that ``idle`` takes: a step on one thread with one element in each tensor."""
    timer = Timer("step()", globals={"step": idle}, num_threads=1)
    return 1e6 * timer.blocked_autorange(min_run_time=5e-3).median


def counted(step: Step, idle: Step, device: str, compiled: bool) -> dict[str, float]:
    """Memory, host time and number of operations of a step that has already run once.

    Compiled code does not use the dispatcher, so its operations are not counted.
    """
    found = {"extra_bytes": extra_bytes(step, device), "host_us": host_us(idle)}
    return found if compiled else {**found, "ops": dispatched_ops(step)}
