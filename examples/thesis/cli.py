"""The command: train the arms of an experiment, write CSV and figures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib

from ..common.cli import WHOLE, parser_of, prepared, write
from ..common.figures import RC
from ..common.jobs import run_jobs
from ..common.results import Results
from . import figures, page
from .experiments import EXPERIMENTS, jobs, pretrain, work

DESCRIPTION = """\
Repeat the thesis's experiments with ProxSGD:

{}
  all          every one of them; on the digits, write the page as well
  page         write docs/claims.md from the results

An experiment writes NAME-runs.csv (every run), NAME.csv (means and 95% intervals over seeds) and NAME.svg.
With the digits that takes minutes on two cores; MNIST and CIFAR want a GPU (--device). The ranges of lambda
were found on the digits: for other data see --strength. ImageNet (the thesis's Table 1) is not reproduced
here, but --data folder takes any folder of images, ImageNet's too, and brings them to --size."""


def write_results(name: str, results: Results, out: Path) -> None:
    with matplotlib.rc_context(RC):
        figure = figures.draw(name, results)
        texts = {f"{name}-runs.csv": results.runs_csv(), f"{name}.csv": results.summary_csv()}
        write(out, texts, {f"{name}.svg": figure})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; ``argv`` as on the command line, without the program's name."""
    titles = "\n".join(f"  {name:<13}{experiment.title}" for name, experiment in EXPERIMENTS.items())
    parser = parser_of("python -m examples.thesis", DESCRIPTION.format(titles))
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "all", "page"])
    add = parser.add_argument
    add("--lambdas", help="strengths per arm (default: the experiment's)", **WHOLE)
    add("--pretrain", help="epochs with l2 that fine-tuning starts from (default: 200 for CIFAR)", **WHOLE)
    args = parser.parse_args(argv)
    if args.experiment == "page":
        page.main()
        return 0
    default = page.RESULTS if args.data == "digits" else Path("thesis_out") / args.data
    dataset, settings, out = prepared(parser, args, default)
    if args.pretrain:
        settings = replace(settings, pretrain_epochs=args.pretrain)
    if settings.pretrain_epochs:
        run_jobs(partial(pretrain, dataset, settings), range(args.seeds), args.workers, args.device, "l2")
    for name in EXPERIMENTS if args.experiment == "all" else [args.experiment]:
        start = time.perf_counter()
        todo = jobs(name, settings, args.seeds, args.lambdas)
        found = run_jobs(partial(work, name, dataset, settings), todo, args.workers, args.device, name)
        rows = [row for rows in found for row in rows]
        write_results(name, Results(rows, EXPERIMENTS[name].labels), out)
        print(f"{out / name}.csv, -runs.csv, .svg ({time.perf_counter() - start:.0f} s)")
    if args.experiment == "all" and out == page.RESULTS:
        page.main()
    return 0
