"""Writes the README's table of measurements from bench/results: ``python -m bench.readme``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def table(report: dict[str, Any]) -> str:
    """Markdown: one line per row, target and ratio side by side, misses marked."""
    env, memory = report["environment"], report["peak_extra_memory"]
    lines = [
        f"Measured on {env['date']} at commit {env['commit']}: {env['cpu']}, {env['threads']} threads, L2 of "
        f"{env['l2_bytes'] / 2**20:.0f} MiB, torch {env['torch']} ({env['capability']}), fp32, momentum 0.9; "
        f"medians of {env['runs']} separated runs.",
        "",
        "| workload | ms per step | ratio to | ratio [lowest, highest run] | target | eager reference |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for result in report["results"]:
        best = result["contenders"][result["contender"]]
        eager = result["contenders"].get("eager")
        spread = f"{best['ratio']:.2f} [{best['ratio_low']:.2f}, {best['ratio_high']:.2f}]"
        baseline = {"fused_sgd": "torch's fused SGD", "sequential": "sequential mode"}[result["baseline"]]
        missed = "" if result["met"] else " (missed)"
        lines.append(
            f"| {result['row']} | {best['ms']:.3f} | {baseline} | {spread} "
            f"| {result['target']:.2f}{missed} | {'' if eager is None else format(eager['ratio'], '.1f')} |"
        )
    per_thread = memory["bytes"] / memory["threads"] / 2**20
    return "\n".join([*lines, "", f"Memory that the first steps took: {per_thread:.2f} MiB a thread."])


def with_table(readme: str, report: dict[str, Any]) -> str:
    """The README's text with its table made anew."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table(report)}\n{END}{after}"


def main() -> None:
    report = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())
    path = ROOT / "README.md"
    path.write_text(with_table(path.read_text(), report))


if __name__ == "__main__":
    main()
