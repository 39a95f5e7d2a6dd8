"""The CPU benchmarks: ``python -m bench.run`` writes cpu-KIND.json and its pictures into bench/results."""

from __future__ import annotations

import gc
import sys

import torch

from . import core, suites, table, workloads
from .lab import Cpu, Lab
from .rows import Bench
from .table import Row


def all_rows(lab: Lab, threads: int) -> list[Row]:
    """All rows. Those with targets come first, so that they are measured if there is no time for all."""
    bench = Bench(lab)
    models = suites.models(bench, workloads.models())
    return [*core.rows(lab), *models, *suites.grid(bench), *suites.scaling(bench, threads)]


def main() -> None:
    parser = table.arguments("bench.run", __doc__, runs=5, minutes=8.5)
    parser.add_argument("--threads", type=int, default=2, help="threads of both sides (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    lab = Cpu()
    rows = all_rows(lab, options.threads)
    gc.freeze()  # so that the collection before each row does not scan the objects that imports created
    environment = lab.environment(options.commit)
    good = table.run(rows, lab.name(), environment, options)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
