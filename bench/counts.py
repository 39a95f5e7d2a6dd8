"""What is told of a contender beside its time: operations, memory, time on the host.

Each is found once per row and outside the turns, which a profiler and other tensors would disturb.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

from .timing import Step

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler says when it starts and stops


class OpCounter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def dispatched_ops(step: Step) -> int:
    """Calls through torch's dispatcher in one step, views among them; those of compiled code are not seen."""
    with OpCounter() as counter:
        step()
    return counter.count


def extra_bytes(step: Step, device: str = "cpu") -> int:
    """The most of torch's memory that one step holds at a time beyond what was held before it."""
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
    """What is known of a step that has run before; what is compiled passes by the dispatcher."""
    found = {"extra_bytes": extra_bytes(step, device), "host_us": host_us(idle)}
    return found if compiled else {**found, "ops": dispatched_ops(step)}
