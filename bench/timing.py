"""Timing that holds on a shared machine: contenders take turns, and runs are separated in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

Step = Callable[[], Any]
Times = dict[str, list[float]]
# Seconds of a call. The flag says that it must be a single call, because something was prepared for it.
Clock = Callable[[Step, bool], float]
MAX_TURNS = 200


def wall_clock(step: Step, once: bool = True) -> float:
    """Seconds until ``step`` returns, by the CPU's clock."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


class DeviceClock:
    """Seconds that a call takes on the GPU, between events around a few calls after an untimed one.

    After the untimed call, the first timed one finds the caches in the same state as the later ones. A kernel
    that only spins goes before the events, so that the host has queued the calls when the GPU reaches them.
    triton.testing.do_bench has no such kernel. Its time for torch's fused SGD on ResNet-50's 161 tensors,
    which takes an H200 0.17 ms and its host 0.31 ms, would be the host's. In a CUDA graph the weights could
    not be put back before each call.
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


def take_turns(
    steps: Mapping[str, Step],
    clock: Clock = wall_clock,
    seconds: float = 1.0,
    warm_up: float = 0.0,
    before: Mapping[str, Step] | None = None,
) -> Times:
    """The seconds of each call by contender. In every turn each contender is called once.

    ``before`` may hold a function for a contender, which runs untimed before each of its calls. Two turns
    that compile kernels go first, and then ``warm_up`` seconds of further turns.
    """
    times: Times = {name: [] for name in steps}
    prepare = before or {}

    def turn() -> None:
        for name, step in steps.items():
            if name in prepare:
                prepare[name]()
            times[name].append(clock(step, name in prepare))

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
    """Per contender: the median over runs of its median time (ms) and of its ratios, and their extremes.

    The ratios are to ``baseline``, to torch's fused SGD and to a copy. A run is a list of sets of contenders
    that took turns. A ratio is formed turn by turn, to the reference in the contender's own set or, where
    that has none, in the first set of the run that has one.
    """
    found: dict[str, dict[str, list[float]]] = {}
    references = {"ratio": baseline, "to_fused_sgd": "fused_sgd", "to_copy": "copy"}
    for run in runs:
        for times in run:
            for name, values in times.items():
                of = found.setdefault(name, {})
                of.setdefault("ms", []).append(1e3 * median(values))
                for key, reference in references.items():
                    beside = next((t[reference] for t in (times, *run) if reference in t), None)
                    if beside is not None:
                        of.setdefault(key, []).append(median(t / b for t, b in zip(values, beside)))
    return {
        name: {
            **{key: median(values) for key, values in of.items()},
            **{f"{key}_low": min(of[key]) for key in ("ms", "ratio")},
            **{f"{key}_high": max(of[key]) for key in ("ms", "ratio")},
        }
        for name, of in found.items()
    }
