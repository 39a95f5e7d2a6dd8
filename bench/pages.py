"""Writes the measurements into README.md and docs/speed.md: ``python -m bench.pages``.

README.md gets one short table, docs/speed.md all tables. Both pages are changed between their markers only.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from . import core
from .lab import Cpu
from .table import NAMES, RESULTS, Results, Row, bars, of_suite, percent_of_copy

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
BASELINES = {
    "fused_sgd": "torch's fused SGD",
    "fused_adamw": "torch's fused AdamW",
    "sequential": "sequential mode",
    "copy": "a copy",
    "allowed": "an empty step and 20 µs",
}
COUNTED: dict[str, tuple[str, Callable[[float], str]]] = {  # a column's title, and how its cells are written
    "ops": ("operations", str),
    "extra_bytes": ("extra memory", lambda bytes: f"{bytes / 2**20:.1f} MiB"),
    "host_us": ("host time", lambda us: f"{us / 1e3:.3g} ms"),
}
PICTURES = {
    "models": "Time of a step on each model, by contender",
    "grid": "Speed of single tensors, in percent of a copy's, by size, group spec, dtype and mode",
    "scaling": "Time of a step over elements, tensors, group length and threads",
}
SHORT = {  # {line of the README's table: its workload}
    "ResNet-50, 161 tensors": "ResNet-50 feature",
    "ViT-L/16, 296 tensors": "ViT-L/16 feature",
    "one 4096x4096 tensor, groups by filter": "filter 4096x4096",
    "one 4096x4096 tensor, groups by feature": "feature 4096x4096",
    "300 tensors of 1,024 elements": "300 tensors of 1,024",
    "ResNet-50, ProxAdamW": "AdamW, ResNet-50 feature",
}
NAMED = {"cpu": "", "cuda": ", CUDA", "triton": ", Triton"}
Report = dict[str, Any]
Groups = Mapping[str, Mapping[str, Report]]  # {title of a group of columns: {workload: its result}}


def markdown(titles: Sequence[str], lines: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A table in Markdown. Its first ``texts`` columns are text, the others are numbers."""
    rule = f"|{'---|' * texts}{'---:|' * (len(titles) - texts)}"
    head, *rest = (f"| {' | '.join(cells)} |" for cells in (titles, *lines))
    return "\n".join([head, rule, *rest])


def machine(report: Report) -> str:
    """A machine's short name, such as "Intel Xeon" or "H200"."""
    env = report["environment"]
    name = re.sub(r"\((R|TM)\)| (CPU|Processor)\b.*", "", env.get("gpu", env["cpu"]))
    return re.sub(r"^NVIDIA | 80GB.*", "", name)


def workload(result: Report) -> str:
    return result.get("workload", result["row"])


def measured_at(report: Report, results: Results) -> str:
    """Counts the rows by commit, date and number of runs.

    The environment of the file fills in the commit or date that a row lacks.
    """
    env = report["environment"]
    keys = ((r.get("commit", env["commit"]), r.get("date", env["date"]), r.get("runs")) for r in results)
    return ", ".join(
        f"{count} row{'s' * (count > 1)} at commit {commit} ({date}, {runs} run{'s' * (runs > 1)})"
        for (commit, date, runs), count in Counter(key for key in keys if key[2]).items()
    )


def cells(result: Report | None, row: Row | None) -> tuple[str, str]:
    """A result's two cells: its milliseconds; and its ratio or percent of a copy, with the extreme runs."""
    if result is None:
        return "", ""
    if "error" in result:
        return "", f"failed: {result['error']}"
    best, percent = result["contenders"][result["contender"]], percent_of_copy(result)
    low, high = best["ratio_low"], best["ratio_high"]
    if result["baseline"] == "copy":
        said = f"{100 / best['ratio']:.0f}% [{100 / high:.0f}, {100 / low:.0f}]"
    else:
        said = f"{best['ratio']:.2f} [{low:.2f}, {high:.2f}]"
        if row is None and percent and result["baseline"] != "allowed":
            said += f", {percent:.0f}%"
    missed = best["ratio"] > (row.target or math.inf) if row else result["met"] is False
    return f"{best['ms']:.3f}", said + (" (missed)" if missed else "")


def extras(result: Report) -> dict[str, str]:
    """The result's cells for optional columns, by title. A table has such a column if any result fills it."""
    found, contenders = {}, result["contenders"]
    if "eager" in contenders:
        found["eager reference"] = f"{contenders['eager']['ratio']:.1f}"
    if result.get("launches") is not None:
        found["launches"] = f"{result['launches']:g}"
    if result["baseline"] in ("copy", "allowed") and "fused_sgd" in contenders:
        found["fused SGD, ms"] = f"{contenders['fused_sgd']['ms']:.3f}"
    return found


def table(groups: Groups, rows: Sequence[Row] = ()) -> str:
    """A table with a line per workload: milliseconds and ratio for each group of columns, then ``extras``.

    The workloads and targets are those of ``rows`` where they are given, else those of the results.
    """
    lines: list[list[str]] = []
    more: list[dict[str, list[str]]] = []
    today = {row.name: row for row in rows}
    for name in today or dict.fromkeys(name for group in groups.values() for name in group):
        row = today.get(name)
        results = [group.get(name) for group in groups.values()]
        well = [r for r in results if r is not None and "error" not in r]
        baseline = row.baseline if row else next(r["baseline"] for r in results if r is not None)
        wanted = [row.target] if row else [r["target"] for r in well]
        said = (t and (f"{100 / t:.0f}%" if baseline == "copy" else f"{t:.2f}") for t in wanted)
        target = "/".join(dict.fromkeys(text or "-" for text in said))
        numbers = [cell for r in results for cell in cells(r, row)]
        lines.append([name, BASELINES[baseline], target, *numbers])
        more.append({})
        for title, text in (item for r in well for item in extras(r).items()):
            more[-1].setdefault(title, []).append(text)
    titles = list(dict.fromkeys(title for of in more for title in of))
    for line, of in zip(lines, more):
        line += [", ".join(dict.fromkeys(of.get(title, []))) for title in titles]
    heads = [group + what for group in groups for what in (", ms", "")]
    return markdown(["workload", "against", "target", *heads, *titles], lines, texts=2)


def models(report: Report, results: Results) -> str:
    """A table of models: a line per contender, a column per model, then the counts on one of the models.

    That model is the one with the most tensors.
    """
    if not results:
        return ""
    found = bars(results)
    most = max(results, key=lambda r: ("eager" in r["contenders"], r.get("tensors", 0)))
    counts = {NAMES[name]: of for name, of in most["contenders"].items()}
    counted = [key for key in COUNTED if any(key in of for of in counts.values())]
    on = f", {workload(most)}".removesuffix(" feature")
    heads = [title.replace(" feature", "") for title in found] + [COUNTED[key][0] + on for key in counted]
    lines = []
    for label in dict.fromkeys(label for of in found.values() for label in of):
        times = [f"{of[label]:.3g}" if label in of else "" for of in found.values()]
        known = ((COUNTED[key][1], counts.get(label, {}).get(key)) for key in counted)
        lines.append([label, *times, *("" if x is None else write(x) for write, x in known)])
    tries = ((r, name) for r in results for name in NAMES if f"{name}_error" in r)
    failed = [f"{workload(r)}: {NAMES[name]} failed ({r[f'{name}_error']})." for r, name in tries]
    return "\n\n".join([f"{machine(report)}:", markdown(["ms per step", *heads], lines), *failed])


def pictures(report: Report) -> list[str]:
    drawn = (suite for suite in PICTURES if of_suite(report["results"], suite))
    return [f"![{PICTURES[s]}](../bench/results/{report['name']}-{s}.svg)" for s in drawn]


def cpu_part(reports: Sequence[Report], rows: Sequence[Row]) -> list[str]:
    cores = [of_suite(report["results"], "core", failed=True) for report in reports]
    groups = {machine(r): {x["row"]: x for x in known} for r, known in zip(reports, cores)}
    parts = [table(groups, rows)]
    for report, known in zip(reports, cores):
        env, shown = report["environment"], {row.name for row in rows}
        parts.append(
            f"The {machine(report)} has an L2 of {env['l2_bytes'] / 2**20:.0f} MiB a core and was measured "
            f"on {env['threads']} threads with torch {env['torch']} ({env['capability']}): "
            f"{measured_at(report, [r for r in known if r['row'] in shown])}."
        )
    for report in reports:
        parts += [models(report, of_suite(report["results"], "models")), *pictures(report)]
    return parts


def gpu_part(report: Report) -> list[str]:
    env = report["environment"]
    used = f"driver {env['driver']}, CUDA {env['cuda']}, torch {env['torch']}, triton {env['triton']}"
    parts = [f"### {env['gpu']}", f"It was measured with {used}."]
    results = of_suite(report["results"], "core", "models", failed=True)
    for backend in dict.fromkeys(r["backend"] for r in results):
        here = [r for r in results if r["backend"] == backend]
        groups = {kind: {workload(r): r for r in here if r["dtype"] == kind} for kind in ("fp32", "bf16")}
        parts += [f"By {backend}: {measured_at(report, here) or 'nothing'}.", table(groups)]
    slow = [r for r in of_suite(results, "models") if "eager" in r["contenders"]]
    return [*parts, models(report, slow), *pictures(report)]


def training_part(report: Report) -> list[str]:
    results = of_suite(report["results"], "training")
    said = f"Whole training iterations with bf16 autocast: {measured_at(report, results)}."
    return [said, models(report, results)]


def short(result: Report | None) -> str:
    """The ratio to torch's fused optimizer with the same update rule; on a CPU the milliseconds before it."""
    if result is None:
        return ""
    own = result["contenders"][result["contender"]]
    ratio = own["ratio"] if result["baseline"] == "fused_adamw" else own["to_fused_sgd"]
    return f"{own['ms']:.3g} ms, {ratio:.2f}" if result["backend"] == "cpu" else f"{ratio:.2f}"


def short_part(cpus: Sequence[Report], gpus: Sequence[Report]) -> list[str]:
    """The README's table, and a line that says where and when its numbers were measured."""
    groups: dict[str, dict[str, Report]] = {}
    for report in (*cpus, *gpus):
        for suite in ("models", "core"):  # a workload in both suites is taken from "core"
            for r in (r for r in of_suite(report["results"], suite) if r["dtype"] == "fp32"):
                commit = r.get("commit", report["environment"]["commit"])
                head = f"{machine(report)}{NAMED[r['backend']]} ({commit})"
                groups.setdefault(head, {})[workload(r)] = r
    lines = []
    for title, name in SHORT.items():
        results = [group.get(name) for group in groups.values()]
        eager = [r["contenders"]["eager"]["ratio"] for r in results if r and "eager" in r["contenders"]]
        span = dict.fromkeys(f"{x:.0f}" for x in sorted(eager))
        lines.append([title, *map(short, results), " to ".join([*span][:: max(len(span) - 1, 1)])])
    said = (
        "A number is how long a float32 step takes, in times of torch's fused optimizer, which does no "
        f"proximal step. A CPU's milliseconds, on {cpus[0]['environment']['threads']} threads, stand before. "
        "The eager reference does the same step in plain PyTorch, here on the CPUs. A column names the "
        "machine and the commit that was measured; what was not measured is empty. "
        "[docs/speed.md](docs/speed.md) says how all this is measured and has the other results."
    )
    return [markdown(["one step", *groups, "eager reference"], lines), said]


def between_markers(text: str, parts: Iterable[str]) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n" + "\n\n".join(filter(None, parts)) + f"\n{END}{rest.split(END)[1]}"


def pages(cpus: Sequence[Report], gpus: Sequence[Report], training: Sequence[Report]) -> dict[Path, str]:
    """{path: text} of both pages, with new tables."""
    whole = ["## CPU", *cpu_part(cpus, core.rows(Cpu())), "## GPU", *chain(*map(gpu_part, gpus))]
    whole += ["## Training", *chain(*map(training_part, training))] if training else []
    parts = {ROOT / "README.md": short_part(cpus, gpus), ROOT / "docs" / "speed.md": whole}
    return {path: between_markers(path.read_text(), part) for path, part in parts.items()}


def reports() -> tuple[list[Report], list[Report], list[Report]]:
    """The newest reports: of each kind of CPU, of each GPU, and of training."""

    def read(pattern: str) -> list[Report]:
        return [{"name": p.stem, **json.loads(p.read_text())} for p in sorted(RESULTS.glob(pattern))]

    return read("cpu-*.json"), read("gpu-*.json"), read("training-*.json")


def main() -> None:
    for path, text in pages(*reports()).items():
        path.write_text(text)


if __name__ == "__main__":
    main()
