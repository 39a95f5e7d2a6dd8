"""The command: train every method, print the table, the speed and the claims, write the figures."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .claims import claims
from .data import FOLDS, LOADERS, Images
from .results import runs_csv, summarise, table
from .speed import measure, speed_csv, speed_table
from .training import METHODS, OPTIMIZERS, Job, Run, Settings, train_all

SETTINGS = {"digits": Settings(), "mnist": Settings(epochs=5, batch=128)}
EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def device(text: str) -> str:
    try:
        torch.zeros(1, device=text).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"expected one of this machine, got {text!r}: {reason}") from None
    return text


def cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def build_parser() -> argparse.ArgumentParser:
    """Every option of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m cges_kernels.demo",
        description="Train a small LeNet with ProxSGD or ProxAdamW under the six methods of the CGES thesis "
        "(l2, l1, group sparsity by filter and by feature, exclusive sparsity, CGES), each at some "
        "strengths. Print accuracy, nonzeros, FLOPs, the time per optimizer step, and which of the thesis's "
        "claims hold here; write figures and CSV.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    epochs = ", ".join(f"{settings.epochs} for {name}" for name, settings in SETTINGS.items())
    whole: dict[str, Any] = dict(type=at_least_one, metavar="N")
    add = parser.add_argument
    add("--data", choices=LOADERS, default="digits", help="mnist is downloaded from openml.org")
    add("--optimizer", choices=OPTIMIZERS, default="sgd", help="ProxSGD or ProxAdamW")
    add("--device", type=device, default="cpu", help="to train on: cpu, cuda, cuda:1, ...")
    add("--seeds", default=3, help="repetitions; five are the folds of one shuffle", **whole)
    add("--lambdas", default=5, help="strengths per method", **whole)
    add("--epochs", default=argparse.SUPPRESS, help=f"over the training fold (default: {epochs})", **whole)
    add("--workers", default=cores(), help="processes of one thread each", **whole)
    add("--out", type=Path, default=Path("demo_out"), metavar="DIR", help="where figures and CSV go")
    return parser


def _check_extras(parser: argparse.ArgumentParser) -> None:
    missing = [package for module, package in EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        parser.exit(1, f"the demo needs {', '.join(missing)}: pip install cges_kernels[demo]\n")


def _train(jobs: list[Job], images: Images, settings: Settings, workers: int) -> list[Run]:
    """The runs in the order of ``jobs``, with a progress bar."""
    from tqdm import tqdm

    finished = train_all(jobs, images, settings, min(workers, len(jobs)))
    seconds = 0.1 if sys.stderr.isatty() else 20  # a log wants few lines
    bar = tqdm(finished, desc="training", unit="run", total=len(jobs), mininterval=seconds)
    runs = {run.job: run for run in bar}
    return [runs[job] for job in jobs]


def _write(out: Path, runs: Sequence[Run], texts: dict[str, str]) -> None:
    """All files into a folder of their own first: a half-written one never replaces a good one."""
    from .figures import write_figures

    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=out) as name:
        unfinished = Path(name)
        for file, text in texts.items():
            (unfinished / file).write_text(text, encoding="utf-8")
        write_figures(runs, unfinished)
        for path in sorted(unfinished.iterdir()):
            os.replace(path, out / path.name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; ``argv`` as on the command line, without the program's name."""
    parser = build_parser()
    args = parser.parse_args(argv)
    _check_extras(parser)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        parser.error(f"argument --out: expected a folder to write to, got {str(args.out)!r}: {error}")
    start = time.perf_counter()
    try:
        images = LOADERS[args.data]()
    except ConnectionError as error:
        parser.exit(1, f"{parser.prog}: --data {args.data}: {error}\n")
    settings = replace(SETTINGS[args.data], device=args.device, optimizer=args.optimizer)
    settings = replace(settings, epochs=vars(args).get("epochs", settings.epochs))
    jobs = [
        Job(key, lam, seed)
        for seed in range(args.seeds)
        for key, method in METHODS.items()
        for lam in method.lambdas(args.lambdas, settings.training.times)
    ]
    runs = _train(jobs, images, settings, args.workers)
    timings = measure(images.size, args.device, args.optimizer)
    title = (
        f"LeNet on {args.data} with {settings.training.proximal.__name__}: {settings.epochs} epochs on one "
        f"of {FOLDS} folds, tested on the others; mean ± standard error of {args.seeds} repetitions"
    )
    text = "\n\n".join([title, table(summarise(runs)), speed_table(timings, args.optimizer), claims(runs)])
    _write(
        args.out,
        runs,
        {"summary.txt": f"{text}\n", "runs.csv": runs_csv(runs), "speed.csv": speed_csv(timings)},
    )
    print(f"\n{text}\n\nFigures and CSV: {args.out}/ ({time.perf_counter() - start:.0f} s)")
    return 0
