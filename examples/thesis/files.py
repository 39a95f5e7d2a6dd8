"""The files of an experiment: NAME-runs.csv, NAME.csv, NAME-settings.csv and NAME.svg."""

from __future__ import annotations

import csv
from dataclasses import asdict
from pathlib import Path

import matplotlib

from cges_kernels.reporting.files import as_csv

from ..common.cli import write
from ..common.figures import RC
from ..common.results import Results, read_runs
from ..common.training import Settings
from . import figures
from .experiments import EXPERIMENTS

OF_THE_MACHINE = ("device", "pretrained")  # settings that say nothing of the results


def write_results(name: str, results: Results, settings: Settings, out: Path) -> None:
    """Every run, means and intervals over seeds, what all runs share, and the figure."""
    shared = {key: value for key, value in asdict(settings).items() if key not in OF_THE_MACHINE}
    texts = {
        f"{name}-runs.csv": results.runs_csv(),
        f"{name}.csv": results.summary_csv(),
        f"{name}-settings.csv": as_csv(list(shared), [list(shared.values())]),
    }
    with matplotlib.rc_context(RC):
        write(out, texts, {f"{name}.svg": figures.draw(name, results)})


def read_results(name: str, folder: Path) -> Results:
    """What :func:`write_results` wrote."""
    with (folder / f"{name}-settings.csv").open(newline="", encoding="utf-8") as file:
        (settings,) = csv.DictReader(file)
    rows = read_runs(folder / f"{name}-runs.csv")
    return Results(rows, EXPERIMENTS[name].labels, float(settings["strength"]))


def found(folder: Path) -> list[str]:
    """The experiments whose results lie in the folder."""
    return [name for name in EXPERIMENTS if (folder / f"{name}-runs.csv").exists()]
