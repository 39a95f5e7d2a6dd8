"""The command: train what an experiment compares, write CSV and figures, and say what was found."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from ..common.cli import WHOLE, at_least, parser_of, prepared
from ..common.jobs import run_jobs
from ..common.results import Results
from .experiments import EXPERIMENTS, jobs, left_out, pretrain, work
from .files import found, read_results, write_results
from .page import plain, verdicts, write_page

DESCRIPTION = """\
Repeat the thesis's experiments with ProxSGD:

{}
  all          every one of them, then the page
  page         print the verdicts on the results in --out, and write their page; it takes no other option

An experiment writes NAME-runs.csv (every run), NAME.csv (means and 95% intervals over seeds),
NAME-settings.csv (what all runs share) and NAME.svg, and prints its verdicts. The page is claims.md in the
folder of the results; for the repository's own, examples/thesis/results, it is docs/claims.md.
With the digits that takes minutes on two cores; MNIST and CIFAR want a GPU (--device). The ranges of lambda
were found on the digits: for other data see --strength. ImageNet (the thesis's Table 1) is not reproduced
here, but --data folder takes any folder of images, ImageNet's too, and brings them to --size."""


def parsed(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser and the arguments; those that do not apply are an error."""
    titles = "\n".join(f"  {name:<13}{experiment.title}" for name, experiment in EXPERIMENTS.items())
    parser = parser_of("python -m examples.thesis", DESCRIPTION.format(titles), "thesis_out")
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "all", "page"])
    add = parser.add_argument
    add("--lambdas", help="strengths per arm (default: the experiment's)", **WHOLE)
    epochs = "epochs with l2 that fine-tuning starts from; 0: none (default: 200 for CIFAR, 0 for others)"
    add("--pretrain", help=epochs, **WHOLE | {"type": at_least(0)})
    args = parser.parse_args(argv)
    if args.experiment == "page":
        others = vars(args).keys() - {"experiment", "out"}
        given = sorted(f"--{key}" for key in others if getattr(args, key) != parser.get_default(key))
        if given:
            parser.error(f"page takes --out only, got {', '.join(given)}")
    elif args.experiment != "all" and EXPERIMENTS[args.experiment].lambdas == 1 < (args.lambdas or 1):
        parser.error(f"argument --lambdas: {args.experiment} has one lambda per arm")
    return parser, args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; ``argv`` as on the command line, without the program's name."""
    parser, args = parsed(argv)
    if args.experiment != "page":
        dataset, settings, out = prepared(parser, args)
        if args.pretrain is not None:
            settings = replace(settings, pretrain_epochs=args.pretrain)
        if settings.pretrain_epochs:
            run_jobs(partial(pretrain, dataset, settings), range(args.seeds), args.workers, args.device, "l2")
    names = {"all": [*EXPERIMENTS], "page": []}.get(args.experiment, [args.experiment])
    for name in names:
        start = time.perf_counter()
        experiment = EXPERIMENTS[name]
        for arm, reason in left_out(name, settings).items():
            print(f"{name} is without {experiment.arms[arm].label}: {reason}.")
        todo = jobs(name, settings, args.seeds, args.lambdas)
        of_jobs = run_jobs(partial(work, name, dataset, settings), todo, args.workers, args.device, name)
        rows = [row for rows in of_jobs for row in rows]
        results = Results(rows, experiment.labels, settings.strength)
        write_results(name, results, settings, out)
        print(
            f"\n{plain(name, results)}\n\nwrote {out / name}-runs.csv, .csv, -settings.csv and .svg", end=" "
        )
        print(f"({time.perf_counter() - start:.0f} s)")
    if args.experiment in ("all", "page"):
        try:
            page = write_page(args.out)
        except FileNotFoundError as error:
            parser.exit(1, f"{parser.prog}: {error}\n")
        said = [verdicts(name, read_results(name, args.out)) for name in found(args.out)]
        print("\n\n".join([*said, f"wrote {page}"]))
    return 0
