"""The GPU benchmarks: ``python -m bench.gpu`` writes bench/results/gpu-<name>.json and .csv.

Times are the GPU's own, with the host running ahead and the L2 cold; the row named "host" is the CPU's time.
A copy's speed is that of a plain copy on the same GPU, in turn with each row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cges_kernels import available_backends, ops

from . import baselines, workloads
from .baselines import Contender
from .lab import DTYPES, Lab, find
from .run import exact_against_sequential
from .table import RESULTS, Measure, Results, Row, line, measure, one_line, write
from .timing import Times, take_turns
from .workloads import Case

BACKENDS = ("triton", "cuda")
EXACT = [(512, 32768), (4096, 4096)]  # groups that stay on chip, and groups that are read in every sweep
OTHERS = {"eager": baselines.eager, "foreach": baselines.foreach_sgd, "compiled": baselines.compiled}


class Table:
    """The rows of one backend and dtype."""

    def __init__(self, lab: Lab, backend: str, dtype: str) -> None:
        self.lab, self.backend, self.name_of_dtype, self.dtype = lab, backend, dtype, DTYPES[dtype]

    def prox_sgd(self, case: Case, sets: int | None = None, **options: Any) -> Contender:
        make = partial(baselines.prox_sgd, backend=self.backend, group_by=case.group_by, **options)
        return self.lab.contender(make, case.shapes, self.dtype, sets)

    def fused_sgd(self, case: Case) -> Contender:
        return self.lab.contender(baselines.fused_sgd, case.shapes, self.dtype)

    def row(
        self,
        case: Case,
        measure: Measure,
        baseline: str,
        contender: str = "prox_sgd",
        target: float | None = None,
        note: dict[str, Any] | None = None,
        **options: Any,
    ) -> Row:
        """``measure`` as a row, with what is known of it; launches are those of ProxSGD with ``options``."""
        note = {} if note is None else note
        note |= {"backend": self.backend, "dtype": self.name_of_dtype, "workload": case.name}
        note |= {"elements": workloads.elements(case.shapes), "tensors": len(case.shapes)}

        def run() -> list[Times]:
            self.lab.free()
            return measure()

        def facts() -> dict[str, Any]:
            self.lab.free()
            return {"launches": self.lab.launches(self.prox_sgd(case, sets=1, **options).step)}

        name = f"{self.backend}: {case.name} {self.name_of_dtype}"
        return Row(name, baseline, contender, target, run, note, facts)

    def weight(self, case: Case) -> Row:
        """Beside a copy of the bytes that must move, and torch's fused SGD."""

        def measure() -> list[Times]:
            steps = {"prox_sgd": self.prox_sgd(case).step, "fused_sgd": self.fused_sgd(case).step}
            return [self.lab.beside_copy(steps, case.shapes, self.dtype)]

        return self.row(case, measure, "copy", target=None if case.percent is None else 100 / case.percent)

    def model(self, case: Case) -> Row:
        """Beside torch's fused SGD and a copy; the slow contenders on their own, in the first run only."""
        note: dict[str, Any] = {}
        others = dict(OTHERS)

        def measure() -> list[Times]:
            sgd = self.fused_sgd(case).step
            steps = {"fused_sgd": sgd, "prox_sgd": self.prox_sgd(case).step}
            sets = [self.lab.beside_copy(steps, case.shapes, self.dtype)]
            while others:
                del steps  # and with it the tensors of the last contender
                self.lab.free()
                name, make = others.popitem()
                try:
                    steps = {"fused_sgd": sgd, name: self.lab.contender(make, case.shapes, self.dtype).step}
                    sets.append(self.lab.turns(steps))
                except Exception as error:  # torch.compile's, say: no failure of ours
                    note[f"{name}_error"] = one_line(error)
                    steps = {}
            return sets

        return self.row(case, measure, "fused_sgd", target=1.25, note=note)

    def exact(self, rows: int, columns: int, percent: int) -> Row:
        """Beside sequential mode at the same coefficients, each step from the same weights and a cold L2."""
        case = Case(f"exact {rows}x{columns}, {percent}% left", "feature", workloads.matrix(rows, columns))
        note: dict[str, Any] = {}

        def measure() -> list[Times]:
            flush = baselines.plain_copy(self.lab.copy_bytes, self.lab.device).step
            make = partial(self.prox_sgd, case, sets=1)
            return exact_against_sequential(make, rows, percent / 100, note, self.lab.turns, flush)()

        return self.row(case, measure, "sequential", "exact", note=note, prox_mode="exact")

    def host(self, case: Case) -> Row:
        """The CPU's time for a step() that has next to nothing to compute; nobody waits for the GPU."""

        def measure() -> list[Times]:
            place = {"dtype": self.dtype, "device": self.lab.device}
            ours = partial(baselines.prox_sgd, case.shapes, backend=self.backend, **place)
            steps = {
                "fused_sgd": baselines.fused_sgd(case.shapes, **place).step,
                "empty": baselines.empty_step(case.shapes, **place).step,
                "prox_sgd": ours().step,
            }
            if self.backend == "triton" and ops._C is not None:
                with baselines.plans_in_python():
                    steps["python_plan"] = ours().step
                    steps["python_plan"]()  # builds its plan
            return [take_turns(steps, before=self.lab.synchronize, seconds=self.lab.seconds)]

        return self.row(case, measure, "fused_sgd")


def rows(
    lab: Lab,
    backend: str,
    cases: Sequence[Case],
    models: Sequence[Case],
    exact: Sequence[tuple[int, int]],
    tiny: Case,
) -> list[Row]:
    """Everything that is measured of a backend, ``tiny`` first, as no later row may begin once time is up."""
    tables = [Table(lab, backend, dtype) for dtype in DTYPES]
    found = [tables[0].host(tiny)]
    for table in tables:
        found += [*map(table.weight, cases), *map(table.model, models)]
        found += [table.exact(*shape, percent) for shape in exact for percent in (90, 50, 10)]
    return found


def run(lab: Lab, table: Sequence[Row], options: argparse.Namespace) -> bool:
    """Measure the rows and write the files; whether all went well."""
    found = lab.environment(options.commit)

    def save(results: Results) -> None:
        if not options.only:
            report = {"environment": {**found, "runs": options.runs}, "results": results}
            write(report, f"gpu-{lab.name()}", options.out)

    results = measure(table, options.runs, options.minutes, save)
    print(*map(line, results), sep="\n")
    return not any("error" in result for result in results)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__)
    parser.add_argument("--only", default="", help="run the rows whose names contain this, and write nothing")
    parser.add_argument("--backend", choices=BACKENDS, help="measure this one (default: all that are here)")
    parser.add_argument("--runs", type=int, default=3, help="separated runs per row (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=7.0, help="begin no row later (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the files (default %(default)s)")
    parser.add_argument("--commit", help="what was measured, where git cannot tell")
    return parser.parse_args(argv)


def main() -> None:
    options = arguments()
    lab = find("bench.gpu")
    wanted = [options.backend] if options.backend else [b for b in BACKENDS if b in available_backends()]
    reasons = {backend: ops.why_not(backend) for backend in wanted or BACKENDS}
    if not wanted or any(reasons.values()):
        sys.exit("bench.gpu: " + "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items()))
    torch.manual_seed(0)
    tiny = Case("500 tensors of 16, host", "feature", workloads.small(500, 16))
    inputs = workloads.gpu_cases(), workloads.models(), EXACT, tiny
    table = [row for backend in wanted for row in rows(lab, backend, *inputs) if options.only in row.name]
    sys.exit(0 if run(lab, table, options) else 1)


if __name__ == "__main__":
    main()
