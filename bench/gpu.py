"""The GPU benchmarks: ``python -m bench.gpu`` writes bench/results/gpu-<name>.json, .csv and plots.

Times are the GPU's own, with the host running ahead and the L2 cold; the row named "host" is the CPU's time.
A copy's speed is that of a plain copy on the same GPU, in turn with each row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cges_kernels.backends import registry
from cges_kernels.backends.extension import BUILT

from . import baselines, suites, workloads
from .baselines import Contender
from .core import exact_against_sequential
from .counts import count_once
from .lab import DTYPES, Lab, cuda_paths, find
from .table import RESULTS, WHEN, Results, Row, earlier, measure, merged, tell, write
from .timing import Step, Times, take_turns
from .workloads import Case

BACKENDS = ("cuda", "triton")  # in the order of measuring
EXACT = [(512, 32768), (4096, 4096), (50257, 1024)]  # groups of a block, of several, of many
SIDES = (512, 2048, 8192)  # of the grid
LARGEST = 2**26  # elements, where cost is followed over elements
HOST = 20e-6  # seconds that step() may take beyond an empty one
OTHERS = {"foreach": baselines.foreach_sgd, **baselines.others()}  # the last one goes first


class Targets(NamedTuple):
    """What a backend is to reach beside the percents of a copy, each as the most of a ratio."""

    model: float  # to torch's fused SGD
    exact: Mapping[tuple[int, int], float]  # to sequential mode
    host: float | None  # to an empty step and HOST


TARGETS = {
    "triton": Targets(1.25, {}, None),
    "cuda": Targets(1.05, {(512, 32768): 1.3, (4096, 4096): 1.6}, 1.0),
}


class Table:
    """The rows of one backend and dtype."""

    def __init__(self, lab: Lab, backend: str, dtype: str) -> None:
        self.lab, self.backend, self.name_of_dtype, self.dtype = lab, backend, dtype, DTYPES[dtype]
        self.targets = TARGETS[backend]

    def prox_sgd(self, case: Case, sets: int | None = None, **options: Any) -> Contender:
        make = partial(baselines.prox_sgd, backend=self.backend, group_by=case.group_by, **options)
        return self.lab.contender(make, case.shapes, self.dtype, sets)

    def fused_sgd(self, case: Case) -> Contender:
        return self.lab.contender(baselines.fused_sgd, case.shapes, self.dtype)

    def row(
        self,
        case: Case,
        measure: Callable[[dict[str, Any]], list[Times]],
        baseline: str,
        contender: str = "prox_sgd",
        target: float | None = None,
        suite: str = "core",
        states: int = 1,
        **options: Any,
    ) -> Row:
        """``measure`` as a row, with what is known of it; launches are those of ProxSGD with ``options``."""
        cache = self.lab.cache(case.shapes, self.dtype)
        where = {"dtype": self.name_of_dtype, "backend": self.backend, "workload": case.name}
        note = workloads.facts(suite, case.shapes, cache, states=states, **where)

        def run() -> list[Times]:
            self.lab.free()
            return measure(note)

        def facts() -> dict[str, Any]:
            self.lab.free()
            found = {"launches": self.lab.launches(self.prox_sgd(case, sets=1, **options).step)}
            if self.backend == "cuda":
                found["paths"] = cuda_paths([(case.group_by, shape) for shape in case.shapes], self.dtype)
            return found

        name = f"{self.backend}: {case.name} {self.name_of_dtype}"
        return Row(name, baseline, contender, target, run, note, facts)

    def adamw(self, case: Case) -> Row:
        """ProxAdamW beside a copy of the bytes that must move, and torch's fused AdamW and SGD."""

        def make(sets: int | None = None) -> Contender:
            ours = partial(baselines.prox_adamw, backend=self.backend, group_by=case.group_by)
            return self.lab.contender(ours, case.shapes, self.dtype, sets)

        def measure(note: dict[str, Any]) -> list[Times]:
            adamw = self.lab.contender(baselines.fused_adamw, case.shapes, self.dtype)
            contenders = {"prox_adamw": make(), "fused_adamw": adamw, "fused_sgd": self.fused_sgd(case)}
            return [self.lab.beside_copy(contenders, case.shapes, self.dtype, note, states=2)]

        named = case._replace(name=f"AdamW, {case.name}")
        row = self.row(named, measure, "copy", "prox_adamw", self.target_of_adamw(case), states=2)
        return replace(row, facts=lambda: {"launches": self.lab.launches(make(1).step)})

    def target_of_adamw(self, case: Case) -> float | None:
        """Rows within 3 points of ProxSGD's percent of a copy, columns within 8."""
        target = case.target(self.backend, self.dtype)
        less = 3 if case.group_by == "filter" else 8
        return None if target is None else 100 / (100 / target - less)

    def weight(self, case: Case) -> Row:
        """Beside a copy of the bytes that must move, and torch's fused SGD."""

        def measure(note: dict[str, Any]) -> list[Times]:
            contenders = {"prox_sgd": self.prox_sgd(case), "fused_sgd": self.fused_sgd(case)}
            return [self.lab.beside_copy(contenders, case.shapes, self.dtype, note)]

        return self.row(case, measure, "copy", target=case.target(self.backend, self.dtype))

    def model(self, case: Case, slow: bool) -> Row:
        """Beside torch's fused SGD and a copy; the ``slow`` ones on their own, in the first run only."""
        others = dict(OTHERS) if slow else {}

        def measure(note: dict[str, Any]) -> list[Times]:
            sgd, ours = self.fused_sgd(case), self.prox_sgd(case)
            contenders = {"fused_sgd": sgd, "prox_sgd": ours}
            sets = [self.lab.beside_copy(contenders, case.shapes, self.dtype, note)]
            del contenders, ours  # and with them the tensors of prox_sgd
            return [*sets, *self.lab.one_by_one(others, {"fused_sgd": sgd}, case.shapes, self.dtype, note)]

        return self.row(case, measure, "fused_sgd", target=self.targets.model, suite="models")

    def exact(self, rows: int, columns: int, percent: int) -> Row:
        """Beside sequential mode at the same coefficients, each step from the same weights and a cold L2."""
        case = Case(f"exact {rows}x{columns}, {percent}% left", "feature", workloads.matrix(rows, columns))

        def measure(note: dict[str, Any]) -> list[Times]:
            def turns(contenders: Mapping[str, Contender], before: Step) -> Times:
                everyone = {**contenders, "fused_sgd": self.fused_sgd(case)}
                return self.lab.beside_copy(everyone, case.shapes, self.dtype, note, before)

            flush = baselines.plain_copy(self.lab.copy_bytes, self.lab.device).step
            make = partial(self.prox_sgd, case, sets=1)
            return exact_against_sequential(make, rows, percent / 100, note, turns, flush)()

        target = self.targets.exact.get((rows, columns))
        return self.row(case, measure, "sequential", "exact", target, prox_mode="exact")

    def host(self, case: Case) -> Row:
        """The CPU's time for a step() that has next to nothing to compute; nobody waits for the GPU.

        The copy's is the GPU's time for the bytes that the step must move.
        """

        def measure(note: dict[str, Any]) -> list[Times]:
            note["cache"] = "warm"
            place = {"dtype": self.dtype, "device": self.lab.device}
            ours = partial(baselines.prox_sgd, case.shapes, backend=self.backend, **place)
            contenders = {
                "fused_sgd": baselines.fused_sgd(case.shapes, **place),
                "empty": baselines.empty_step(case.shapes, **place),
                "prox_sgd": ours(),
            }
            if self.backend == "triton" and "cpu" in BUILT:
                with baselines.plans_in_python():
                    contenders["python_plan"] = ours()
                    contenders["python_plan"].step()  # builds its plan
                    count_once(note, {"python_plan": contenders["python_plan"]}, self.lab.device)
            steps = {name: contender.step for name, contender in contenders.items()}
            times = take_turns(steps, before=self.lab.synchronize, seconds=self.lab.seconds)
            count_once(note, contenders, self.lab.device)
            allowed = [seconds + HOST for seconds in times["empty"]]
            copy = self.lab.beside_copy({}, case.shapes, self.dtype, note)
            return [{**times, "allowed": allowed, **copy}]

        return self.row(case, measure, "allowed", target=self.targets.host)


def rows(
    lab: Lab,
    backends: Sequence[str],
    cases: Sequence[Case],
    models: Sequence[Case],
    exact: Sequence[tuple[int, int]],
    tiny: Case,
) -> list[Row]:
    """Everything that is measured, what matters most first, as no row begins once time is up.

    The slow contenders are the same beside every backend, so only the last one has them.
    """
    found = []
    for backend in backends:
        tables, last = [Table(lab, backend, dtype) for dtype in DTYPES], backend == backends[-1]
        found += [tables[0].host(tiny)]
        found += [table.weight(case) for table in tables for case in cases]
        found += [table.adamw(case) for table in tables for case in cases]
        found += [table.model(case, case.slow and last) for table in tables for case in models]
        found += [t.exact(*shape, percent) for t in tables for shape in exact for percent in (90, 50, 10)]
    return found


def quick_rows(
    lab: Lab, backend: str, cases: Sequence[Case], models: Sequence[Case], tiny: Case
) -> list[Row]:
    """Those of one backend that a minute is enough for: no exact mode, no slow contenders."""
    return rows(lab, [backend], cases, [case._replace(slow=False) for case in models], [], tiny)


def pictured(
    lab: Lab,
    backends: Sequence[str],
    sides: Sequence[int] = SIDES,
    largest: int = LARGEST,
    huge: tuple[int, int] = suites.HUGE,
) -> list[Row]:
    """What the plots show beyond the models, in the first run only."""
    found = []
    for backend in backends:
        found += suites.grid(lab, sides, 1, backend, DTYPES, oblong=())
        found += suites.scaling(lab, 0, largest, huge, 1, backend)
    return found


def run(lab: Lab, table: Sequence[Row], options: argparse.Namespace) -> bool:
    """Measure the rows and write the files; whether all went well.

    A quick run keeps the other rows of the files that it finds, so each row says when it was measured.
    """
    found, name = {**lab.environment(options.commit), "runs": options.runs}, f"gpu-{lab.name()}"
    old = earlier(name, options.out) if options.quick else []
    for row in table:
        row.note.update({key: found[key] for key in WHEN})

    def save(results: Results) -> None:
        if not options.only:
            write({"environment": found, "results": merged(old, results)}, name, options.out, WHEN)

    results = measure(table, options.runs, options.minutes, save)
    good = tell(results)
    if not (options.only or options.quick):
        draw(results, name, options.out)
    return good


def draw(results: Results, name: str, folder: Path) -> None:
    try:
        from . import plots
    except ImportError as error:  # a GPU machine's python is taken as it is
        print(f"bench.gpu: no plots here ({error}); bench.plots draws them from the files", file=sys.stderr)
    else:
        plots.draw(results, name, folder)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__)
    parser.add_argument("--only", default="", help="run the rows whose names contain this, and write nothing")
    parser.add_argument("--backend", choices=BACKENDS, help="measure this one (default: all that are here)")
    quick = "one backend's host time, weights and models alone, in one run and without plots; other rows stay"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--runs", type=int, help="separated runs per row (default 3, quick 1)")
    parser.add_argument("--minutes", type=float, default=6.0, help="begin no row later (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the files (default %(default)s)")
    parser.add_argument("--commit", help="what was measured, where git cannot tell")
    options = parser.parse_args(argv)
    options.runs = options.runs or (1 if options.quick else 3)
    return options


def main() -> None:
    options = arguments()
    lab = find("bench.gpu")
    wanted = [options.backend] if options.backend else BACKENDS
    reasons = {b: registry.why_not(b, torch.empty(1, device=lab.device)) for b in wanted}
    backends = [b for b in wanted if reasons[b] is None]
    for backend in set(wanted) - set(backends):
        print(f"bench.gpu: {backend} is left out: {reasons[backend]}", file=sys.stderr)
    if not backends:
        sys.exit(1)
    torch.manual_seed(0)
    tiny = Case("500 tensors of 16, host", "feature", workloads.small(500, 16))
    cases, models = workloads.gpu_cases(), workloads.models()
    if options.quick:
        everything = quick_rows(lab, backends[0], cases, models, tiny)
    else:
        everything = [*rows(lab, backends, cases, models, EXACT, tiny), *pictured(lab, backends)]
    table = [row for row in everything if options.only in row.name]
    sys.exit(0 if run(lab, table, options) else 1)


if __name__ == "__main__":
    main()
