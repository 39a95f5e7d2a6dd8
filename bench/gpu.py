"""The GPU benchmarks: ``python -m bench.gpu`` writes bench/results/gpu-NAME.json and its pictures.

Times are measured on the GPU, with the host running ahead and the L2 cold; the row named "host" is the CPU's
time. Percents of a copy compare with a plain copy on the same GPU, which takes turns with the contenders.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch

from cges_kernels.backends import registry

from . import baselines, core, table, workloads
from .lab import Lab, find
from .rows import Bench
from .table import Row
from .timing import Times
from .workloads import DTYPES, Case

BACKENDS = ("cuda", "triton")  # in the order of measuring
KINDS = ("fp32", "bf16")
EXACT = [(512, 32768), (4096, 4096), (50257, 1024)]  # one thread block holds a group, or several do, or many
HOST = 20e-6  # seconds that step() may take beyond an empty one
TINY = Case("500 tensors of 16, host", "feature", workloads.small(500, 16))


# The greatest ratios to accept: a model's time to torch's fused SGD, exact mode's to sequential mode's by
# shape, and the host's time to that of an empty step plus HOST. workloads.py has the percents of a copy.
TARGETS: dict[str, dict[str, Any]] = {
    "triton": {"model": 1.25, "exact": {}, "host": None},
    "cuda": {"model": 1.05, "exact": {(512, 32768): 1.3, (4096, 4096): 1.6}, "host": 1.0},
}


def with_allowance(times: Times) -> Times:
    return {**times, "allowed": [seconds + HOST for seconds in times["empty"]]}


def target_of_adamw(case: Case, backend: str, dtype: str) -> float | None:
    """ProxAdamW's target: ProxSGD's percent of a copy, less 3 points for "filter" and 8 for other specs."""
    target = case.target(backend, DTYPES[dtype])
    return target and 100 / (100 / target - (3 if case.group_by == "filter" else 8))


def rows(
    lab: Lab,
    backends: Sequence[str],
    cases: Sequence[Case],
    models: Sequence[Case],
    exact: Sequence[tuple[int, int]] = EXACT,
    tiny: Case = TINY,
    slow: bool = True,
) -> list[Row]:
    """The rows with targets, most important first, because no row is started once the time is used up.

    The row named "host" is the CPU's time for a step() that has next to nothing to compute. The slow
    contenders are the same beside every backend, so only the last one has them.
    """
    found = []
    for backend in backends:
        targets, others = TARGETS[backend], baselines.others() if slow and backend == backends[-1] else {}

        def one(make: Callable[..., Row], case: Case, dtype: str, /, *more: Any, **options: Any) -> Row:
            about = {"dtype": dtype, "workload": case.name}
            return make(f"{case.name} {dtype}", case.shapes, *more, **about, **options)

        bench = Bench(lab, backend)
        empty = {"more": {"empty": baselines.empty_step}, "host": True, "adjust": with_allowance}
        found += [one(bench.sgd, tiny, "fp32", baseline="allowed", target=targets["host"], **empty)]
        for dtype, case in product(KINDS, cases):
            target = case.target(backend, DTYPES[dtype])
            found += [one(bench.sgd, case, dtype, case.group_by, baseline="copy", target=target)]
        for dtype, case in product(KINDS, cases):
            named = case._replace(name=f"AdamW, {case.name}")
            target = target_of_adamw(case, backend, dtype)
            found += [one(bench.adamw, named, dtype, case.group_by, baseline="copy", target=target)]
        dead = [x._replace(name=f"{x.name}, 90% dead") for x in cases if x.group_by == "filter"][:1]
        for dtype, case in product(KINDS, dead if backend == "cuda" else []):
            found += [one(bench.sgd, case, dtype, "filter", make=core.mostly_dead)]
        for dtype, case in product(KINDS, models):
            options = {"suite": "models", "target": targets["model"], "slow": others if case.slow else {}}
            found += [one(bench.sgd, case, dtype, case.group_by, **options)]
            if "ResNet-50" in case.name:
                named = case._replace(name=f"AdamW, {case.name}")
                found += [one(bench.adamw, named, dtype, case.group_by)]
        for dtype, shape, left in product(KINDS, exact, (90, 50, 10)):
            case = Case(f"exact {shape[0]}x{shape[1]}, {left}% left", "feature", [shape])
            found += [one(bench.modes, case, dtype, left, target=targets["exact"].get(shape))]
    return found


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = table.arguments("bench.gpu", __doc__, runs=3, minutes=6.0)
    parser.add_argument("--backend", choices=BACKENDS, help="measure this one (default: all that are here)")
    quick = "one run of one backend without exact mode and slow contenders; other rows stay"
    parser.add_argument("--quick", action="store_true", help=quick)
    options = parser.parse_args(argv)
    if options.quick:
        options.runs = 1
    return options


def run(lab: Lab, table_rows: Sequence[Row], options: argparse.Namespace) -> bool:
    return table.run(table_rows, lab.name(), lab.environment(options.commit), options, options.quick)


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
    cases, models = workloads.gpu_cases(), workloads.models()
    if options.quick:
        everything = rows(lab, backends[:1], cases, models, [], slow=False)
    else:
        everything = rows(lab, backends, cases, models)
    sys.exit(0 if run(lab, everything, options) else 1)


if __name__ == "__main__":
    main()
