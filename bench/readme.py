"""Writes the README's tables of measurements from bench/results: ``python -m bench.readme``."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import core
from .table import NAMES, RESULTS, Results, Row, measured, of_suite, pictured

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
BASELINES = {
    "fused_sgd": "torch's fused SGD",
    "fused_adamw": "torch's fused AdamW",
    "sequential": "sequential mode",
    "python": "the same in Python",
    "copy": "a copy",
    "allowed": "an empty step and 20 µs",
}
OTHERS = {
    "eager": "the eager reference",
    "compiled": "torch.compile of it",
    "vectorised": "it in foreach by hand",
    "pat": "torchao's pat (group lasso)",
    "foreach": "foreach SGD",
}
COUNTED: dict[str, tuple[str, Callable[[float], str]]] = {  # columns' titles and how cells are written
    "ops": ("operations", str),
    "extra_bytes": ("extra memory", lambda bytes: f"{bytes / 2**20:.1f} MiB"),
    "host_us": ("host time", lambda us: f"{us / 1e3:.3g} ms"),
}
HOST = ", host time what it costs on one thread with one element in the place of each tensor"
Report = dict[str, Any]


def spread(contender: dict[str, float]) -> str:
    return f"{contender['ratio']:.2f} [{contender['ratio_low']:.2f}, {contender['ratio_high']:.2f}]"


def cpu_measured(report: Report) -> str:
    """Of which machine, commit and day a report is, and what memory steps took there."""
    env, memory = report["environment"], report["peak_extra_memory"]
    taken = ", ".join(f"{size / 2**20:.2f} ({name})" for name, size in memory.items())
    return (
        f"{machine(report)}, {env['threads']} threads, L2 of {env['l2_bytes'] / 2**20:.0f} MiB a core, torch "
        f"{env['torch']} ({env['capability']}): measured on {env['date']} at commit {env['commit']}, medians "
        f"of {env['runs']} separated runs. MiB of memory a thread that the first steps took, by feature: "
        f"{taken}."
    )


def machine(report: Report) -> str:
    """A processor's name without what says nothing: "Intel Xeon"."""
    return re.sub(r"\((R|TM)\)| (CPU|Processor)\b.*", "", report["environment"]["cpu"])


def cpu_table(reports: Sequence[Report], rows: Sequence[Row]) -> str:
    """Markdown: one line per row, a ratio for each machine beside today's target, misses marked."""
    columns = [
        f"{machine(report)}, {what}" for report in reports for what in ("ms", "ratio [lowest, highest run]")
    ]
    lines = [
        f"| workload | ratio to | target | {' | '.join(columns)} | eager reference |",
        f"|---|---|---:|{'---:|' * (len(columns) + 1)}",
    ]
    for row in rows:
        cells, eager = [], []
        for report in reports:
            result = next((r for r in of_suite(report["results"], "core") if r["row"] == row.name), None)
            cells += cpu_cells(result, row.target)
            if result is not None and "eager" in result.get("contenders", {}):
                eager.append(f"{result['contenders']['eager']['ratio']:.1f}")
        target = "" if row.target is None else f"{row.target:.2f}"
        last = ", ".join(eager)
        lines.append(f"| {row.name} | {BASELINES[row.baseline]} | {target} | {' | '.join(cells)} | {last} |")
    return "\n\n".join(["\n".join(lines), *map(cpu_measured, reports)])


def cpu_cells(result: Report | None, target: float | None) -> tuple[str, str]:
    """Milliseconds, and the ratio with its spread."""
    if result is None:
        return "", ""
    if "error" in result:
        return "", f"failed: {result['error']}"
    best = result["contenders"][result["contender"]]
    missed = " (missed)" if target is not None and best["ratio"] > target else ""
    return f"{best['ms']:.3f}", spread(best) + missed


def cpu_models(report: Report) -> str:
    """Markdown: a line per contender, a column per model; what was counted on the one with most tensors."""
    results = measured(report["results"], "models")
    if not results:
        return ""
    whole = [r for r in results if "eager" in r["contenders"]] or results
    most = max(whole, key=lambda r: r["tensors"])
    models = [r["workload"].removesuffix(" feature") for r in results]
    of = most["workload"].removesuffix(" feature")
    counted = [key for key in COUNTED if any(key in c for c in most["contenders"].values())]
    titles = ["ms per step", *models, *(f"{COUNTED[key][0]}, {of}" for key in counted)]
    lines = [f"{machine(report)}:", "", f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    for name, text in NAMES.items():
        found = [r["contenders"].get(name) for r in results]
        if not any(found):
            continue
        cells = ["" if c is None else f"{c['ms']:.3g}" for c in found]
        known = most["contenders"].get(name, {})
        cells += [COUNTED[key][1](known[key]) if key in known else "" for key in counted]
        lines.append(f"| {text} | {' | '.join(cells)} |")
    said = (
        "Operations are those that torch dispatches in a step (of what is compiled it sees none), extra "
        "memory the most that a step takes of torch's memory for a time"
        + (HOST if "host_us" in counted else "")
        + ". SGD does no proximal step; foreach "
        "by hand is the best of plain PyTorch. pat does group lasso alone, and only its first step is a "
        "proximal step from the current weights. Empty cells were not measured; models of more than "
        "500 million parameters are left to the GPU."
    )
    failed = [
        f"{r['workload']}: {NAMES[n]} failed ({r[f'{n}_error']})."
        for r in results
        for n in NAMES
        if f"{n}_error" in r
    ]
    return "\n".join([*lines, "", " ".join([said, *failed])])


def pictures(results: Results, name: str) -> str:
    """The plots that bench.plots draws of these results."""
    texts = {
        "models": "Time of a step on each model, by contender",
        "grid": "Speed of single tensors, in percent of a copy's, by size, group spec, dtype and mode",
        "scaling": "Time of a step over elements, tensors, group length and threads",
    }
    drawn = pictured(results, name).items()
    return "\n\n".join(f"![{texts[suite]}](bench/results/{file}.svg)" for file, (suite, _) in drawn)


def gpu_cells(result: Report | None) -> tuple[str, str, str]:
    """Milliseconds, percent of a copy's speed or ratio, and launches."""
    if result is None:
        return "", "", ""
    if "error" in result:
        return "", f"failed: {result['error']}", ""
    best = result["contenders"][result["contender"]]
    said = spread(best)
    if result["baseline"] == "copy":
        low, high = 100 / best["ratio_high"], 100 / best["ratio_low"]
        said = f"{100 / best['ratio']:.0f}% [{low:.0f}, {high:.0f}]"
    elif "percent_of_copy" in result and result["baseline"] != "allowed":
        said += f", {result['percent_of_copy']:.0f}%"
    missed = " (missed)" if result["met"] is False else ""
    launches = result.get("launches")
    return f"{best['ms']:.3f}", said + missed, "" if launches is None else f"{launches:g}"


def gpu_target(result: Report) -> str:
    target = result.get("target")
    if target is None:
        return "-"
    return f"{100 / target:.0f}%" if result["baseline"] == "copy" else f"{target:.2f}"


def number(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def measured_at(report: Report, results: Results) -> str:
    """How many of these rows are of which commit, day and number of runs.

    Older files' rows do not say: all are as the environment says.
    """
    env = report["environment"]
    rows = Counter(
        (r.get("commit", env["commit"]), r.get("date", env["date"]), r["runs"])
        for r in results
        if "error" not in r
    )
    return ", ".join(
        f"{number(count, 'row')} of commit {commit} ({date}, {number(runs, 'run')})"
        for (commit, date, runs), count in rows.items()
    )


def gpu_table(report: Report, backend: str) -> str:
    """Markdown: one line per workload, the dtypes side by side; then what the slow contenders took."""
    results: dict[str, dict[str, Report]] = {}
    for result in of_suite(report["results"], "core", "models"):
        if result["backend"] == backend:
            results.setdefault(result["workload"], {})[result["dtype"]] = result
    everything = [result for of in results.values() for result in of.values()]
    lines = [
        f"Measured with {backend}: {measured_at(report, everything) or 'nothing'}.",
        "",
        f"| {backend} | against | target | fp32 ms | fp32 | bf16 ms | bf16 | launches |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for workload, of in results.items():
        cells = [gpu_cells(of.get(dtype)) for dtype in ("fp32", "bf16")]
        measured = [result for result in of.values() if "error" not in result] or list(of.values())
        launches = "/".join(dict.fromkeys(cell[2] for cell in cells if cell[2]))
        targets = "/".join(dict.fromkeys(map(gpu_target, measured)))
        against = BASELINES[measured[0]["baseline"]]
        numbers = " | ".join(f"{ms} | {said}" for ms, said, _ in cells)
        lines.append(f"| {workload} | {against} | {targets} | {numbers} | {launches} |")
    return "\n".join([*lines, "", *others(backend, results)])


def others(backend: str, results: dict[str, dict[str, Report]]) -> list[str]:
    """A sentence per workload on the contenders that are no targets."""
    sentences = []
    for workload, of in results.items():
        for dtype, result in of.items():
            contenders = result.get("contenders", {})
            told = [f"{text} {contenders[n]['ratio']:.1f}" for n, text in OTHERS.items() if n in contenders]
            told += [f"{text} failed" for name, text in OTHERS.items() if f"{name}_error" in result]
            if "empty" in contenders:
                names = [n for n in ("fused_sgd", "python_plan", "empty") if n in contenders]
                told = [f"{contenders[n]['ms']:.3f} ms with {n.replace('_', ' ')}" for n in names]
            if told:
                sentences.append(f"{workload}, {dtype}: {', '.join(told)}.")
    return [f"Beside {backend}: {' '.join(sentences)}"] if sentences else []


def gpu_part(reports: Sequence[Report]) -> str:
    """The tables of every GPU that was measured."""
    parts = []
    for report in reports:
        env = report["environment"]
        parts.append(
            f"GPU: {env['gpu']}, driver {env['driver']}, CUDA {env['cuda']}, torch {env['torch']}, "
            f"triton {env['triton']}, momentum 0.9; medians of separated runs. A percentage is of a plain "
            "copy's speed, counting only the bytes that must move; ratios are of the GPU's time, on the row "
            "named host of the CPU's."
        )
        backends = dict.fromkeys(result["backend"] for result in report["results"])
        parts += [gpu_table(report, backend) for backend in backends]
        parts += [pictures(report["results"], report["name"])]
    return "\n\n".join(part for part in parts if part) or "GPU: not yet measured."


def training_part(reports: Sequence[Report]) -> str:
    """A whole training iteration, a line per model and contender."""
    parts = []
    for report in reports:
        env, results = report["environment"], measured(report["results"], "training")
        backends = ", ".join(dict.fromkeys(result["backend"] for result in results))
        lines = [
            f"A whole training iteration on {env.get('gpu', env['cpu'])}, torch {env['torch']}, bf16 "
            f"autocast, momentum 0.9, ProxSGD by {backends}: {measured_at(report, results)}.",
            "",
            "| model | optimizer | iteration, ms | to fused SGD | its step, ms | on the host, ms |",
            "|---|---|---:|---:|---:|---:|",
        ]
        for result in results:
            for name, of in result["contenders"].items():
                numbers = (f"{of['ms']:.2f}", spread(of), f"{of['step_ms']:.3f}", f"{of['step_host_ms']:.3f}")
                lines.append(f"| {result['workload']} | {NAMES[name]} | {' | '.join(numbers)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def with_tables(
    readme: str, cpus: Sequence[Report], gpus: Sequence[Report], training: Sequence[Report] = ()
) -> str:
    """The README's text with its tables made anew."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    parts = [cpu_table(cpus, core.rows())]
    for cpu in cpus:
        parts += [cpu_models(cpu), pictures(cpu["results"], cpu["name"])]
    parts += [gpu_part(gpus), training_part(training)]
    tables = "\n\n".join(part for part in parts if part)
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def reports() -> tuple[list[Report], list[Report], list[Report]]:
    """What was measured last on each kind of CPU, on each GPU, and of training."""

    def read(pattern: str) -> list[Report]:
        return [{"name": p.stem, **json.loads(p.read_text())} for p in sorted(RESULTS.glob(pattern))]

    return read("cpu-*.json"), read("gpu-*.json"), read("training-*.json")


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(with_tables(path.read_text(), *reports()))


if __name__ == "__main__":
    main()
