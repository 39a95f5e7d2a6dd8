"""The demo's figures, and the numbers that each shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor, nn

from cges_kernels import plot_filters, plot_weights, prox
from cges_kernels.reporting.files import as_csv

from ..common.figures import STYLES, over_costs
from ..common.methods import LABELS
from ..common.results import Results, Row

Shown = Mapping[str, tuple[Row, nn.Module]]  # {method: (row of a run, its network)}


def first_filters(model: nn.Module) -> Tensor:
    """The first convolution's weight."""
    return next(m.weight for m in model.modules() if isinstance(m, nn.Conv2d)).detach().cpu()


def last_layer(model: nn.Module) -> Tensor:
    """The last layer's weight, [classes, features]."""
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear)][-1].detach().cpu()


def draw(results: Results, shown: Shown) -> tuple[dict[str, Figure], dict[str, str]]:
    """({file name: figure}, {file name: CSV})."""
    first, last = _weights(shown, first_filters), _weights(shown, last_layer)
    modes_figure, modes_csv = modes()
    figures = {
        "accuracy.png": over_costs(results, "Accuracy and cost"),
        "first_layer.png": plot_filters(first),
        "last_layer.png": plot_weights(last, xlabel="feature (unit of the layer below)", ylabel="class"),
        "modes.png": modes_figure,
    }
    texts = {
        "accuracy.csv": results.summary_csv(),
        "first_layer.csv": _weights_csv(shown, first_filters, ("filter", "channel", "row", "column")),
        "last_layer.csv": _weights_csv(shown, last_layer, ("class", "feature")),
        "modes.csv": modes_csv,
    }
    return figures, texts


def _weights(shown: Shown, layer: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """{panel title: weights of the layer} for each method."""
    found = {}
    for arm, (row, model) in shown.items():
        weight = layer(model)
        here = 100 * int(weight.count_nonzero()) / weight.numel()
        nonzeros = f"Nonzero: {here:.0f}% here, {row['nonzero']:.0f}% of all weights"
        found[f"{LABELS[arm]}, λ = {row['lambda']:g}.  {nonzeros}.  Accuracy {row['accuracy']:.1f}%"] = weight
    return found


def _weights_csv(shown: Shown, layer: Callable[[nn.Module], Tensor], axes: Sequence[str]) -> str:
    rows = (
        [arm, row["lambda"], *index, float(weight)]
        for arm, (row, model) in shown.items()
        for index, weight in np.ndenumerate(layer(model).numpy())
    )
    return as_csv(["method", "lambda", *axes, "weight"], rows)


def nonzero_left(b_times_n: float, prox_mode: str, n: int = 1024, groups: int = 64) -> float:
    """% nonzero after one exclusive step at b = b_times_n / n on normal random groups of n."""
    w = torch.randn(n, groups, generator=torch.Generator().manual_seed(0))
    left = prox(w, exclusive_lasso=b_times_n / n, prox_mode=prox_mode)
    return 100 * int(torch.count_nonzero(left)) / w.numel()


def nonzero_expected(b_times_n: float, prox_mode: str) -> float:
    """% nonzero after the same step on infinitely large groups: P(|z| > t) for a normal z.

    In sequential mode t = bn * E|z|; in exact mode t solves t = bn * E max(|z| - t, 0).
    """

    def threshold(t: float) -> float:
        return b_times_n * 2 * (norm.pdf(t) - t * norm.sf(t))

    high = threshold(0)
    t = high if prox_mode == "sequential" else brentq(lambda t: threshold(t) - t, 0, high)
    return 200 * float(norm.sf(t))


def modes() -> tuple[Figure, str]:
    """The figure and CSV of the % nonzero that each prox_mode leaves, over b*n, without training."""
    points, line = np.geomspace(0.1, 30, 11), np.geomspace(0.08, 40, 120)
    figure = Figure(figsize=(6.6, 4.4), layout="constrained")
    panel = figure.subplots()
    header, columns = ["b_times_n"], [points.tolist()]
    looks = {"sequential": (*STYLES["cges"][:2], "--"), "exact": STYLES["gs_feature"]}
    for mode, (colour, marker, dashes) in looks.items():
        measured = [nonzero_left(x, mode) for x in points]
        panel.plot(line, [nonzero_expected(x, mode) for x in line], dashes, color=colour)
        panel.plot(points, measured, marker, color=colour)
        panel.plot([], [], dashes, marker=marker, color=colour, label=mode)
        header += [f"{mode}_measured", f"{mode}_expected"]
        columns += [measured, [nonzero_expected(x, mode) for x in points]]
    panel.axvspan(1, line[-1], color="#000000", alpha=0.06, linewidth=0)
    panel.text(1.1, 97, "ProxSGD warns here", va="top", fontsize=9)
    panel.set_xscale("log")
    panel.set_xlim(line[0], line[-1])
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.set_ylim(-2, 100)
    panel.set_xlabel("b·n  (lr × exclusive_lasso × group size)")
    panel.set_ylabel("% of weights nonzero after one step")
    panel.set_title("Normal random groups: points n = 1024, lines n → ∞", fontsize=10)
    panel.legend(loc="lower left")
    return figure, as_csv(header, zip(*columns))
