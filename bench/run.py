"""The CPU benchmarks: ``python -m bench.run`` writes cpu-KIND.json, .csv and plots into bench/results."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import core, plots, suites, workloads
from .lab import Cpu, Lab, version_of
from .memory import peak_extra_memory
from .table import RESULTS, Results, Row, measure, of_suite, tell, write
from .timing import RUNS, environment


def all_rows(lab: Lab, threads: int) -> list[Row]:
    """Those with targets first: the last rounds are theirs, if time runs out."""
    return [
        *core.rows(),
        *suites.models(lab, workloads.models()),
        *suites.grid(lab),
        *suites.scaling(lab, threads),
    ]


def run(rows: Sequence[Row], options: argparse.Namespace, name: str) -> bool:
    """Measure the rows, write the files of that name, draw; whether all went well."""
    memory = {} if options.only else peak_extra_memory(options.threads)
    gc.freeze()  # what imports made is not looked through before every row
    found = {**environment(), "torchao": version_of("torchao"), "runs": options.runs}

    def save(results: Results) -> None:
        if not options.only:  # where time ran out, the row with the fewest runs counts
            found["runs"] = min((r.get("runs", 0) for r in of_suite(results, "core")), default=options.runs)
            report = {"environment": found, "peak_extra_memory": memory, "results": results}
            write(report, name, options.out)

    results = measure(rows, options.runs, options.minutes, save)
    gc.unfreeze()
    good = tell(results)
    for case, taken in memory.items():
        print(f"memory taken by the first steps, {case}: {taken / 2**20:.2f} MiB a thread")
    if not options.only:
        plots.draw(results, name, options.out)
    return good


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.run", description=__doc__)
    parser.add_argument("--only", default="", help="run the rows whose names contain this, and write nothing")
    parser.add_argument("--runs", type=int, default=RUNS, help="separated runs per row (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.5, help="begin no row later (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of both sides (default %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the files (default %(default)s)")
    return parser.parse_args(argv)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    lab = Cpu()
    rows = [row for row in all_rows(lab, options.threads) if options.only in row.name]
    sys.exit(0 if run(rows, options, lab.name()) else 1)


if __name__ == "__main__":
    main()
