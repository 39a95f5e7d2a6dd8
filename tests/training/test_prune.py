"""prune_to_density: which weights are left, which are held at zero, and rounds of pruning and retraining."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cges_kernels import (
    ProxAdamW,
    ProxSGD,
    cges_param_groups,
    density_schedule,
    prune_to_density,
    sparsity_param_groups,
)
from examples.common.data import load


def mlp():
    """A network of 80 + 40 weights."""
    return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 5))


def nonzeros(model):
    """The numbers of nonzero weights of both layers."""
    return [int(torch.count_nonzero(model[i].weight)) for i in (0, 2)]


# The schedule


def test_schedules_end_at_the_density():
    """Each curve falls to the density, by the values of its formula."""
    assert density_schedule(0.1, 1) == [0.1]
    assert density_schedule(0.25, 2) == pytest.approx([0.5, 0.25])
    assert density_schedule(0.2, 4, "linear") == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert density_schedule(0.1, 2, "cubic") == pytest.approx([1 - 0.9 * 0.875, 0.1])
    for curve in ("geometric", "cubic", "linear"):
        densities = density_schedule(0.03, 7, curve)
        assert densities[-1] == 0.03 and densities == sorted(densities, reverse=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0.0, 3), r"density: expected a fraction of nonzero weights in \(0, 1\], got 0.0"),
        ((1.5, 3), r"density: expected .* got 1.5"),
        ((float("nan"), 3), "density: expected .* got nan"),
        ((0.1, 0), "rounds: expected an int >= 1, got 0"),
        ((0.1, 2, "sudden"), "curve: expected one of .* got 'sudden'"),
    ],
)
def test_schedules_refuse(arguments, message):
    """Densities outside (0, 1], no rounds and unknown curves are errors."""
    with pytest.raises(ValueError, match=message):
        density_schedule(*arguments)


# One pruning


def test_the_largest_weights_of_all_layers_stay():
    """One threshold for all layers: exactly the largest weights stay, and biases are untouched."""
    model = mlp()
    with torch.no_grad():
        model[2].weight *= 2
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert prune_to_density(model, 0.25) == 30 / 120
    assert sum(nonzeros(model)) == 30 and nonzeros(model)[1] > 15 > nonzeros(model)[0] > 0
    weights = torch.cat([before[f"{i}.weight"].flatten().abs() for i in (0, 2)])
    threshold = weights.sort(descending=True).values[29]
    for i in (0, 2):
        w = before[f"{i}.weight"]
        assert torch.equal(model[i].weight, torch.where(w.abs() >= threshold, w, 0))
        assert torch.equal(model[i].bias, before[f"{i}.bias"])


def test_by_layer():
    """scope="layer" prunes each layer to the density, whatever its scale."""
    model = mlp()
    with torch.no_grad():
        model[2].weight *= 10
    assert prune_to_density(model, 0.25, scope="layer") == 0.25
    assert nonzeros(model) == [20, 10]


def test_equal_magnitudes_are_cut_exactly():
    """Ties are broken so that the density is exact, in the order of the layers."""
    model = mlp()
    with torch.no_grad():
        model[0].weight.fill_(-1)
        model[2].weight.fill_(1)
    with pytest.warns(UserWarning, match="2.weight"):
        prune_to_density(model, 0.5)
    assert nonzeros(model) == [60, 0]


def test_what_is_sparser_stays():
    """A model that is sparser than asked for is not changed."""
    model = mlp()
    with torch.no_grad():
        model[0].weight[:, 1:] = 0
    before = [model[i].weight.clone() for i in (0, 2)]
    assert prune_to_density(model, 0.4) == 48 / 120
    assert all(torch.equal(a, model[i].weight) for a, i in zip(before, (0, 2)))


def test_include_chooses_the_weights():
    """Only the included weights are pruned and counted."""
    model = mlp()
    prune_to_density(model, 0.1, include=["2.weight"])
    assert nonzeros(model) == [80, 4]


def test_an_emptied_layer_is_named():
    """A layer without any weight left is named in a warning."""
    model = mlp()
    with torch.no_grad():
        model[0].weight *= 1e-3
    with pytest.warns(UserWarning, match=r"0\.weight: no weight is left nonzero at density 0.1"):
        prune_to_density(model, 0.1)


# With an optimizer


def trained(model, optimizer, steps=3):
    """Trains for some steps on random data."""
    x = torch.randn(6, 10)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


MAKERS = [partial(ProxSGD, lr=0.1, momentum=0.9), partial(ProxAdamW, lr=0.01)]


def test_what_is_pruned_stays_zero_in_retraining(backend):
    """Pruned weights lose their states and stay 0, while the other weights and biases train on."""
    for make in MAKERS:
        check_retraining(make, backend)


def check_retraining(make, backend):
    """Prunes a model in the middle of training, and trains on."""
    model = mlp()
    optimizer = make(sparsity_param_groups(model, weight_decay=1e-3), backend=backend)
    trained(model, optimizer)
    prune_to_density(model, 0.3, optimizer=optimizer)
    masks = [model[i].weight != 0 for i in (0, 2)]
    for i, mask in zip((0, 2), masks):
        states = [x for key, x in optimizer.state[model[i].weight].items() if key != "step"]
        assert states and all(x[mask].any() and not x[~mask].any() for x in states)
    before = [model[i].weight.detach().clone() for i in (0, 2)]
    biases = [model[i].bias.detach().clone() for i in (0, 2)]
    trained(model, optimizer)
    for i, mask, old, bias in zip((0, 2), masks, before, biases):
        assert torch.equal(model[i].weight != 0, mask)
        assert not torch.equal(model[i].weight, old) and not torch.equal(model[i].bias, bias)
    assert [group["freeze_zeros"] for group in optimizer.param_groups] == ["element", None]


def test_without_freezing_momentum_and_gradient_bring_weights_back():
    """freeze_zeros=None leaves them free."""
    for make in MAKERS:
        model = mlp()
        optimizer = make(sparsity_param_groups(model, weight_decay=1e-3))
        prune_to_density(model, 0.3, optimizer=optimizer, freeze_zeros=None)
        trained(model, optimizer)
        assert sum(nonzeros(model)) > 36


def test_refusals():
    """Bad arguments, optimizers that do not fit and NaN weights are errors, and nothing was pruned."""
    model = mlp()
    weights = [model[0].weight, model[2].weight]
    before = [w.detach().clone() for w in weights]
    for density in (0, -0.1, 1.01, float("nan"), "1", True):
        with pytest.raises(ValueError, match=r"density: expected a fraction of nonzero weights in \(0, 1\]"):
            prune_to_density(model, density)
    with pytest.raises(ValueError, match=r"scope: expected one of .* got 'model'"):
        prune_to_density(model, 0.5, scope="model")
    with pytest.raises(ValueError, match=r"freeze_zeros: expected one of .* got 'weight'"):
        prune_to_density(model, 0.5, freeze_zeros="weight")
    with pytest.raises(
        ValueError, match=r"expected to keep a weight of 0\.weight, 2\.weight, got 0.001 of 120"
    ):
        prune_to_density(model, 0.001)
    with pytest.raises(ValueError, match=r"holds the weights to prune, got none of \['0\.weight'\]"):
        prune_to_density(model, 0.5, optimizer=ProxSGD(model[2].parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"only weights to prune in param_groups\[0\], .* got 2 others"):
        prune_to_density(model, 0.5, optimizer=ProxSGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"freeze_zeros='element': expected .* got SGD"):
        prune_to_density(model, 0.5, optimizer=torch.optim.SGD(weights, lr=0.1))
    assert all(torch.equal(a, b) for a, b in zip(before, weights)) and sum(nonzeros(model)) == 120
    with pytest.raises(ValueError, match=r"weight: expected a whole tensor with values, got one on the meta"):
        prune_to_density(nn.Linear(2, 2, device="meta"), 0.5)
    with pytest.raises(TypeError, match="optimizer: expected an Optimizer, got list"):
        prune_to_density(model, 0.5, optimizer=weights)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"2\.weight: expected finite weights"):
        prune_to_density(model, 0.5)


def test_rounds_of_pruning_on_digits():
    """A tenth of the weights, in four rounds with CGES in retraining, does about as well as all of them."""
    pytest.importorskip("sklearn")
    x, y = map(torch.from_numpy, load("digits")[:2])
    x, y, unseen, answers = x[:1200].flatten(1), y[:1200], x[1200:].flatten(1), y[1200:]
    model = nn.Sequential(nn.Linear(64, 60), nn.ReLU(), nn.Linear(60, 10))
    optimizer = ProxSGD(cges_param_groups(model, 1e-3, scale="size"), lr=0.1, momentum=0.9)

    def train(epochs):
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(60):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
        return (model(unseen).argmax(1) == answers).float().mean().item()

    dense = train(15)
    for density in density_schedule(0.1, 4):
        assert prune_to_density(model, density, optimizer=optimizer) <= density + 1e-3
        accuracy = train(8)
    left = sum(nonzeros(model))
    assert left <= 0.1 * 4440 + 1
    assert dense > 0.85 and accuracy > dense - 0.03
