"""The CPU benchmarks: ``python -m bench.run`` writes bench/results/cpu.json and cpu.csv (about six minutes)."""

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
from .timing import RUNS, environment, summarise, take_turns

RESULTS = Path(__file__).parent / "results"
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Row:
    """One line of the table: ``measure()`` is one run; ``contender``'s ratio to ``baseline`` has the target."""

    name: str
    baseline: str
    contender: str
    target: float
    measure: Callable[[], Times]
    note: dict[str, Any] = field(default_factory=dict)


def against_fused_sgd(shapes: workloads.Shapes, **options: Any) -> Callable[[], Times]:
    """prox_sgd, the eager reference and a copy of the same bytes beside torch's fused SGD."""

    def measure() -> Times:
        contenders = {
            "fused_sgd": baselines.fused_sgd(shapes),
            "prox_sgd": baselines.prox_sgd(shapes, **options),
            "copy": baselines.copy(shapes),
        }
        times = take_turns({name: contender.step for name, contender in contenders.items()})
        pair = {"fused_sgd": contenders["fused_sgd"].step, "eager": baselines.eager(shapes, **options).step}
        eager = take_turns(pair)
        return {
            **times,
            "eager": [t / b * times["fused_sgd"][0] for t, b in zip(eager["eager"], eager["fused_sgd"])],
        }

    return measure


def faster_of_one_and_two_threads(shapes: workloads.Shapes) -> Callable[[], Times]:
    """prox_sgd beside torch's fused SGD on one and on two threads; the baseline is the faster in each turn."""

    def measure() -> Times:
        sgd, ours = baselines.fused_sgd(shapes), baselines.prox_sgd(shapes)
        threads = torch.get_num_threads()

        def on(count: int, step: Callable[[], Any]) -> Callable[[], None]:
            def run() -> None:
                torch.set_num_threads(count)
                step()

            return run

        times = take_turns(
            {"one": on(1, sgd.step), "two": on(threads, sgd.step), "prox_sgd": on(threads, ours.step)}
        )
        torch.set_num_threads(threads)
        return {
            "prox_sgd": times["prox_sgd"],
            "fused_sgd": [min(pair) for pair in zip(times["one"], times["two"])],
        }

    return measure


def host_time(shapes: workloads.Shapes) -> Callable[[], Times]:
    """Everything on one thread and nothing to compute: what a call of step() costs."""

    def measure() -> Times:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        make = {
            "fused_sgd": baselines.fused_sgd,
            "prox_sgd": baselines.prox_sgd,
            "empty": baselines.empty_step,
        }
        times = take_turns({name: contender(shapes).step for name, contender in make.items()})
        torch.set_num_threads(threads)
        return times

    return measure


def coefficients_for(fraction: float, rows: int) -> dict[str, float]:
    """Group and exclusive lasso, equally strong, such that exact mode leaves ``fraction`` of normal weights."""
    sample = torch.randn(rows, 64)
    low, high = 1e-6, 1e3
    for _ in range(40):
        strength = (low * high) ** 0.5
        chosen = {"group_lasso": strength * rows**0.5 / 10, "exclusive_lasso": strength / rows}
        left = (prox(sample, **chosen, prox_mode="exact") != 0).double().mean()
        low, high = (strength, high) if left > fraction else (low, strength)
    return {key: value / baselines.LR for key, value in chosen.items()}


def exact_against_sequential(
    shape: tuple[int, int], fraction: float, note: dict[str, Any]
) -> Callable[[], Times]:
    """Both modes at one pair of coefficients, from the same weights in every step."""

    def measure() -> Times:
        chosen = coefficients_for(fraction, shape[0])
        steps: dict[str, Callable[[], Any]] = {}
        restore = []
        for mode in ("sequential", "exact"):
            contender = baselines.prox_sgd([shape], prox_mode=mode, **chosen)
            start = contender.params[0].detach().clone()
            contender.step()
            note[f"percent_nonzero_{mode}"] = 100 * (contender.params[0] != 0).double().mean().item()
            steps[mode] = contender.step
            restore.append((contender.params[0].detach(), start))
        return take_turns(steps, before=lambda: [p.copy_(start) for p, start in restore])

    return measure


def rows() -> list[Row]:
    table = []

    def fused(name: str, target: float, shapes: workloads.Shapes, **options: Any) -> None:
        note = {"elements": workloads.elements(shapes), "tensors": len(shapes)}
        table.append(Row(name, "fused_sgd", "prox_sgd", target, against_fused_sgd(shapes, **options), note))

    fused("feature 4096x4128", 1.25, workloads.matrix(4096, 4128))
    fused("feature 4096x4096", 1.5, workloads.matrix(4096, 4096))
    fused("feature 8192x4096", 1.75, workloads.matrix(8192, 4096))
    fused("feature 512x4608", 1.3, workloads.matrix(512, 4608))
    fused("filter 4096x4096", 1.25, workloads.matrix(4096, 4096), group_by="filter")
    fused("ResNet-50 feature", 1.3, workloads.resnet50())
    small, tiny = workloads.small(300, 1024), workloads.small(500, 16)
    note = {"elements": workloads.elements(small), "tensors": 300}
    table.append(
        Row("300 tensors of 1024", "fused_sgd", "prox_sgd", 1.0, faster_of_one_and_two_threads(small), note)
    )
    note = {"elements": workloads.elements(tiny), "tensors": 500}
    table.append(Row("host, 500 tiny tensors", "fused_sgd", "prox_sgd", 1 / 3, host_time(tiny), note))
    for percent in (90, 50, 10):
        note = {"elements": 4096 * 4128, "tensors": 1}
        measure = exact_against_sequential((4096, 4128), percent / 100, note)
        table.append(Row(f"exact, {percent}% nonzero", "sequential", "exact", 1.5, measure, note))
    return table


def peak_extra_memory() -> dict[str, int]:
    """Bytes by which a process grows in its first steps, beyond parameters, gradients and buffers."""
    contender = baselines.prox_sgd(workloads.matrix(4096, 4128))
    for p in contender.params:
        p.grad.clone()  # whatever the allocator keeps, it has now
    optimizer = contender.step.__self__
    for p in contender.params:
        optimizer.state[p]["momentum_buffer"] = torch.randn_like(p)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        contender.step()
    return {
        "threads": torch.get_num_threads(),
        "bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
    }


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
    runs: dict[str, list[Times]] = {row.name: [] for row in table}
    with tqdm(total=options.runs * len(table)) as bar:
        for _ in range(options.runs):
            for row in table:
                bar.set_description(row.name)
                runs[row.name].append(row.measure())
                bar.update()

    results = []
    for row in table:
        contenders = summarise(runs[row.name], row.baseline)
        best = contenders[row.contender]
        results.append(
            {
                "row": row.name,
                "baseline": row.baseline,
                "contender": row.contender,
                "target": round(row.target, 3),
            }
            | {"met": best["ratio"] <= row.target, **row.note, "contenders": contenders}
        )
        print(
            f"{row.name:24s} {row.contender:>10s} {best['ms']:8.3f} ms  {best['ratio']:.3f}x {row.baseline} "
            f"[{best['ratio_low']:.2f}, {best['ratio_high']:.2f}]  target {row.target:.2f}  "
            + " ".join(
                f"{n}={c['ratio']:.2f}x"
                for n, c in contenders.items()
                if n not in (row.contender, row.baseline)
            )
            + " ".join(f"{key}={value:.1f}" for key, value in row.note.items() if key.startswith("percent"))
        )
    print(
        f"extra memory in the first steps: {memory['bytes'] / 2**20:.2f} MiB on {memory['threads']} threads"
    )
    if not options.only:
        write({"environment": environment(), "peak_extra_memory": memory, "results": results})


def write(report: dict[str, Any]) -> None:
    """One set of files per machine kind; the last run replaces the one before."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cpu.json").write_text(json.dumps(report, indent=1) + "\n")
    with open(RESULTS / "cpu.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("row", "contender", "ms", "ratio", "ratio_low", "ratio_high", "baseline", "target"))
        for result in report["results"]:
            for name, c in result["contenders"].items():
                target = result["target"] if name == result["contender"] else ""
                numbers = (f"{c[key]:.4f}" for key in ("ms", "ratio", "ratio_low", "ratio_high"))
                writer.writerow((result["row"], name, *numbers, result["baseline"], target))


if __name__ == "__main__":
    main()
