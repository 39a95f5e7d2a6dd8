"""Heat maps of weights and filters: what is drawn where, and which inputs are refused."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")

from cges_kernels import plot_filters, plot_weights
from cges_kernels.reporting.figures import ZERO


def drawn(panel):
    """(the zeros, the other weights) of a heat map, masked where nothing is drawn."""
    zeros, others = (np.ma.masked_invalid(image.get_array()) for image in panel.images)
    return zeros, others


def test_zeros_are_apart_from_small_numbers():
    """Exact zeros have a colour of their own; 1e-30 does not share it, -0.0 does."""
    w = torch.tensor([[0.0, 1e-30, -2.0], [3.0, 0.0, -0.0]])
    figure = plot_weights({"some": w}, xlabel="feature", ylabel="class")
    panel = figure.axes[0]
    zeros, others = drawn(panel)
    assert (zeros.mask == (w != 0).numpy()).all() and (others.mask == (w == 0).numpy()).all()
    np.testing.assert_allclose(others.compressed(), w[w != 0].numpy())
    assert panel.images[0].get_cmap().colors == [ZERO]
    assert (panel.get_title(loc="left"), panel.get_xlabel(), panel.get_ylabel()) == (
        "some",
        "feature",
        "class",
    )


def test_all_panels_share_one_scale():
    """Colours mean the same number in all panels: the scale is symmetric and of the largest weight."""
    figure = plot_weights({"small": torch.ones(10, 30), "large": torch.full((10, 30), -5.0)})
    scales = [panel.images[1].norm for panel in figure.axes[:2]]
    assert [(s.vmin, s.vcenter, s.vmax) for s in scales] == [(-5, 0, 5)] * 2


def test_filters_side_by_side():
    """The sheet shows filters from left to right, input channels from top to bottom, with gaps between."""
    w = torch.arange(1.0, 3 * 2 * 2 * 2 + 1).reshape(3, 2, 2, 2)  # [out, in, kh, kw]
    w[1] = 0
    zeros, others = drawn(plot_filters({"some": w}).axes[0])
    sheet = np.where(others.mask, np.where(zeros.mask, np.nan, zeros.data), others.data)
    gap = np.nan
    expected = [
        [1, 2, gap, 0, 0, gap, 17, 18],
        [3, 4, gap, 0, 0, gap, 19, 20],
        [gap] * 8,
        [5, 6, gap, 0, 0, gap, 21, 22],
        [7, 8, gap, 0, 0, gap, 23, 24],
    ]
    np.testing.assert_array_equal(sheet, expected)


def test_of_a_model_the_last_layer_and_the_first_filters():
    """By default a model's last weight and first filters are drawn; names choose others."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Conv1d(2, 3, 3), nn.Conv1d(3, 3, 3), nn.Linear(6, 2))
    with torch.no_grad():
        model[3].weight[0] = 0
    titles = [plot(model).axes[0].get_title(loc="left") for plot in (plot_weights, plot_filters)]
    assert titles == ["3.weight: 50% nonzero", "1.weight: 100% nonzero"]
    named = plot_weights(model, ["3.weight", "0.weight"])
    assert [panel.get_title(loc="left")[:8] for panel in named.axes[:2]] == ["3.weight", "0.weight"]
    assert named.axes[0].images[1].get_array().shape == (2, 6)


def test_a_convolution_as_a_matrix():
    """plot_weights shows a convolution as [out, in*kh*kw]."""
    assert plot_weights({"some": torch.ones(4, 3, 2, 2)}).axes[0].images[1].get_array().shape == (4, 12)


def test_saved(tmp_path):
    """The figure can be saved as a PNG without a display."""
    plot_filters(nn.Conv2d(1, 4, 3)).savefig(tmp_path / "filters.png")
    assert (tmp_path / "filters.png").read_bytes().startswith(b"\x89PNG")


def test_refusals(monkeypatch):
    """Unknown names, inputs without anything to draw, and a missing matplotlib are errors that say so."""
    with pytest.raises(ValueError, match=r"names: expected names of .* got \['1.weight'\]"):
        plot_weights(nn.Linear(2, 2), ["weight", "1.weight"])
    with pytest.raises(ValueError, match=r"names: expected names of .* got 'weight'"):
        plot_weights(nn.Linear(2, 2), "weight")
    with pytest.raises(ValueError, match="names: expected a model to take them from, got a mapping"):
        plot_weights({"a": torch.ones(2, 2)}, ["a"])
    with pytest.raises(ValueError, match="expected something of 3 or more dims to show, got nothing"):
        plot_filters(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"bias: expected weights of 2 or more dims, got shape \(2,\)"):
        plot_weights({"bias": torch.ones(2)})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="figures need matplotlib: pip install matplotlib"):
        plot_weights(nn.Linear(2, 2))
