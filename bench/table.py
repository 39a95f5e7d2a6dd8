"""One row of a table of measurements: how all rows are measured, summarised, shown and written."""

from __future__ import annotations

import csv
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .timing import Times, summarise

RESULTS = Path(__file__).parent / "results"
NUMBERS = ("ms", "ratio", "ratio_low", "ratio_high")
FACTS = ("percent_of_copy", "launches")  # columns of the CSV, where a row knows them
Measure = Callable[[], list[Times]]  # one run: sets of contenders that took turns, the baseline in each
Results = list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One line of the table; the target, if any, is ``contender``'s ratio to ``baseline``.

    ``measure`` may add to ``note``; ``facts`` are found out once after all timing, as profilers disturb it.
    """

    name: str
    baseline: str
    contender: str
    target: float | None
    measure: Measure
    note: dict[str, Any] = field(default_factory=dict)
    facts: Callable[[], dict[str, Any]] | None = None


def measure(
    rows: Sequence[Row], runs: int, minutes: float = 60.0, save: Callable[[Results], None] | None = None
) -> Results:
    """Results of all rows, the runs of one row far apart in time; ``save`` is called after each round.

    A row that fails says so in its result and the others go on; nothing is begun after ``minutes``.
    """
    deadline = time.monotonic() + 60 * minutes
    taken: dict[str, list[list[Times]]] = {row.name: [] for row in rows}
    errors: dict[str, str] = {}

    def attempt(row: Row, action: Callable[[], Any], failed: dict[str, Any], key: str) -> Any:
        try:
            return action()
        except Exception as error:
            tqdm.write(f"{row.name}\n{traceback.format_exc()}", file=sys.stderr)
            failed[key] = one_line(error)

    def results() -> Results:
        return [result(row, taken[row.name], errors.get(row.name)) for row in rows]

    with tqdm(total=runs * len(rows), file=sys.stderr) as bar:
        for _ in range(runs):
            for row in rows:
                if row.name not in errors and time.monotonic() < deadline:
                    bar.set_description(row.name)
                    times = attempt(row, row.measure, errors, row.name)
                    if times is not None:
                        taken[row.name].append(times)
                bar.update()
            if save is not None:
                save(results())
    for row in rows:
        if row.facts is not None and taken[row.name] and row.name not in errors:
            row.note.update(attempt(row, row.facts, row.note, "facts_error") or {})
    if save is not None:
        save(results())
    return results()


def one_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def result(row: Row, runs: list[list[Times]], error: str | None = None) -> dict[str, Any]:
    """What the files hold of a row: numbers per contender, or why there are none."""
    head = {"row": row.name, "baseline": row.baseline, "contender": row.contender}
    if error is not None or not runs:
        return {**head, **row.note, "error": error or "no time was left"}
    contenders = summarise(runs, row.baseline)
    best = contenders[row.contender]
    head["target"] = None if row.target is None else round(row.target, 3)
    head["met"] = None if row.target is None else best["ratio"] <= row.target
    if "copy" in contenders:
        head["percent_of_copy"] = 100 * contenders["copy"]["ms"] / best["ms"]
    return {**head, **row.note, "runs": len(runs), "contenders": contenders}


def line(result: dict[str, Any]) -> str:
    """One result as the terminal shows it."""
    if "error" in result:
        return f"{result['row']:34s} {result['error']}"
    best = result["contenders"][result["contender"]]
    others = {
        name: c
        for name, c in result["contenders"].items()
        if name not in (result["contender"], result["baseline"])
    }
    target = "" if result["target"] is None else f", target {result['target']:.2f}"
    extra = [f"{name}={c['ratio']:.2f}x" for name, c in others.items()]
    extra += [f"{key}={value:.1f}" for key, value in result.items() if key.startswith("percent")]
    said = ("launches", *(key for key in result if key.endswith("_error")))
    extra += [f"{key}={result[key]}" for key in said if key in result]
    return (
        f"{result['row']:34s} {result['contender']:>9s} {best['ms']:8.3f} ms = {best['ratio']:.3f}x "
        f"{result['baseline']} [{best['ratio_low']:.2f}, {best['ratio_high']:.2f}]{target}  {' '.join(extra)}"
    )


def write(report: dict[str, Any], name: str, folder: Path = RESULTS) -> None:
    """One set of files per kind of machine; the last run replaces the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("row", "contender", *NUMBERS, "baseline", "target", *FACTS))
        for result in report["results"]:
            for name, c in result.get("contenders", {}).items():
                known: Sequence[Any] = [""] * (1 + len(FACTS))
                if name == result["contender"]:
                    known = [result["target"], *(result.get(fact, "") for fact in FACTS)]
                row = (result["row"], name, *(f"{c[k]:.4f}" for k in NUMBERS), result["baseline"], *known)
                writer.writerow(row)
