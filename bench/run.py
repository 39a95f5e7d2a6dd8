"""The CPU benchmarks: ``python -m bench.run`` writes bench/results/cpu.json and cpu.csv."""

from __future__ import annotations

import argparse
import csv
import json
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cges_kernels import prox

from . import baselines, workloads
from .timing import RUNS, Times, environment, summarise, take_turns

RESULTS = Path(__file__).parent / "results"
Measure = Callable[[], list[Times]]  # one run: sets of contenders that took turns, the baseline in each


@dataclass(frozen=True)
class Row:
    """One line of the table; the target is ``contender``'s ratio to ``baseline``."""

    name: str
    baseline: str
    contender: str
    target: float
    measure: Measure
    note: dict[str, Any] = field(default_factory=dict)


def against_fused_sgd(shapes: workloads.Shapes, **options: Any) -> Measure:
    """prox_sgd and a copy of the same bytes, then the eager reference, beside torch's fused SGD."""

    def measure() -> list[Times]:
        sgd = baselines.fused_sgd(shapes).step
        ours, copy = baselines.prox_sgd(shapes, **options).step, baselines.copy(shapes).step
        fast = take_turns({"fused_sgd": sgd, "prox_sgd": ours, "copy": copy})
        return [fast, take_turns({"fused_sgd": sgd, "eager": baselines.eager(shapes, **options).step})]

    return measure


def on_threads(count: int, step: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        torch.set_num_threads(count)
        step()

    return run


def faster_of_one_and_two_threads(shapes: workloads.Shapes) -> Measure:
    """prox_sgd beside torch's fused SGD on one and on two threads; the faster one is the baseline."""

    def measure() -> list[Times]:
        sgd, ours = baselines.fused_sgd(shapes).step, baselines.prox_sgd(shapes).step
        threads = torch.get_num_threads()
        steps = {
            "one": on_threads(1, sgd),
            "two": on_threads(threads, sgd),
            "prox_sgd": on_threads(threads, ours),
        }
        times = take_turns(steps)
        faster = [min(pair) for pair in zip(times["one"], times["two"])]
        return [{"prox_sgd": times["prox_sgd"], "fused_sgd": faster}]

    return measure


def host_time(shapes: workloads.Shapes) -> Measure:
    """Everything on one thread and nothing to compute: what a call of step() costs."""

    def measure() -> list[Times]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        makers = {
            "fused_sgd": baselines.fused_sgd,
            "prox_sgd": baselines.prox_sgd,
            "empty": baselines.empty_step,
        }
        times = take_turns({name: make(shapes).step for name, make in makers.items()})
        torch.set_num_threads(threads)
        return [times]

    return measure


def coefficients_for(fraction: float, rows: int) -> dict[str, float]:
    """A mild group lasso and the exclusive lasso that in exact mode leave ``fraction`` of normal weights."""
    sample = torch.randn(rows, 64)
    low, high = 1e-6, 1e6
    for _ in range(40):
        strength = (low * high) ** 0.5
        chosen = {"group_lasso": rows**0.5 / 20, "exclusive_lasso": strength / rows}
        left = (prox(sample, **chosen, prox_mode="exact") != 0).double().mean()
        low, high = (strength, high) if left > fraction else (low, strength)
    return {key: value / baselines.LR for key, value in chosen.items()}


def exact_against_sequential(rows: int, columns: int, fraction: float, note: dict[str, Any]) -> Measure:
    """Both modes at one pair of coefficients, from the same weights in every step."""

    def measure() -> list[Times]:
        chosen = coefficients_for(fraction, rows)
        steps: dict[str, Callable[[], Any]] = {}
        kept = []
        for mode in ("sequential", "exact"):
            contender = baselines.prox_sgd(workloads.matrix(rows, columns), prox_mode=mode, **chosen)
            p = contender.params[0].detach()
            kept.append((p, p.clone()))
            contender.step()
            note[f"percent_nonzero_{mode}"] = 100 * (p != 0).double().mean().item()
            steps[mode] = contender.step
        return [take_turns(steps, before=lambda: [p.copy_(start) for p, start in kept])]

    return measure


def rows() -> list[Row]:
    """The table: each target is the ratio to aim at."""

    def fused(name: str, target: float, shapes: workloads.Shapes, **options: Any) -> Row:
        note = {"elements": workloads.elements(shapes), "tensors": len(shapes)}
        return Row(name, "fused_sgd", "prox_sgd", target, against_fused_sgd(shapes, **options), note)

    def special(name: str, target: float, shapes: workloads.Shapes, measure: Measure) -> Row:
        note = {"elements": workloads.elements(shapes), "tensors": len(shapes)}
        return Row(name, "fused_sgd", "prox_sgd", target, measure, note)

    def exact(percent: int) -> Row:
        note = {"elements": 4096 * 4128, "tensors": 1}
        measure = exact_against_sequential(4096, 4128, percent / 100, note)
        return Row(f"exact 4096x4128, {percent}% left", "sequential", "exact", 1.5, measure, note)

    small, tiny = workloads.small(300, 1024), workloads.small(500, 16)
    return [
        fused("feature 4096x4128", 1.25, workloads.matrix(4096, 4128)),
        fused("feature 4096x4096", 1.5, workloads.matrix(4096, 4096)),
        fused("feature 8192x4096", 1.75, workloads.matrix(8192, 4096)),
        fused("feature 512x4608", 1.3, workloads.matrix(512, 4608)),
        fused("filter 4096x4096", 1.25, workloads.matrix(4096, 4096), group_by="filter"),
        fused("ResNet-50 feature", 1.3, workloads.resnet50()),
        special("300 tensors of 1,024", 1.0, small, faster_of_one_and_two_threads(small)),
        special("500 tensors of 16, host", 1 / 3, tiny, host_time(tiny)),
        *(exact(percent) for percent in (90, 50, 10)),
    ]


def peak_extra_memory() -> dict[str, int]:
    """Bytes by which a process grows in its first steps, beyond parameters, gradients and buffers."""
    step, params = baselines.prox_sgd(workloads.matrix(4096, 4128))
    for p in params:
        step.__self__.state[p]["momentum_buffer"] = torch.randn_like(p)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        step()
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return {"threads": torch.get_num_threads(), "bytes": grown}


def line(result: dict[str, Any]) -> str:
    """One result as the terminal shows it."""
    best = result["contenders"][result["contender"]]
    others = {
        name: c
        for name, c in result["contenders"].items()
        if name not in (result["contender"], result["baseline"])
    }
    extra = [f"{name}={c['ratio']:.2f}x" for name, c in others.items()]
    extra += [f"{key}={value:.1f}" for key, value in result.items() if key.startswith("percent")]
    return (
        f"{result['row']:26s} {result['contender']:>9s} {best['ms']:8.3f} ms = {best['ratio']:.3f}x "
        f"{result['baseline']} [{best['ratio_low']:.2f}, {best['ratio_high']:.2f}], "
        f"target {result['target']:.2f}  {' '.join(extra)}"
    )


def write(report: dict[str, Any]) -> None:
    """One set of files per kind of machine; the last run replaces the one before."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cpu.json").write_text(json.dumps(report, indent=1) + "\n")
    with open(RESULTS / "cpu.csv", "w", newline="") as file:
        writer = csv.writer(file)
        numbers = ("ms", "ratio", "ratio_low", "ratio_high")
        writer.writerow(("row", "contender", *numbers, "baseline", "target"))
        for result in report["results"]:
            for name, c in result["contenders"].items():
                target = result["target"] if name == result["contender"] else ""
                writer.writerow(
                    (result["row"], name, *(f"{c[k]:.4f}" for k in numbers), result["baseline"], target)
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the rows whose names contain this, and write nothing")
    parser.add_argument("--runs", type=int, default=RUNS, help="separated runs per row (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of both sides (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    memory = peak_extra_memory()
    table = [row for row in rows() if options.only in row.name]
    runs: dict[str, list[list[Times]]] = {row.name: [] for row in table}
    with tqdm(total=options.runs * len(table)) as bar:
        for _ in range(options.runs):
            for row in table:
                bar.set_description(row.name)
                runs[row.name].append(row.measure())
                bar.update()

    results = []
    for row in table:
        contenders = summarise(runs[row.name], row.baseline)
        head = {
            "row": row.name,
            "baseline": row.baseline,
            "contender": row.contender,
            "target": round(row.target, 3),
        }
        met = contenders[row.contender]["ratio"] <= row.target
        results.append({**head, "met": met, **row.note, "contenders": contenders})
        print(line(results[-1]))
    print(
        f"memory taken by the first steps: {memory['bytes'] / 2**20:.2f} MiB on {memory['threads']} threads"
    )
    if not options.only:
        write(
            {
                "environment": {**environment(), "runs": options.runs},
                "peak_extra_memory": memory,
                "results": results,
            }
        )


if __name__ == "__main__":
    main()
