"""Heat maps of weight matrices and of filters, in which exact zeros differ from small numbers.

`plot_weights` and `plot_filters` are public; they import matplotlib when they are called.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from torch import Tensor, nn

from ..training.layers import regularised_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Weights: TypeAlias = nn.Module | Mapping[str, Tensor | np.ndarray]

ZERO = "#d9d9d9"  # the colour of exact zeros


def plot_weights(
    weights: Weights,
    names: Collection[str] | None = None,
    *,
    xlabel: str = "input",
    ylabel: str = "output",
) -> Figure:
    """Heat maps of weight matrices, one below the other, on one colour scale; exact zeros are grey.

    The thesis's Figure 5 shows the last layer this way. A column that only few outputs read shows exclusive
    sparsity, an empty column group sparsity.

    Args:
        weights: a model, or a dict {title: matrix [out, in]}. A weight of more dims is shown as [out, the
            rest].
        names: the parameters of a model to show, as in `model.named_parameters()`. None (default) shows its
            last layer.
        xlabel: the label of the columns.
        ylabel: the label of the rows.

    Returns:
        A matplotlib figure, to be saved with `figure.savefig("weights.png")`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: names that the model does not have, nothing to show, or a weight of fewer than two dims.

    Examples:
        >>> plot_weights({"l1": l1_net.fc2.weight, "CGES": cges_net.fc2.weight}, xlabel="feature")
    """
    shown = _matrices(weights, names, 2, -1)
    figure = _figure(10, 1.75 * len(shown) + 0.6)
    panels = figure.subplots(len(shown), 1, sharex=_same_width(shown), squeeze=False)[:, 0]
    limit = _limit(shown)
    for panel, (title, w) in zip(panels, shown.items()):
        image = _heat(panel, w.reshape(len(w), -1), limit)
        panel.set_title(title, fontsize=9.5, loc="left")
        panel.set_ylabel(ylabel)
    panels[-1].set_xlabel(xlabel)
    _colour_bar(figure, image, panels, 0.5)
    return figure


def plot_filters(filters: Weights, names: Collection[str] | None = None) -> Figure:
    """Heat maps of convolution filters side by side, on one colour scale; exact zeros are grey.

    The thesis's Figure 6 shows the first layer this way. Each filter is a column of its input channels' taps.

    Args:
        filters: a model, or a dict {title: weight [out, in, kh, kw]}; [out, in, k] is shown as kh = 1.
        names: the parameters of a model to show, as in `model.named_parameters()`. None (default) shows its
            first convolution.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: names that the model does not have, nothing to show, or a weight of fewer than three dims.

    Examples:
        >>> plot_filters(model, ["conv1.weight"]).savefig("filters.png")
    """
    shown = _matrices(filters, names, 3, 0)
    heights = [0.95 * max(1.0, w.shape[1] / 3) for w in shown.values()]
    figure = _figure(11, sum(heights) + 0.3)
    panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    limit = _limit(shown)
    for panel, (title, w) in zip(panels, shown.items()):
        w = w.reshape(*w.shape[:2], -1, w.shape[-1])
        out, into, kh, kw = w.shape
        tiles = np.full((out, into, kh + 1, kw + 1), np.nan)  # NaN stays in the gaps between the kernels
        tiles[:, :, :kh, :kw] = w
        sheet = tiles.transpose(1, 2, 0, 3).reshape(into * (kh + 1), out * (kw + 1))
        image = _heat(panel, sheet[:-1, :-1], limit)
        panel.set_aspect("equal")
        panel.set_axis_off()
        panel.set_title(title, fontsize=9.5, loc="left")
    _colour_bar(figure, image, panels, 0.8)
    return figure


def _matrices(
    weights: Weights, names: Collection[str] | None, least: int, default: int
) -> dict[str, np.ndarray]:
    """{title: weights} to show, each of at least `least` dims.

    For a model without `names` it has one entry: the layer at index `default` among those with so many dims.
    """
    if isinstance(weights, nn.Module):
        params = dict(weights.named_parameters())
        if names is None:
            layers = [w for w in regularised_weights(weights, frozen=True) if w.param.dim() >= least]
            names = [layers[default].name] if layers else []
        elif isinstance(names, str) or (unknown := sorted(set(names) - set(params))):
            got = names if isinstance(names, str) else unknown
            raise ValueError(f"names: expected names of model.named_parameters(), got {got!r}")
        weights = {}
        for name in names:
            nonzero = 100 * int(params[name].count_nonzero()) / max(params[name].numel(), 1)
            weights[f"{name}: {nonzero:.0f}% nonzero"] = params[name]
    elif names is not None:
        raise ValueError("names: expected a model to take them from, got a mapping, which has titles")
    if not weights:
        raise ValueError(f"weights: expected something of {least} or more dims to show, got nothing")
    shown = {
        title: w.detach().cpu().double().numpy() if isinstance(w, Tensor) else np.asarray(w, dtype=float)
        for title, w in weights.items()
    }
    for title, w in shown.items():
        if w.ndim < least or w.size == 0:
            raise ValueError(f"{title}: expected weights of {least} or more dims, got shape {w.shape}")
    return shown


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def _same_width(shown: Mapping[str, np.ndarray]) -> bool:
    return len({w[0].size for w in shown.values()}) == 1


def _limit(shown: Mapping[str, np.ndarray]) -> float:
    """The end of the colour scale: the magnitude that 99% of all weights shown stay below."""
    magnitudes = np.abs(np.concatenate([w.ravel() for w in shown.values()]))
    return float(np.quantile(magnitudes, 0.99)) or 1.0


def _heat(panel: Axes, weights: np.ndarray, limit: float) -> Any:
    """Draw a diverging heat map with exact zeros in grey and NaN in white; returns the image."""
    import matplotlib
    from matplotlib.colors import TwoSlopeNorm

    panel.grid(False)
    panel.spines[:].set_visible(False)
    panel.set_facecolor("white")
    look: dict[str, Any] = dict(aspect="auto", interpolation="nearest")
    panel.imshow(np.where(weights == 0, 0.0, np.nan), cmap=matplotlib.colors.ListedColormap([ZERO]), **look)
    colours = matplotlib.colormaps["PuOr_r"]
    masked = np.where(weights == 0, np.nan, weights)
    return panel.imshow(masked, cmap=colours, norm=TwoSlopeNorm(0, -limit, limit), **look)


def _colour_bar(figure: Figure, image: Any, panels: Any, shrink: float) -> None:
    figure.colorbar(image, ax=list(panels), label="weight (grey: exactly zero)", extend="both", shrink=shrink)
