"""The results of a folder as a page of Markdown, and an experiment's as plain text."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from cges_kernels.reporting.explain import Table
from cges_kernels.reporting.files import write_text

from ..common.results import Results
from ..common.training import SETTINGS, Settings
from .experiments import EXPERIMENTS
from .files import found, read_results
from .sections import SECTIONS, table

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "claims.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def markdown(paragraph: str | Table) -> str:
    if isinstance(paragraph, str):
        return paragraph
    lines = [paragraph.header, ["---"] * len(paragraph.header), *paragraph.rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def verdicts(name: str, results: Results) -> str:
    """An experiment's claims and whether they held, for the terminal."""
    claims = [f"- {claim}: {verdict}" for claim, verdict in SECTIONS[name](results).claims.items()]
    parts = [f"{EXPERIMENTS[name].title} ({results.told})", *results.caution, *claims]
    return "\n".join(textwrap.fill(part, 110, subsequent_indent="  ") for part in parts)


def plain(name: str, results: Results) -> str:
    """The whole section of an experiment, for the terminal."""
    paragraphs = SECTIONS[name](results).paragraphs
    shown = (textwrap.fill(part, 110) if isinstance(part, str) else str(part) for part in paragraphs)
    return "\n\n".join([verdicts(name, results), *shown]).replace("**", "")


def measured(folder: Path, links_from: Path, names: Sequence[str] = tuple(EXPERIMENTS)) -> str:
    """The claims and whether they held in short, then each experiment: what it was of, and what came out."""
    claims, parts = [], []
    for name in names:
        experiment, results = EXPERIMENTS[name], read_results(name, folder)
        section = SECTIONS[name](results)
        title = experiment.title.partition(":")[0]
        claims += [[title, claim, verdict] for claim, verdict in section.claims.items()]
        told = f"`python -m examples.thesis {name}` measured this: {results.told}."
        picture = Path(os.path.relpath(folder, links_from), f"{name}.svg").as_posix()
        shown = [*results.caution, *map(markdown, section.paragraphs)]
        parts += [f"## {experiment.title}", told, *shown, f"![{experiment.title}]({picture})"]
    return "\n\n".join(["## In short", markdown(table(["", "claim", "here"], claims)), *parts])


def recipe() -> str:
    """What every kind of data is trained with by default, and what of it the thesis does not have."""

    def rate(of: Settings) -> str:
        return f"{of.lr:g}, " + (f"times 0.9 every {of.lr_decay:,} steps" if of.lr_decay else "cosine to 0")

    def before(of: Settings) -> str:
        epochs = of.pretrain_epochs
        return f"l2, {epochs} epochs from lr {of.pretrain_lr:g}" if epochs else "none"

    lines = {
        "network (`--net`)": lambda of: of.net,
        "epochs (`--epochs`)": lambda of: str(of.epochs),
        "batch": lambda of: str(of.batch),
        "learning rate": rate,
        "momentum (the thesis names none)": lambda of: f"{of.momentum:g}",
        "warm-up of the penalty (the thesis names none)": lambda of: f"{of.warmup:.0%} of the steps",
        "every λ times (`--strength`)": lambda of: f"{of.strength:g}",
        "pretraining (`--pretrain`)": before,
    }
    rows = [[label, *map(cell, SETTINGS.values())] for label, cell in lines.items()]
    return markdown(table(["", *SETTINGS], rows))


def with_measured(text: str) -> str:
    """The text of docs/claims.md with its measurements made anew."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    parts = [measured(RESULTS, PAGE.parent), "## The recipe", recipe()]
    return f"{before}{BEGIN}\n" + "\n\n".join(parts) + f"\n{END}{after}"


def write_page(folder: Path) -> Path:
    """Write the page of a folder's results, and return where: docs/claims.md for the committed ones.

    Raises:
        FileNotFoundError: no results lie in the folder.
    """
    if folder.resolve() == RESULTS.resolve():
        write_text(PAGE, with_measured(PAGE.read_text(encoding="utf-8")))
        return PAGE
    names = found(folder)
    if not names:
        raise FileNotFoundError(f"{folder}: expected results, such as fig3-runs.csv; found none")
    text = f"# What was measured in {folder.name}\n\n{measured(folder, folder, names)}\n"
    write_text(folder / "claims.md", text)
    return folder / "claims.md"
