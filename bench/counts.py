"""What is told of a step beside its time on the row's tensors: operations, memory, time on the host.

Each is found once per row, outside the turns: a profiler and other tensors disturb them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .baselines import Contender
from .table import UNKNOWN
from .timing import Step, take_turns

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler says when it starts and stops
HOST_SECONDS = 0.005


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


def host_us(contender: Contender, device: str = "cpu") -> float:
    """Microseconds of the CPU that a step costs whatever its tensors' sizes, as a median.

    That is a call on one thread with one element in the place of each tensor, all of it in the caches; on a
    GPU nobody waits for it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        before = None if device == "cpu" else torch.cuda.synchronize
        times = take_turns({"idle": contender.idle()}, before, seconds=HOST_SECONDS)
    finally:
        torch.set_num_threads(threads)
    return 1e6 * median(times["idle"])


def counted(name: str, contender: Contender, device: str = "cpu") -> dict[str, float]:
    """What is known of the contender of that name after its first steps."""
    found = {"extra_bytes": extra_bytes(contender.step, device), "host_us": host_us(contender, device)}
    return found if "ops" in UNKNOWN.get(name, ()) else {**found, "ops": dispatched_ops(contender.step)}


def count_once(note: dict[str, Any], contenders: Mapping[str, Contender], device: str = "cpu") -> None:
    """Adds to a row's ``note`` what it does not hold yet of the contenders."""
    known = note.setdefault("counts", {})
    for name, contender in contenders.items():
        if name not in known:
            known[name] = counted(name, contender, device)
