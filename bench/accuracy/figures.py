"""The figures of the experiments."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cges_kernels.demo.figures import RC, STYLES, percent_axis

from .experiments import EXPERIMENTS, Row
from .results import Group, grouped

AXES = {
    "nonzero": "% of weights, nonzero",
    "flops_nonzero": "% of FLOPs, by nonzeros",
    "weights_compacted": "% of weights, compacted",
    "flops_compacted": "% of FLOPs, compacted",
}
OTHERS = (("#D55E00", "o"), ("#0072B2", "^"), ("#009E73", "P"), ("#E69F00", "v"), ("#000000", "s"))
FORMATS = ("png", "svg")


def style(name: str, arm: str) -> dict[str, Any]:
    """Colours and markers: the demo's for its six methods, dashed on the network with batch norm."""
    experiment = EXPERIMENTS[name]
    arms = experiment.order
    colour, marker = STYLES.get(arm, OTHERS[arms.index(arm) % len(OTHERS)])
    if arm == "cges_norm":
        colour, marker = STYLES["cges"]
    elif arm == "slimming":
        colour, marker = "#CC79A7", "X"
    dashed = arm in experiment.arms and experiment.arms[arm].norm
    return dict(color=colour, marker=marker, linestyle="--" if dashed else "-", linewidth=1.6)


def over_costs(name: str, rows: Sequence[Row], columns: int = 2) -> Figure:
    """Test accuracy over each cost: a line per arm, a point per lambda."""
    groups = grouped(name, rows)
    figure = Figure(figsize=(5.2 * columns, 4.1 * len(AXES) / columns), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(len(AXES) // columns, columns, sharey=True).flat
    for panel, (x, label) in zip(panels, AXES.items()):
        for arm in dict.fromkeys(group.arm for group in groups):
            _line(panel, name, arm, [group for group in groups if group.arm == arm], x)
        positive = [group.interval(x).mean for group in groups if group.interval(x).mean > 0]
        percent_axis(panel.xaxis, max(0.5, 0.8 * min(positive)))
        panel.set_xlabel(label)
    accuracies = [group.interval("accuracy").mean for group in groups]
    panels[0].set_ylim(max(min(accuracies) - 1, max(accuracies) - 15), max(accuracies) + 1.5)
    return _finish(figure, name, rows, panels, "test accuracy, %")


def _line(panel: Axes, name: str, arm: str, groups: Sequence[Group], x: str) -> None:
    pairs = sorted((group.interval(x).mean, *group.interval("accuracy")) for group in groups)
    xs, ys, halves = np.nan_to_num(np.array(pairs)).T
    label = EXPERIMENTS[name].label(arm)
    panel.errorbar(xs, ys, halves, label=label, elinewidth=1, capsize=2, markersize=6, **style(name, arm))


def _finish(figure: Figure, name: str, rows: Sequence[Row], panels: Sequence[Axes], ylabel: str) -> Figure:
    panels[0].set_ylabel(ylabel)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=int(figure.get_figwidth() // 3))
    seeds, first = len({row["seed"] for row in rows}), rows[0]
    told = (
        f"{first['data']}, {first['net']}, {first['epochs']:g} epochs; mean and 95% interval of {seeds} seeds"
    )
    figure.suptitle(f"{EXPERIMENTS[name].title}\n{told}", fontsize=11)
    return figure


def over_epochs(name: str, rows: Sequence[Row]) -> Figure:
    """Test accuracy and nonzero weights over the epochs: a line per arm, its interval as a band."""
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 2)
    groups = grouped(name, rows)
    for panel, measure in zip(panels, ("accuracy", "nonzero")):
        for arm, lam in dict.fromkeys((group.arm, group.lam) for group in groups):
            mine = [group for group in groups if (group.arm, group.lam) == (arm, lam)]
            epochs = [group.point for group in mine]
            means, halves = np.nan_to_num(np.array([group.interval(measure) for group in mine])).T
            looks = style(name, arm) | {"marker": ""}
            panel.plot(epochs, means, label=f"{EXPERIMENTS[name].label(arm)}, λ = {lam:g}", **looks)
            panel.fill_between(epochs, means - halves, means + halves, color=looks["color"], alpha=0.12, lw=0)
        panel.set_xlabel("epoch")
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panels[1].set_ylabel("% of weights, nonzero")
    return _finish(figure, name, rows, panels, "test accuracy, %")


def over_rounds(name: str, rows: Sequence[Row]) -> Figure:
    """Test accuracy over the density pruned to: a line per arm and lambda."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    panel = figure.subplots()
    groups = grouped(name, rows)
    for arm in dict.fromkeys(group.arm for group in groups):
        lams = list(dict.fromkeys(group.lam for group in groups if group.arm == arm))
        for lam, dashes in zip(lams, ("-", "--", ":", "-.") * len(lams)):
            mine = [group for group in groups if (group.arm, group.lam) == (arm, lam)]
            means, halves = np.nan_to_num(np.array([group.interval("accuracy") for group in mine])).T
            looks = style(name, arm) | {"linestyle": dashes}
            label = f"{EXPERIMENTS[name].label(arm)}, λ = {lam:g}"
            points = [group.point for group in mine]
            panel.errorbar(points, means, halves, label=label, elinewidth=1, capsize=2, **looks)
    percent_axis(panel.xaxis, 0.8 * min(group.point or 100 for group in groups))
    panel.invert_xaxis()
    panel.set_xlabel("pruned to % of the weights")
    return _finish(figure, name, rows, [panel], "test accuracy, %")


DRAWN: dict[str, Callable[[str, Sequence[Row]], Figure]] = {"fig4a": over_epochs, "table2": over_rounds}


def draw(name: str, rows: Sequence[Row]) -> dict[str, bytes]:
    """The figure in both formats; equal numbers give equal bytes."""
    pictures = {}
    with matplotlib.rc_context({**RC, "svg.hashsalt": "bench", "savefig.dpi": 100}):
        figure = DRAWN.get(name, over_costs)(name, rows)
        for form in FORMATS:
            file = io.BytesIO()
            figure.savefig(file, format=form, metadata={"Date": None} if form == "svg" else None)
            pictures[form] = file.getvalue()
    return pictures
