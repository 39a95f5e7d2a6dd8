"""The rows of a table of measurements: how they are measured, summarised, shown and written."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .timing import Times, summarise

RESULTS = Path(__file__).parent / "results"
NO_TIME = "no time was left"
WHEN = ("commit", "date")  # keys of each row that say when it was measured
NAMES = {  # {contender: its name on pages}, in the order of tables and bars
    "copy": "a copy of the same bytes",
    "fused_sgd": "SGD, fused",
    "penalty": "SGD, fused, the penalty in the loss",
    "foreach": "SGD, foreach",
    "for_loop": "SGD, for-loop",
    "prox_sgd": "ProxSGD",
    "exact": "ProxSGD, exact",
    "vectorised": "foreach, by hand",
    "compiled": "torch.compile",
    "eager": "reference, eager",
    "pat": "torchao pat (group lasso)",
}
Measure = Callable[[], list[Times]]  # one run: sets of contenders that took turns
Results = list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One line of a table; its target, if any, is the greatest accepted ratio of contender to baseline.

    ``measure`` may add to ``note``, whose "counts" holds each contender's operations, memory and host time.
    ``facts`` is called once, after all timing, because profilers disturb it. ``runs`` is the most separated
    runs that the row takes part in.
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
    """Results of all rows. The runs of one row are far apart in time, and none begins after ``minutes``.

    A row that fails says so in its result and the others go on. ``save`` is called with all results whenever
    one is new, so that a process that is killed leaves what it has.
    """
    deadline = time.monotonic() + 60 * minutes
    taken: dict[str, list[list[Times]]] = {row.name: [] for row in rows}
    errors: dict[str, str] = {}
    results = {row.name: result(row, []) for row in rows}

    def attempt(row: Row, action: Callable[[], Any], failed: dict[str, Any], key: str) -> Any:
        try:
            return action()
        except Exception as error:
            print(f"{row.name}\n{traceback.format_exc()}", file=sys.stderr)
            failed[key] = one_line(error)

    def keep(row: Row) -> None:
        results[row.name] = result(row, taken[row.name], errors.get(row.name))
        if save is not None:
            save(list(results.values()))

    for run in range(runs):
        for row in (row for row in rows if row.runs is None or run < row.runs):
            if row.name not in errors and time.monotonic() < deadline:
                print(f"run {run + 1} of {runs}: {row.name}", file=sys.stderr)
                times = attempt(row, row.measure, errors, row.name)
                if times is not None:
                    taken[row.name].append(times)
                keep(row)
    for row in rows:
        if row.facts is not None and taken[row.name] and row.name not in errors:
            row.note.update(attempt(row, row.facts, row.note, "facts_error") or {})
            keep(row)
    return list(results.values())


def result(row: Row, runs: list[list[Times]], error: str | None = None) -> dict[str, Any]:
    """A row's entry in the files: numbers per contender, or the reason why there are none."""
    note = {key: value for key, value in row.note.items() if key != "counts"}
    head = {"row": row.name, "baseline": row.baseline, "contender": row.contender}
    if error is not None or not runs:
        return {**head, **note, "error": error or NO_TIME}
    contenders = summarise(runs, row.baseline)
    for name, of in contenders.items():
        of |= row.note.get("counts", {}).get(name, {})
    if row.target is None:
        met = target = None
    else:
        met, target = contenders[row.contender]["ratio"] <= row.target, round(row.target, 3)
    return {**head, "target": target, "met": met, **note, "runs": len(runs), "contenders": contenders}


def percent_of_copy(result: dict[str, Any]) -> float | None:
    """The speed of the row's contender, counting only the bytes that must move."""
    copy, own = (result["contenders"].get(name) for name in ("copy", result["contender"]))
    return 100 * copy["ms"] / own["ms"] if copy else None


def one_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def line(result: dict[str, Any]) -> str:
    """One result as the terminal shows it."""
    if "error" in result:
        return f"{result['row']:34s} {result['error']}"
    own, baseline = result["contender"], result["baseline"]
    best = result["contenders"][own]
    spread = f"[{best['ratio_low']:.2f}, {best['ratio_high']:.2f}]"
    said = [f"{result['row']:34s} {best['ms']:8.3f} ms = {best['ratio']:.3f} {baseline} {spread}"]
    others = result["contenders"].keys() - {own, baseline}
    said += [f"{name} {result['contenders'][name]['ratio']:.2f}" for name in sorted(others)]
    more = (key for key in result if key in ("target", "launches") or key.endswith("_error"))
    return "; ".join([*said, *(f"{key} {result[key]}" for key in more if result[key] is not None)])


def of_suite(results: Results, *suites: str, failed: bool = False) -> Results:
    """The rows of these suites, without failed ones unless ``failed``; rows that name no suite are "core"."""
    return [r for r in results if r.get("suite", "core") in suites and (failed or "error" not in r)]


def bars(results: Results) -> dict[str, dict[str, float]]:
    """Milliseconds by model and by contender; a contender measured beside several backends appears once."""
    dtypes, backends = ({r.get(key) for r in results} for key in ("dtype", "backend"))
    found: dict[str, dict[str, float]] = {}
    for name, text in NAMES.items():
        for r in (r for r in results if name in r["contenders"]):
            title = r["workload"] + (f" {r['dtype']}" if len(dtypes) > 1 else "")
            label = text + (f", {r['backend']}" if name == "prox_sgd" and len(backends) > 1 else "")
            found.setdefault(title, {}).setdefault(label, r["contenders"][name]["ms"])
    return found


def write(report: dict[str, Any], path: Path) -> None:
    """Replaces a file in one step, so that a reader never finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(part, path)


def earlier(path: Path) -> Results:
    """The rows of a file, if it exists, each with its commit and date."""
    if not path.exists():
        return []
    report = json.loads(path.read_text())
    return [{**{key: report["environment"][key] for key in WHEN}, **row} for row in report["results"]]


def merged(old: Results, new: Results) -> Results:
    """Replaces rows of the same name by new ones, except new rows that there was no time to measure."""
    rows = {row["row"]: row for row in old}
    rows |= {row["row"]: row for row in new if row.get("error") != NO_TIME or row["row"] not in rows}
    return list(rows.values())


def arguments(program: str, about: str | None, runs: int, minutes: float) -> argparse.ArgumentParser:
    """The arguments that all programs take."""
    parser = argparse.ArgumentParser(prog=program, description=about)
    parser.add_argument("--only", default="", help="run the rows whose names contain this, and write nothing")
    parser.add_argument("--runs", type=int, default=runs, help="separated runs per row (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=minutes, help="begin no row later (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the files (default %(default)s)")
    parser.add_argument("--commit", help="commit that was measured, if git cannot tell")
    return parser


def run(
    rows: Sequence[Row],
    name: str,
    environment: dict[str, Any],
    options: argparse.Namespace,
    keep: bool = False,
) -> bool:
    """Measure the rows, write the file of that name and draw it. Returns whether no row failed.

    With ``keep`` the file's other rows stay. Each row records when it was measured.
    """
    rows, path = [row for row in rows if options.only in row.name], options.out / f"{name}.json"
    old = earlier(path) if keep else []
    for row in rows:
        row.note.update({key: environment[key] for key in WHEN})

    def save(results: Results) -> None:
        if not options.only:
            write({"environment": environment, "results": merged(old, results)}, path)

    results = measure(rows, options.runs, options.minutes, save)
    print(*map(line, results), sep="\n")
    if importlib.util.find_spec("matplotlib") and not options.only:
        from . import plots

        plots.draw(merged(old, results), name, options.out)
    return bool(results) and not any("error" in result for result in results)
