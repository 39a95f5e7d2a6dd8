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
NUMBERS = ("ms", "ms_low", "ms_high", "ratio", "ratio_low", "ratio_high")
COUNTS = ("percent_of_copy", "gb_per_s", "ops", "extra_bytes")  # of a contender, where they are known
FACTS = ("target", "launches", "elements", "tensors", "bytes", "suite", "cache")  # of a row, likewise
NAMES = {  # of contenders, in the order of the bars
    "copy": "a copy of the same bytes",
    "fused_sgd": "SGD, fused",
    "foreach": "SGD, foreach",
    "for_loop": "SGD, for-loop",
    "prox_sgd": "ProxSGD",
    "vectorised": "foreach, by hand",
    "compiled": "torch.compile",
    "eager": "reference, eager",
    "pat": "torchao pat (group lasso)",
}
Measure = Callable[[], list[Times]]  # one run: sets of contenders that took turns, the baseline in each
Results = list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One line of the table; the target, if any, is ``contender``'s ratio to ``baseline``.

    ``measure`` may add to ``note``; ``facts`` are found out once after all timing, as profilers disturb it.
    Of the note, "bytes" are those that must move, and "counts" holds what is known of each contender.
    ``runs`` is the most of separated runs that the row takes part in.
    """

    name: str
    baseline: str
    contender: str
    target: float | None
    measure: Measure
    note: dict[str, Any] = field(default_factory=dict)
    facts: Callable[[], dict[str, Any]] | None = None
    runs: int | None = None


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

    def due(run: int) -> list[Row]:
        return [row for row in rows if row.runs is None or run < row.runs]

    with tqdm(total=sum(len(due(run)) for run in range(runs)), file=sys.stderr) as bar:
        for run in range(runs):
            for row in due(run):
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


def of_suite(results: Results, suite: str) -> Results:
    """The rows of a suite that went well."""
    return [r for r in results if r.get("suite") == suite and "error" not in r]


def one_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def result(row: Row, runs: list[list[Times]], error: str | None = None) -> dict[str, Any]:
    """What the files hold of a row: numbers per contender, or why there are none."""
    note = {key: value for key, value in row.note.items() if key != "counts"}
    head = {"row": row.name, "baseline": row.baseline, "contender": row.contender}
    if error is not None or not runs:
        return {**head, **note, "error": error or "no time was left"}
    contenders = summarise(runs, row.baseline)
    for name, of in contenders.items():
        if "copy" in contenders:
            of["percent_of_copy"] = 100 * contenders["copy"]["ms"] / of["ms"]
        if "bytes" in note:
            of["gb_per_s"] = note["bytes"] / of["ms"] / 1e6
        of |= row.note.get("counts", {}).get(name, {})
    best = contenders[row.contender]
    head["target"] = None if row.target is None else round(row.target, 3)
    head["met"] = None if row.target is None else best["ratio"] <= row.target
    if "copy" in contenders:
        head["percent_of_copy"] = best["percent_of_copy"]
    return {**head, **note, "runs": len(runs), "contenders": contenders}


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
        writer.writerow(("row", "contender", *NUMBERS, *COUNTS, "baseline", *FACTS))
        for result in report["results"]:
            for name, c in result.get("contenders", {}).items():
                numbers = [f"{c[k]:.4f}" for k in NUMBERS]
                counts = [shown(c.get(k)) for k in COUNTS]
                facts = [shown(result.get(fact)) if name == result["contender"] else "" for fact in FACTS]
                writer.writerow((result["row"], name, *numbers, *counts, result["baseline"], *facts))


def shown(value: Any) -> Any:
    """A cell: nothing where nothing is known, no more digits than matter."""
    if value is None:
        return ""
    return round(value, 3) if isinstance(value, float) else value
