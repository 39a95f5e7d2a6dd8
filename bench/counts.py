"""What a step does, counted: operations that torch dispatches, memory that it takes beyond what it holds."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .timing import Step

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler says when it starts and stops
UNSEEN = ("compiled",)  # contenders whose operations do not pass the dispatcher


class OpCounter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def dispatched_ops(step: Step) -> int:
    """Calls through torch's dispatcher in one step, views among them; what is compiled is not seen."""
    with OpCounter() as counter:
        step()
    return counter.count


def extra_bytes(step: Step, device: str = "cpu") -> int:
    """The most that one step holds at a time of torch's memory, beyond what was there before it."""
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def counted(name: str, step: Step, device: str = "cpu") -> dict[str, int]:
    """What is known of the contender of that name after its first steps."""
    found = {"extra_bytes": extra_bytes(step, device)}
    return found if name in UNSEEN else {**found, "ops": dispatched_ops(step)}
