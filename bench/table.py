"""One row of a table of measurements: how all rows are measured, summarised, shown and written."""

from __future__ import annotations

import csv
import json
import os
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
# What the files tell of every contender: its times, its ratio to the row's baseline, to torch's fused SGD and
# to a copy of the same bytes, which are in every run; its speed, counting only the bytes that must move; and
# what bench.counts finds.
NUMBERS = ("ms", "ms_low", "ms_high", "ratio", "ratio_low", "ratio_high", "to_fused_sgd", "to_copy")
COUNTS = ("percent_of_copy", "gb_per_s", "ops", "host_us", "extra_bytes")
FACTS = ("suite", "backend", "dtype", "elements", "tensors", "bytes", "cache", "runs")  # of every row
OURS = ("target", "launches")  # of the contender that the row is about, where there are any
WHEN = ("commit", "date")  # of measuring, in each row of a file that several runs may have written
NO_TIME = "no time was left"
# What there is not to know: a compiled step's operations pass by the dispatcher, "allowed" is but a time.
UNKNOWN = {"compiled": {"ops"}, "allowed": {"ops", "host_us", "extra_bytes"}}
MOVE_NOTHING = ("empty", "allowed", "python", "cpp")  # contenders that never touch the tensors' elements
NAMES = {  # of contenders, in the order of the bars
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
    """Results of all rows, the runs of one row far apart in time; nothing is begun after ``minutes``.

    A row that fails says so in its result and the others go on. ``save`` is called with all results whenever
    one is new: a process that is killed leaves what it has.
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

    results = {row.name: result(row, []) for row in rows}

    def keep(row: Row) -> None:
        results[row.name] = result(row, taken[row.name], errors.get(row.name))
        if save is not None:
            save(list(results.values()))

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
                    keep(row)
                bar.update()
    for row in rows:
        if row.facts is not None and taken[row.name] and row.name not in errors:
            row.note.update(attempt(row, row.facts, row.note, "facts_error") or {})
            keep(row)
    return list(results.values())


def earlier(name: str, folder: Path) -> Results:
    """The rows of the files of that name, if there are any; they name their commit and date from now on."""
    path = folder / f"{name}.json"
    if not path.exists():
        return []
    report = json.loads(path.read_text())
    return [{**{key: report["environment"][key] for key in WHEN}, **row} for row in report["results"]]


def merged(old: Results, new: Results) -> Results:
    """``new`` in the place of the rows of the same names; what there was no time for replaces nothing."""
    rows = {row["row"]: row for row in old}
    rows |= {row["row"]: row for row in new if row.get("error") != NO_TIME or row["row"] not in rows}
    return list(rows.values())


def of_suite(results: Results, *suites: str) -> Results:
    """The rows of these suites that went well or not; those that name none have targets: they are "core"."""
    return [r for r in results if r.get("suite", "core") in suites]


def measured(results: Results, suite: str) -> Results:
    """The rows of a suite that went well."""
    return [r for r in of_suite(results, suite) if "error" not in r]


def pictured(results: Results, name: str) -> dict[str, tuple[str, Results]]:
    """The plots of a report of that name, by file: the suite and its rows.

    On a GPU each backend has plots of its own but for the models, where they stand beside one another.
    """
    found: dict[str, tuple[str, Results]] = {}
    for suite in ("models", "grid", "scaling"):
        for result in measured(results, suite):
            backend = result.get("backend", "cpu")
            stem = name if suite == "models" or backend == "cpu" else f"{name}-{backend}"
            found.setdefault(f"{stem}-{suite}", (suite, []))[1].append(result)
    return found


def one_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def result(row: Row, runs: list[list[Times]], error: str | None = None) -> dict[str, Any]:
    """What the files hold of a row: numbers per contender, or why there are none."""
    note = {key: value for key, value in row.note.items() if key != "counts"}
    head = {"row": row.name, "baseline": row.baseline, "contender": row.contender}
    if error is not None or not runs:
        return {**head, **note, "error": error or NO_TIME}
    contenders = summarise(runs, row.baseline)
    for name, of in contenders.items():
        moves = 0 if name in MOVE_NOTHING else 1
        if "copy" in contenders:
            of["percent_of_copy"] = moves * 100 * contenders["copy"]["ms"] / of["ms"]
        if "bytes" in note:
            of["gb_per_s"] = moves * note["bytes"] / of["ms"] / 1e6
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


def holes(results: Results) -> list[str]:
    """A line for every row that was measured and lacks a number."""
    found = []
    for result in (r for r in results if "error" not in r):
        lacking = [key for key in FACTS if result.get(key) is None]
        for name, of in result["contenders"].items():
            keys = (key for key in (*NUMBERS, *COUNTS) if key not in UNKNOWN.get(name, ()))
            lacking += [f"{key} of {name}" for key in keys if of.get(key) is None]
        if lacking:
            found.append(f"{result['row']:34s} lacks {', '.join(lacking)}")
    return found


def tell(results: Results) -> bool:
    """Print the results; whether all went well and no number lacks."""
    lacking = holes(results)
    print(*map(line, results), *lacking, sep="\n")
    return not lacking and not any("error" in result for result in results)


def write(report: dict[str, Any], name: str, folder: Path = RESULTS, more: Sequence[str] = ()) -> None:
    """One set of files per kind of machine; the last run replaces the one before.

    ``more`` are further columns, of a contender or of its row. Each file is whole at all times.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{name}.part"
    part.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(part, folder / f"{name}.json")
    with open(part, "w", newline="") as file:
        others = {key: value for key, value in report.items() if key not in ("environment", "results")}
        for key, value in (report["environment"] | others).items():
            file.write(f"# {key}: {value}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("row", "contender", *NUMBERS, *COUNTS, "baseline", *FACTS, *OURS, *more))
        for result in report["results"]:
            for who, c in result.get("contenders", {}).items():
                numbers = [shown(c.get(key)) for key in (*NUMBERS, *COUNTS)]
                ours = [shown(result.get(key)) if who == result["contender"] else "" for key in OURS]
                facts = [shown(result.get(key)) for key in FACTS]
                rest = [shown(c.get(key, result.get(key))) for key in more]
                writer.writerow((result["row"], who, *numbers, result["baseline"], *facts, *ours, *rest))
    os.replace(part, folder / f"{name}.csv")


def read_csv(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """What ``write`` wrote: the environment, and a dict for each row and contender."""
    lines = path.read_text().splitlines()
    head = [line for line in lines if line.startswith("# ")]
    environment = dict(line.removeprefix("# ").split(": ", 1) for line in head)
    return environment, list(csv.DictReader(line for line in lines if line not in head))


def shown(value: Any) -> Any:
    """A cell: nothing where nothing is known, no more digits than matter."""
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else value
