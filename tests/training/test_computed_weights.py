"""Recipes for models with weights that are no parameters, but computed from some: a warning names them."""

import warnings

import pytest
from helpers.layers import Conv1D
from torch import nn
from torch.nn.utils import parametrizations, prune

from cges_kernels import prune_to_density
from cges_kernels.training.layers import regularised_weights
from cges_kernels.training.recipes import cges_param_groups, sparsity_param_groups


def test_a_weight_that_is_computed_from_others_is_not_a_layer():
    """regularised_weights leaves such weights out."""
    lstm = parametrizations.weight_norm(nn.LSTM(3, 2), "weight_hh_l0")
    assert [w.name for w in regularised_weights(lstm)] == ["weight_ih_l0"]
    model = nn.Sequential(prune.identity(nn.Linear(3, 4), "weight"), nn.Linear(4, 2))
    assert [w.name for w in regularised_weights(model)] == ["1.weight"]


COMPUTED = {
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_weights_that_are_no_parameters_are_named(compute):
    """One warning names them; a model without other weights is an error.

    No warning comes where such weights were not asked for.
    """
    for make in (lambda: nn.Linear(4, 4), lambda: nn.Conv2d(4, 4, 3)):
        model = nn.Sequential(compute(make()), nn.Sequential(nn.Linear(4, 4)))
        for helper in (sparsity_param_groups, cges_param_groups):
            options = dict(group_lasso=0.1) if helper is sparsity_param_groups else dict(lam=0.1)
            with pytest.warns(
                UserWarning, match=r"Sequential: no penalty for \['0.weight'\], which are no param"
            ) as seen:
                groups = helper(model, **options)
            assert len(seen) == 1
            assert [name for name, _ in groups[0]["params"]] == ["1.0.weight"]
        with pytest.warns(UserWarning, match=r"nothing is pruned for \['0.weight'\]"):
            prune_to_density(model, 0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sparsity_param_groups(model, group_lasso=0.1, include=["1.0.weight"])
            sparsity_param_groups(model[1], group_lasso=0.1)
        with pytest.raises(ValueError, match=r"got none but \['0.weight'\], which are computed from other"):
            sparsity_param_groups(model[:1], group_lasso=0.1)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_some_of_a_layers_weights_may_be_no_parameters():
    """The other weights of the same layer are regularised."""
    model = nn.Sequential(nn.utils.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"))
    with pytest.warns(UserWarning, match=r"no penalty for \['0.weight_hh_l0'\], which"):
        groups = sparsity_param_groups(model, l1=0.1)
    assert [name for name, _ in groups[0]["params"]] == ["0.weight_ih_l0"]


def test_a_parametrized_conv1d_is_named():
    """Hugging Face's Conv1D is recognised too."""
    model = nn.Sequential(parametrizations.weight_norm(Conv1D(4, 3)), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match=r"no penalty for \['0.weight'\]"):
        sparsity_param_groups(model, l1=0.1)
