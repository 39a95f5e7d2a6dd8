"""The figures of the experiments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..common.figures import finish, over_costs, percent_axis, style
from ..common.results import Results
from .experiments import EXPERIMENTS


def over_epochs(results: Results, title: str) -> Figure:
    """Test accuracy and nonzero weights over the epochs: a line per arm, its interval as a band."""
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 2)
    for panel, measure in zip(panels, ("accuracy", "nonzero")):
        for arm, lam in dict.fromkeys((group.arm, group.lam) for group in results.groups):
            mine = [group for group in results.of(arm) if group.lam == lam]
            epochs = [group.point for group in mine]
            means, halves = np.nan_to_num(np.array([group.interval(measure) for group in mine])).T
            looks = style(results, arm) | {"marker": ""}
            panel.plot(epochs, means, label=f"{results.labels[arm]}, λ = {lam:g}", **looks)
            panel.fill_between(epochs, means - halves, means + halves, color=looks["color"], alpha=0.12, lw=0)
        panel.set_xlabel("epoch")
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panels[1].set_ylabel("nonzero weights, %")
    return finish(figure, panels, results, title)


def over_rounds(results: Results, title: str) -> Figure:
    """Test accuracy over the density pruned to: a line per arm and lambda."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    panel = figure.subplots()
    for arm in dict.fromkeys(group.arm for group in results.groups):
        lams = list(dict.fromkeys(group.lam for group in results.of(arm)))
        for lam, dashes in zip(lams, ("-", "--", ":", "-.") * len(lams)):
            mine = [group for group in results.of(arm) if group.lam == lam]
            means, halves = np.nan_to_num(np.array([group.interval("accuracy") for group in mine])).T
            looks = style(results, arm) | dict(linestyle=dashes, elinewidth=1, capsize=2)
            points = [group.point for group in mine]
            panel.errorbar(points, means, halves, label=f"{results.labels[arm]}, λ = {lam:g}", **looks)
    percent_axis(panel.xaxis, 0.8 * min(group.point for group in results.groups))
    panel.invert_xaxis()
    panel.set_xlabel("pruned to % of the weights")
    return finish(figure, [panel], results, title)


DRAWN: dict[str, Callable[[Results, str], Figure]] = {"fig4a": over_epochs, "table2": over_rounds}


def draw(name: str, results: Results) -> Figure:
    """The figure of an experiment."""
    return DRAWN.get(name, over_costs)(results, EXPERIMENTS[name].title)
