"""The style of the examples' figures, and the figure of accuracy over cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .results import COSTS, Group, Results

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

# Okabe and Ito's palette can be distinguished with any colour vision, and markers also in grey.
STYLES = {
    "l2": ("#000000", "s", "-"),
    "l1": ("#E69F00", "v", "-"),
    "gs_filter": ("#56B4E9", "D", "-"),
    "gs_feature": ("#0072B2", "^", "-"),
    "es": ("#009E73", "P", "-"),
    "cges": ("#D55E00", "o", "-"),
    "cges_authors": ("#8C2D04", "*", "-."),
    "cges_norm": ("#D55E00", "o", "--"),
    "slimming": ("#CC79A7", "X", "--"),
}
OTHERS = [STYLES[arm] for arm in ("cges", "gs_feature", "es", "l1", "l2")]  # for arms that have no style
RC: dict[RcKeyType, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "svg.hashsalt": "examples",  # equal numbers give equal bytes
}


def style(results: Results, arm: str) -> dict[str, Any]:
    """Colour, marker and dashes of an arm."""
    colour, marker, dashes = STYLES.get(arm, OTHERS[list(results.labels).index(arm) % len(OTHERS)])
    return dict(color=colour, marker=marker, linestyle=dashes, linewidth=1.6)


def percent_axis(axis: Any, low: float) -> None:
    """A log axis from ``low`` to 100 with plain numbers at 1, 2, 5, 10, ..."""
    axis.axes.set_xscale("log")
    axis.axes.set_xlim(low, 115)
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def lowest_drawn(results: Results) -> float:
    """The test accuracy at which the picture ends: what has collapsed would flatten the rest."""
    accuracies = [group.interval("accuracy").mean for group in results.groups]
    return max(min(accuracies) - 1, max(accuracies) - 15)


def over_costs(results: Results, title: str, columns: int = 2) -> Figure:
    """Test accuracy over each cost: a line per arm, a point per lambda."""
    figure = Figure(figsize=(5.2 * columns, 4.1 * len(COSTS) / columns), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(len(COSTS) // columns, columns, sharey=True).flat
    for panel, (x, label) in zip(panels, COSTS.items()):
        for arm in dict.fromkeys(group.arm for group in results.groups):
            _line(panel, results, results.of(arm), x)
        positive = [mean for group in results.groups if (mean := group.interval(x).mean) > 0]
        percent_axis(panel.xaxis, max(0.5, 0.8 * min(positive)))
        panel.set_xlabel(f"{label}, %")
    accuracies = [group.interval("accuracy").mean for group in results.groups]
    low = lowest_drawn(results)
    panels[0].set_ylim(low, max(accuracies) + 1.5)
    cut = f"; what lies below {low:.0f}% is not drawn" if min(accuracies) < low else ""
    return finish(figure, panels, results, title, cut)


def _line(panel: Axes, results: Results, groups: Sequence[Group], x: str) -> None:
    pairs = sorted((group.interval(x).mean, *group.interval("accuracy")) for group in groups)
    xs, ys, halves = np.nan_to_num(np.array(pairs)).T
    arm = groups[0].arm
    looks = style(results, arm) | dict(elinewidth=1, capsize=2, markersize=6)
    panel.errorbar(xs, ys, halves, label=results.labels[arm], **looks)


def finish(figure: Figure, panels: Sequence[Axes], results: Results, title: str, more: str = "") -> Figure:
    """Add a legend, and a title that says what the runs are of; ``more`` ends it."""
    panels[0].set_ylabel("test accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=int(figure.get_figwidth() // 3))
    figure.suptitle(f"{title}\n{results.told}; mean and 95% interval{more}", fontsize=11)
    return figure
