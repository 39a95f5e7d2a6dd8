"""Draws a machine's rows as SVG: ``python -m bench.plots`` draws all results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .table import NAMES, RESULTS, Results, bars, of_suite, percent_of_copy

ALONG = ("elements", "tensors", "group length", "threads")


def distinct(results: Results, key: str) -> list[Any]:
    return list(dict.fromkeys(r[key] for r in results))


def series(axes: Axes, points: Iterable[tuple[float, float]], label: str) -> None:
    axes.plot(*zip(*sorted(points)), marker="o", markersize=3, linewidth=1, label=label)


def grid(results: Results) -> Figure:
    """Percent of a copy's speed over size: a panel per dtype and mode, a line per group spec."""
    modes, dtypes = distinct(results, "mode"), distinct(results, "dtype")
    figure = Figure(figsize=(3 * len(dtypes), 3 * len(modes)), layout="constrained")
    panels = figure.subplots(len(modes), len(dtypes), sharex=True, sharey=True, squeeze=False)
    for line, mode in zip(panels, modes):
        for axes, dtype in zip(line, dtypes):
            for spec in distinct(results, "group_by"):
                here = [r for r in results if (r["mode"], r["dtype"], r["group_by"]) == (mode, dtype, spec)]
                same: dict[int, list[float]] = {}  # by number of elements; each list's mean is drawn
                for r in here:
                    same.setdefault(r["rows"] * r["columns"], []).append(percent_of_copy(r))
                if same:
                    series(axes, [(n, sum(p) / len(p)) for n, p in same.items()], spec)
            axes.set(xscale="log", title=f"{dtype}, {mode}")
            axes.grid(alpha=0.3)
    panels[0][0].legend()
    figure.supxlabel("elements")
    figure.supylabel("percent of a copy's speed")
    return figure


def models(results: Results) -> Figure:
    """Milliseconds of a step: a panel per model, a bar per contender."""
    found = bars(results)
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(4.5 * columns, 2.4 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, (title, known) in zip(panels, found.items()):
        colors = ["C1" if label.startswith(NAMES["prox_sgd"]) else "C0" for label in known]
        drawn = axes.barh(list(known), list(known.values()), color=colors)
        axes.bar_label(drawn, fmt="%.3g", fontsize=7, padding=2)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.tick_params(labelsize=7)
        axes.set_title(title, fontsize=9)
    for axes in panels[len(found) :]:
        axes.remove()
    figure.supxlabel("ms per step")
    return figure


def scaling(results: Results) -> Figure:
    """Milliseconds of a step against elements, tensors, group length and threads, one panel each.

    Fused SGD and a copy are drawn beside ProxSGD.
    """
    along = [what for what in ALONG if any(r["along"] == what for r in results)]
    figure = Figure(figsize=(3.4 * len(along), 3.2), layout="constrained")
    for axes, what in zip(figure.subplots(1, len(along), squeeze=False).flat, along):
        here = [r for r in results if r["along"] == what]
        specs = distinct(here, "group_by")
        for spec in specs:
            rows = [r for r in here if r["group_by"] == spec]
            for name in ("prox_sgd", "fused_sgd", "copy"):
                label = NAMES[name] + (f", {spec}" if name == "prox_sgd" and len(specs) > 1 else "")
                if name == "prox_sgd" or spec == specs[0]:
                    series(axes, [(r["x"], r["contenders"][name]["ms"]) for r in rows], label)
        axes.set(xlabel="tensors of 1,024" if what == "tensors" else what, xscale="log", yscale="log")
        if what == "threads":
            axes.set(xscale="linear", yscale="linear", ylim=(0, None), xticks=[r["x"] for r in here])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("ms per step")
    return figure


PICTURES: dict[str, Callable[[Results], Figure]] = {"grid": grid, "models": models, "scaling": scaling}


def draw(results: Results, name: str, folder: Path = RESULTS) -> list[Path]:
    """Draws one picture for each suite that has rows, and returns the paths written."""
    written = []
    with matplotlib.rc_context({"svg.hashsalt": "bench", "font.size": 9}):  # equal numbers, equal bytes
        for suite, picture in PICTURES.items():
            if rows := of_suite(results, suite):
                written.append(folder / f"{name}-{suite}.svg")
                picture(rows).savefig(written[-1], metadata={"Date": None})
    return written


def main() -> None:
    for path in sorted(RESULTS.glob("*.json")):
        print(*draw(json.loads(path.read_text())["results"], path.stem), sep="\n")


if __name__ == "__main__":
    main()
