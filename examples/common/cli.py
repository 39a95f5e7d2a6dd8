"""The code that the commands share: their options, their preparations, and how they write files."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import torch
from matplotlib.figure import Figure

from .data import LOADERS, DataError, Dataset, load
from .networks import NETS
from .training import SETTINGS, Settings


def at_least(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return int(text)

    return whole


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def device(text: str) -> str:
    try:
        torch.zeros(1, device=text).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"expected one of this machine, got {text!r}: {reason}") from None
    return text


WHOLE: dict[str, Any] = dict(type=at_least(1), metavar="N")  # an option's


def parser_of(prog: str, description: str, out: str) -> argparse.ArgumentParser:
    """A parser with the options that all commands have; ``out`` is the folder to write to by default."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=description, formatter_class=formatter)
    add = parser.add_argument
    add("--data", choices=LOADERS, default="digits", help="what to train on (default: digits)")
    path = "folder of MNIST or CIFAR, which are downloaded there if need be, or of images by class"
    add("--path", type=Path, metavar="DIR", help=path)
    add("--size", help="side of a folder's images (default: 32)", **WHOLE)
    add("--net", choices=NETS, help="(default: lenet for digits and folder, mnist, wrn-16-10 for CIFAR)")
    folds = "on data without a test set, as the digits, these are five folds, and 6 to 10 another shuffle's"
    add("--seeds", default=5, help=f"repetitions (default: 5; {folds})", **WHOLE)
    add("--epochs", help="(default: digits 40, folder 60, others 50)", **WHOLE)
    add("--strength", type=positive, metavar="X", help="times every lambda (default: 1, for digits 1.3)")
    add("--device", type=device, default="cpu", help="to train on: cpu, cuda, cuda:1, ... (default: cpu)")
    workers = "processes of one thread each (default: the cores)"
    add("--workers", default=joblib.cpu_count(), help=workers, **WHOLE)
    where = "where CSV and figures go; those of an earlier run are replaced"
    add("--out", type=Path, default=Path(out), metavar="DIR", help=f"{where} (default: {out})")
    return parser


def prepared(parser: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[Dataset, Settings, Path]:
    """The data, the settings, and the folder to write to."""
    if args.size and args.data != "folder":
        parser.error("argument --size: only --data folder takes it")
    out = args.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        parser.error(f"argument --out: expected a folder to write to, got {str(out)!r}: {error}")
    try:
        dataset = load(args.data, args.path, args.size or 32)
    except DataError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    given = {key: getattr(args, key) for key in ("net", "epochs", "strength") if getattr(args, key)}
    settings = replace(SETTINGS[args.data], data=args.data, device=args.device, pretrained=out, **given)
    return dataset, settings, out


def write(out: Path, texts: Mapping[str, str], figures: Mapping[str, Figure]) -> None:
    """Writes files by name. All are written elsewhere first, so that no partial file replaces a good one."""
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=out) as folder:
        for name, text in texts.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        for name, figure in figures.items():
            figure.savefig(Path(folder, name), metadata={"Date": None} if name.endswith(".svg") else None)
        for path in sorted(Path(folder).iterdir()):
            os.replace(path, out / path.name)
