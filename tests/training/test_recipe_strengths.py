"""How strongly a recipe regularises each layer: coefficients, scales, and CGES's schedule over layers."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from helpers.recipes import COEFFICIENTS, by_name, mlp
from torch import nn

from cges_kernels import ProxSGD
from cges_kernels.training.recipes import cges_param_groups, exclusivity_schedule, sparsity_param_groups


def test_schedule_by_hand():
    """mu goes evenly from m at the first layer to 1 - m at the last."""
    assert exclusivity_schedule(3, 0.2) == pytest.approx([0.2, 0.5, 0.8], abs=1e-15)
    assert exclusivity_schedule(5, 0.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert exclusivity_schedule(2, 1.0) == [1.0, 0.0]
    assert exclusivity_schedule(1, 0.3) == [0.3]


def test_schedule_stays_in_the_unit_interval():
    """Rounding leaves no mu below 0 or above 1, whatever m and the number of layers."""
    for layers, k in itertools.product((2, 3, 7, 50), range(101)):
        mu = exclusivity_schedule(layers, k / 100)
        assert min(mu) >= 0 and max(mu) <= 1
        assert mu[-1] == pytest.approx(1 - k / 100, abs=1e-15)


@pytest.mark.parametrize("layers, m", [(0, 0.1), (-1, 0.1), (2.0, 0.1), (True, 0.1), (3, -0.1), (3, 1.1)])
def test_schedule_refuses(layers, m):
    """No layers, a float or bool as their number, and m outside [0, 1] are errors."""
    with pytest.raises(ValueError, match=r"expected .* got"):
        exclusivity_schedule(layers, m)


def test_one_value_per_layer_and_layers_with_equal_keys_share_a_group():
    """A list gives one value per layer, and layers with equal options share a param group."""
    groups = sparsity_param_groups(mlp(3, 4, 5, 2), group_lasso=[0.1, 0.2, 0.1], l1=0.5)
    assert [[name for name, _ in group["params"]] for group in groups] == [
        ["0.weight", "2.weight"],
        ["1.weight"],
        ["0.bias", "1.bias", "2.bias"],
    ]
    assert [(group["group_lasso"], group["l1"]) for group in groups] == [(0.1, 0.5), (0.2, 0.5), (0.0, 0.0)]


@pytest.mark.parametrize(
    "value, message",
    [([0.1], "a number or 2 values, one per layer, got 1"), (-1.0, ">= 0, got"), ([0, math.inf], "finite")],
)
def test_wrong_values_are_refused(value, message):
    """A wrong number of values, negative and infinite ones are errors for every coefficient."""
    for key in (*COEFFICIENTS, "weight_decay"):
        with pytest.raises(ValueError, match=f"{key}: expected .*{message}"):
            sparsity_param_groups(mlp(3, 4, 2), **{key: value})


def test_what_is_zero_everywhere_is_left_to_the_optimizer():
    """An option that the recipe leaves at 0 takes the optimizer's default, except penalties of biases."""
    model = mlp(3, 4, 2)
    optimizer = ProxSGD(sparsity_param_groups(model, l1=0.1), weight_decay=5e-4, group_lasso=0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 5e-4]
    assert [group["group_lasso"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert [group["l1"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_weight_decay_given_here_is_for_the_layer_weights_only():
    """Biases get no weight decay then."""
    groups = sparsity_param_groups(mlp(3, 4, 2), weight_decay=[0.0, 5e-4])
    assert [group["weight_decay"] for group in groups] == [0.0, 5e-4, 0.0]


def test_scale_by_size():
    """group_lasso is multiplied by the root of the group size, exclusive_lasso divided by the size."""
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Conv2d(4, 9, 1))
    for group_by, sizes in (("feature", (4, 9)), ("filter", (12, 4))):
        groups = sparsity_param_groups(
            model, group_lasso=0.1, exclusive_lasso=0.2, l1=0.3, group_by=group_by, scale="size"
        )
        for group, n in zip(groups, sizes):
            assert group["group_lasso"] == pytest.approx(0.1 * math.sqrt(n))
            assert group["exclusive_lasso"] == pytest.approx(0.2 / n)
            assert group["l1"] == 0.3


def test_scale_by_hand():
    """A dict gives (group lasso, exclusive lasso) factors to the layers that it names."""
    groups = by_name(
        sparsity_param_groups(
            mlp(3, 4, 2), group_lasso=0.1, exclusive_lasso=[0.2, 0.4], scale={"1.weight": (10, 0.5)}
        )
    )
    assert [groups["0.weight"][key] for key in COEFFICIENTS[:2]] == [0.1, 0.2]
    assert [groups["1.weight"][key] for key in COEFFICIENTS[:2]] == [1.0, 0.2]


@pytest.mark.parametrize(
    "scale, message",
    [
        ({"0.bias": (1, 1)}, r"expected names among \['0.weight', '1.weight'\], got \['0.bias'\]"),
        ({"0.weight": (1,)}, "expected two finite factors"),
        ({"0.weight": (1, -1)}, "expected two finite factors"),
        ("sqrt", "expected None, 'size' or a dict .* got 'sqrt'"),
    ],
)
def test_scale_refuses(scale, message):
    """Unknown names, missing or negative factors and unknown words are errors."""
    with pytest.raises(ValueError, match=message):
        sparsity_param_groups(mlp(3, 4, 2), group_lasso=0.1, scale=scale)
    for pair in (1, ("a", 1)):
        with pytest.raises(ValueError, match=r"scale\['0.weight'\]: expected two finite factors >= 0, got"):
            sparsity_param_groups(mlp(3, 4, 2), group_lasso=0.1, scale={"0.weight": pair})


def test_cges_shares_lambda_by_the_schedule():
    """Layer l gets lam*(1 - mu_l) of group lasso and lam*mu_l of exclusive lasso."""
    groups = cges_param_groups(mlp(3, 4, 5, 2), lam=0.1, m=0.2)
    assert [group["group_lasso"] for group in groups] == pytest.approx([0.08, 0.05, 0.02, 0])
    assert [group["exclusive_lasso"] for group in groups] == pytest.approx([0.02, 0.05, 0.08, 0])


def test_cges_counts_the_included_layers_only():
    """The schedule runs over the included layers."""
    groups = cges_param_groups(mlp(3, 4, 5, 2), 0.1, 0.2, include=["0.weight", "2.weight"], scale="size")
    assert [group["group_lasso"] for group in groups[:-1]] == pytest.approx(
        [0.08 * math.sqrt(4), 0.02 * math.sqrt(2)]
    )


@pytest.mark.parametrize("value", ["1e-3", None, b"ab", {0.1}, ["0.1"], True])
def test_a_coefficient_that_is_no_number_is_refused(value):
    """Text, None, bytes, sets and bools are TypeErrors that show the value."""
    for key in ("group_lasso", "weight_decay"):
        text = re.escape(f"{key}: expected a number or one value per layer, got {value!r}")
        with pytest.raises(TypeError, match=text):
            sparsity_param_groups(nn.Linear(3, 2), **{key: value})
        for wrong in (dict(names="False"), dict(lam="1e-3"), dict(lam=True)):
            helper = cges_param_groups if "lam" in wrong else sparsity_param_groups
            with pytest.raises(TypeError, match=f"{next(iter(wrong))}: expected a (bool|number), got"):
                helper(nn.Linear(3, 2), **wrong)


def test_coefficients_may_be_tensors_and_arrays():
    """Tensors, arrays and tuples of them become plain numbers, one per layer."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    for value in (torch.tensor([0.25, 0.5]), np.array([0.25, 0.5]), (0.25, torch.tensor(0.5))):
        groups = sparsity_param_groups(model, l1=value)
        assert [group["l1"] for group in groups] == [0.25, 0.5, 0.0]
    assert sparsity_param_groups(model, l1=torch.tensor(0.25))[0]["l1"] == 0.25
