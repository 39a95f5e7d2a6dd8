"""The command: train what an experiment compares, write CSV and figures."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cges_kernels.demo.cli import at_least_one, cores, device
from cges_kernels.demo.training import in_workers
from cges_kernels.reporting.files import replacing, write_text

from . import page
from .data import LOADERS, DataError, Dataset, load
from .experiments import EXPERIMENTS, Job, Row, jobs_of, pretraining, work
from .networks import NETS
from .results import RESULTS, runs_csv, summary_csv
from .training import Settings

SETTINGS = {
    # A third of the demo's epochs, so thresholds are applied a third as often. At this strength its ranges of
    # lambda go from nearly dense to where accuracy suffers here too; at twice theirs most end in chance.
    "digits": Settings(strength=1.3),
    # The thesis's: 30,000 steps; it names neither momentum nor a warm-up.
    "mnist": Settings(net="mnist", epochs=50, batch=100, momentum=0, lr_decay=5000, warmup=0),
    "cifar10": Settings(net="wrn-16-10", epochs=50, batch=128, lr=0.01, pretrain_epochs=200),
    "cifar100": Settings(net="wrn-16-10", epochs=50, batch=128, lr=0.01, pretrain_epochs=200),
    "folder": Settings(epochs=60, batch=64),
}
SEEDS = 5
DESCRIPTION = """\
The thesis's experiments with ProxSGD:

{}
  all          every one of them, and the page
  page         write docs/claims.md from the results

Writes NAME-runs.csv (every run), NAME.csv (means and 95% intervals over seeds), NAME.png and NAME.svg.
Takes minutes on two cores with the digits; MNIST and CIFAR want a GPU (--device). The ranges of lambda were
found on the digits: for other data see --strength. ImageNet (the thesis's Table 1) is not reproduced here:
--data folder takes any folder of images, ImageNet's too, and brings them to --size."""
EXTRAS = {
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
}


def positive(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """Every option of the command."""
    titles = "\n".join(f"  {name:<13}{experiment.title}" for name, experiment in EXPERIMENTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy",
        description=DESCRIPTION.format(titles),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole = dict(type=at_least_one, metavar="N")
    add = parser.add_argument
    add("experiment", choices=[*EXPERIMENTS, "all", "page"])
    add("--data", choices=LOADERS, default="digits", help="(default: digits)")
    add(
        "--path",
        type=Path,
        metavar="DIR",
        help="folder with MNIST's idx files (without: openml.org), CIFAR's python pickles or images by class",
    )
    add("--size", default=32, help="side of a folder's images (default: 32)", **whole)
    add("--net", choices=NETS, help="(default: lenet for digits and folder, mnist, wrn-16-10 for CIFAR)")
    add("--seeds", default=SEEDS, help=f"repetitions (default: {SEEDS}, on digits the five folds)", **whole)
    add("--lambdas", help="strengths per arm (default: the experiment's)", **whole)
    add("--epochs", help="(default: digits 40, folder 60, others 50)", **whole)
    add("--pretrain", help="epochs with l2 that fine-tuning starts from (default: 200 for CIFAR)", **whole)
    add("--strength", type=positive, metavar="X", help="times every lambda (default: 1, for digits 1.3)")
    add("--device", type=device, default="cpu", help="to train on (default: cpu)")
    add("--jobs", default=cores(), help="processes of one thread each (default: the cores)", **whole)
    add("--out", type=Path, metavar="DIR", help="(default: for digits bench/results/accuracy)")
    return parser


def run(
    names: Sequence[str], dataset: Dataset, settings: Settings, args: argparse.Namespace, out: Path
) -> None:
    """Each experiment's files are written when all its runs are done."""
    shared = (dataset, settings, out)
    _work(pretraining(settings, args.seeds), shared, "l2", args.jobs)
    for name in names:
        start = time.perf_counter()
        found = _work(jobs_of(name, settings, args.seeds, args.lambdas), shared, name, args.jobs)
        facts = {"data": settings.data, "net": settings.net, "epochs": settings.epochs}
        write(name, [{**facts, **row} for row in found], out)
        print(f"{out / name}.csv, -runs.csv, .png, .svg ({time.perf_counter() - start:.0f} s)")


def _work(jobs: Sequence[Job], shared: tuple[Dataset, Settings, Path], name: str, workers: int) -> list[Row]:
    """The rows in the order of the jobs, with a progress bar."""
    from tqdm import tqdm

    if not jobs:
        return []
    finished = in_workers(_numbered, list(enumerate(jobs)), shared, shared[1].device, min(workers, len(jobs)))
    seconds = 0.1 if sys.stderr.isatty() else 20  # a log wants few lines
    found = dict(tqdm(finished, desc=name, unit="run", total=len(jobs), mininterval=seconds))
    return [row for i in range(len(jobs)) for row in found[i]]


def _numbered(job: tuple[int, Job], *shared: object) -> tuple[int, list[Row]]:
    return job[0], work(job[1], *shared)


def write(name: str, rows: Sequence[Row], out: Path) -> None:
    """All is made before anything is replaced."""
    from .figures import draw

    texts = {f"{name}-runs.csv": runs_csv(rows), f"{name}.csv": summary_csv(name, rows)}
    pictures = draw(name, rows)
    for file, text in texts.items():
        write_text(out / file, text)
    for form, content in pictures.items():
        with replacing(out / f"{name}.{form}") as path:
            path.write_bytes(content)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; ``argv`` as on the command line, without the program's name."""
    parser = build_parser()
    args = parser.parse_args(argv)
    missing = [package for module, package in EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        parser.exit(1, f"{parser.prog} needs {', '.join(missing)}: pip install {' '.join(missing)}\n")
    if args.experiment == "page":
        page.main()
        return 0
    if args.data == "digits" and args.path:
        parser.error("argument --path: the digits come with scikit-learn, expected none")
    out = args.out or (RESULTS if args.data == "digits" else Path("accuracy_out") / args.data)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        parser.error(f"argument --out: expected a folder to write to, got {str(out)!r}: {error}")
    try:
        dataset = load(args.data, args.path, args.size)
    except DataError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    given = {key: getattr(args, key) for key in ("net", "epochs", "strength") if getattr(args, key)}
    settings = replace(SETTINGS[args.data], data=args.data, device=args.device, **given)
    if args.pretrain:
        settings = replace(settings, pretrain_epochs=args.pretrain)
    names = list(EXPERIMENTS) if args.experiment == "all" else [args.experiment]
    run(names, dataset, settings, args, out)
    if args.experiment == "all" and out == RESULTS:
        page.main()
    return 0
