"""Makes the rows to measure on a machine: which contenders take turns, and what is counted for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch

from cges_kernels import prox

from . import baselines, workloads
from .baselines import LR, Contender, Maker
from .counts import counted
from .lab import Lab
from .table import Row, one_line
from .timing import Step, Times, take_turns, wall_clock
from .workloads import DTYPES, Shapes


class Bench:
    """The rows of one backend on one machine; on a GPU their names begin with the backend."""

    def __init__(self, lab: Lab, backend: str = "cpu") -> None:
        self.lab, self.backend = lab, backend

    def sgd(self, name: str, shapes: Shapes, group_by: str = "feature", **options: Any) -> Row:
        """ProxSGD, by ``make`` where that is given, beside torch's fused SGD and ``more`` contenders."""
        ours = partial(options.pop("make", baselines.prox_sgd), backend=self.backend, group_by=group_by)
        makers = {"fused_sgd": baselines.fused_sgd, "prox_sgd": ours, **options.pop("more", {})}
        return self.row(name, shapes, makers, group_by=group_by, **options)

    def adamw(self, name: str, shapes: Shapes, group_by: str = "feature", **options: Any) -> Row:
        """ProxAdamW beside torch's fused AdamW and fused SGD."""
        ours = partial(baselines.prox_adamw, backend=self.backend, group_by=group_by)
        makers = {"fused_adamw": baselines.fused_adamw, "prox_adamw": ours, "fused_sgd": baselines.fused_sgd}
        options = {"baseline": "fused_adamw", "contender": "prox_adamw", "states": 2, **options}
        return self.row(name, shapes, makers, **options)

    def modes(self, name: str, shapes: Shapes, percent: int, **options: Any) -> Row:
        """Exact mode beside sequential mode; at their coefficients ``percent`` of the weights are left."""
        modes: dict[str, Maker] = {
            mode: partial(leaving, percent / 100, shapes[0][0], backend=self.backend, prox_mode=mode)
            for mode in ("sequential", "exact")
        }
        makers = {**modes, "fused_sgd": baselines.fused_sgd}
        return self.row(
            name, shapes, makers, baseline="sequential", contender="exact", reset=tuple(modes), **options
        )

    def row(
        self,
        name: str,
        shapes: Shapes,
        makers: Mapping[str, Maker],
        *,
        baseline: str = "fused_sgd",
        contender: str = "prox_sgd",
        target: float | None = None,
        suite: str = "core",
        dtype: str = "fp32",
        states: int = 1,
        slow: Mapping[str, Maker] | None = None,
        reset: tuple[str, ...] = (),
        host: bool = False,
        adjust: Callable[[Times], Times] = lambda times: times,
        threads: int | None = None,
        seconds: float | None = None,
        runs: int | None = None,
        **note: Any,
    ) -> Row:
        """A row in which the contenders of ``makers`` take turns with a copy.

        The copy's time is scaled to the bytes that a step with this number of ``states`` must move. ``slow``
        contenders take turns with the baseline and a copy alone, in the first run only. Contenders in
        ``reset`` start every step from the same weights. With ``host`` the CPU's time is measured, on tensors
        that are in its caches, and the copy is timed separately. ``adjust`` may change the measured times
        before ratios are formed. ``note`` goes into the files.
        """
        lab, kind = self.lab, DTYPES[dtype]
        place = {"dtype": kind, "device": lab.device}
        moved = workloads.bytes_moved(shapes, kind, states)
        warm = host or 2 * lab.copy_bytes + workloads.held_bytes(shapes, kind) <= lab.cache_bytes
        note |= {"suite": suite, "backend": self.backend, "dtype": dtype, "cache": "warm" if warm else "cold"}
        note |= {"elements": workloads.elements(shapes), "tensors": len(shapes), "bytes": moved}
        waiting = dict(slow or {})

        def turns(makers: Mapping[str, Maker]) -> Times:
            lab.free()
            copy = baselines.plain_copy(lab.copy_bytes, lab.device)
            alone = {n: 1 for n in makers if host or n in reset}
            contenders = {n: lab.contender(make, shapes, kind, alone.get(n)) for n, make in makers.items()}
            if host:
                steps = {n: c.step for n, c in contenders.items()}
                before = dict.fromkeys(steps, lab.synchronize)
                times = take_turns(steps, wall_clock, seconds or lab.seconds, before=before)
                times |= lab.turns({"copy": copy})
            else:
                before = {n: resetting(n, contenders[n], copy.step, note) for n in reset}
                times = lab.turns({"copy": copy, **contenders}, before, seconds)
            if suite in ("core", "models"):
                count(makers, contenders)
            scale = moved / (2 * lab.copy_bytes)
            return adjust({**times, "copy": [scale * seconds for seconds in times["copy"]]})

        def count(makers: Mapping[str, Maker], contenders: Mapping[str, Contender]) -> None:
            known = note.setdefault("counts", {})
            for n in contenders.keys() - known.keys():
                idle = makers[n]([(1,) * len(shape) for shape in shapes], **place)
                known[n] = counted(contenders[n].step, idle.step, lab.device, n == "compiled")

        def measure() -> list[Times]:
            with on_threads(threads or torch.get_num_threads()):
                sets = [turns(makers)]
                while waiting:
                    n = next(iter(waiting))
                    make = waiting.pop(n)
                    try:
                        sets.append(turns({baseline: makers[baseline], n: make}))
                    except Exception as error:  # such as torch.compile's, which is no failure of ours
                        note[f"{n}_error"] = one_line(error)
                return sets

        def facts() -> dict[str, Any]:
            lab.free()
            return {"launches": lab.launches(makers[contender](shapes, **place).step)}

        launched = facts if self.backend != "cpu" and suite in ("core", "models") else None
        full = name if self.backend == "cpu" else f"{self.backend}: {name}"
        return Row(full, baseline, contender, target, measure, note, launched, runs)


def resetting(name: str, contender: Contender, flush: Step, note: dict[str, Any]) -> Step:
    """A function that restores a contender's weights and then fills the caches with other data.

    The percentage of weights that a step leaves nonzero is written into ``note``.
    """
    kept = [(p.detach(), p.detach().clone()) for p in contender.params]
    contender.step()
    left = sum((p != 0).sum().item() for p, _ in kept)
    note[f"percent_nonzero_{name}"] = 100 * left / sum(p.numel() for p, _ in kept)

    def reset() -> None:
        for p, start in kept:
            p.copy_(start)
        flush()

    return reset


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def coefficients_for(fraction: float, size: int) -> dict[str, float]:
    """Coefficients with which exact mode leaves ``fraction`` of normal weights; the group lasso is mild."""
    known = min(size, 4096)  # coefficients for longer groups follow from those for this length
    sample = torch.randn(known, 64)
    low, high = 1e-6, 1e6
    for _ in range(40):
        strength = (low * high) ** 0.5
        chosen = {"group_lasso": known**0.5 / 20, "exclusive_lasso": strength / known}
        left = (prox(sample, **chosen, prox_mode="exact") != 0).double().mean()
        low, high = (strength, high) if left > fraction else (low, strength)
    return {"group_lasso": size**0.5 / 20 / LR, "exclusive_lasso": strength / size / LR}


def leaving(
    fraction: float, size: int, shapes: Shapes, prox_mode: str = "exact", **options: Any
) -> Contender:
    """ProxSGD with the coefficients that in exact mode leave ``fraction`` of groups of ``size``."""
    return baselines.prox_sgd(shapes, prox_mode=prox_mode, **coefficients_for(fraction, size), **options)
