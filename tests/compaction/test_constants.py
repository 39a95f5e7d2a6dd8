"""Constants inside a network: which channels are constant, and that they are folded into biases."""

import pytest
import torch
import torch.nn.functional as F
from helpers.compacting import assert_same, conv, net, padded_pair, shapes
from torch import nn

from cges_kernels import compact
from cges_kernels.compaction.unknown import inputs_of_weights


def test_a_constant_in_front_of_zero_padding_stays():
    """Zero padding makes a constant act differently at the borders, so no bias can replace it."""
    result = compact(padded_pair(0.5), torch.randn(1, 1, 6, 6))
    assert shapes(result)["0.weight"] == (2, 1, 3, 3) and result.model[2].bias is None
    assert result.kept["2"] == (
        "constant inputs that stay: 1; what it makes of them differs at the borders (zero padding)"
    )
    assert "2: constant inputs that stay: 1" in str(result)


@pytest.mark.parametrize(
    "model",
    [
        padded_pair(0.0),
        padded_pair(-0.5, activation=nn.ReLU()),
        padded_pair(0.5, padding_mode="reflect"),
    ],
    ids=["bias 0", "relu of a negative bias", "padding by reflection"],
)
def test_a_constant_goes_where_padding_does_not_show_it(model):
    """A constant of 0, or padding by reflection, has the same effect everywhere."""
    result = compact(model, torch.randn(1, 1, 6, 6))
    assert shapes(result) == {"0.weight": (1, 1, 3, 3), "2.weight": (3, 1, 3, 3)} and not result.kept
    assert_same(result.model, model, torch.randn(2, 1, 6, 6))


def test_the_shift_of_a_batch_norm_becomes_a_new_bias():
    """What batch norm makes of a dead filter is added to the next layer, which gets a bias."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(), conv(2, 3, bias=False)
    )
    with torch.no_grad():
        model[0].weight[0] = 0
        model[1].running_mean.fill_(0.25)
        model[1].bias.fill_(1.0)
    result = compact(model, torch.randn(1, 1, 6, 6))
    assert shapes(result) == {"0.weight": (1, 1, 3, 3), "3.weight": (3, 1, 3, 3)}
    constant = 1 - 0.25 / (1 + 1e-5) ** 0.5  # what batch norm makes of the dead filter
    torch.testing.assert_close(result.model[3].bias, constant * model[3].weight[:, 0].sum((1, 2)))


@pytest.mark.parametrize(
    "swallow",
    [lambda x: torch.where(x > 0, x, 0), lambda x: x.nan_to_num(0.0).clamp(-1, 1)],
    ids=["where", "nan_to_num"],
)
def test_what_swallows_nan_is_no_constant(swallow):
    """An operation that replaces NaN does not fool the search for constants.

    Unknown values are marked with NaN and with infinities, and what stays free of the marks is constant.
    """

    def forward(self, x):
        return self.b(swallow(self.a(x)))

    model = net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    with torch.no_grad():
        model.a.weight[0] = 0
        model.a.bias[0] = 0.25
    found = inputs_of_weights(model.eval(), ((torch.ones(1, 3),), {}))["b.weight"]
    assert found.nan_to_num(9).tolist() == [0.25, 9, 9, 9]


def test_a_model_that_refuses_nan():
    """A model that raises on NaN keeps its channels, and the report says why."""

    def forward(self, x):
        if not x.isfinite().all():
            raise ValueError("not finite")
        return self.b(F.relu(self.a(x)))

    model = net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    with torch.no_grad():
        model.a.weight[0] = 0
        model.b.weight[:, 1] = 0
    result = compact(model, torch.randn(2, 3))
    assert shapes(result) == {"a.weight": (4, 3), "b.weight": (2, 4)}
    reason = "its forward pass may go other ways for other inputs"
    assert result.kept == {"a": f"dead or unread outputs that stay: 2; {reason}"}


def test_a_model_that_fails_on_nan():
    """A model that merely fails on NaN keeps its constants; the report holds the error."""

    def forward(self, x):
        return self.b(F.relu(self.a(x))) + self.table[(3 * x[:, 0].sigmoid()).long()]

    model = net(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 2))
    model.table = nn.Parameter(torch.randn(4, 2))
    assert not compact(model, torch.randn(2, 3)).kept
    with torch.no_grad():
        model.a.weight[0] = 0
    kept = compact(model, torch.randn(2, 3)).kept
    assert kept["Net"].startswith("constants stay: its forward pass fails on NaN or Inf with IndexError: ")
    assert list(kept) == ["Net", "a"]


def test_constants_are_found_through_everything():
    """Batch norm, pooling, concatenation and arithmetic pass constants on, with the right values."""

    def forward(self, x):
        a = F.relu(self.bn(self.conv(x)))
        b = torch.cat([F.max_pool2d(a, 2), a[..., ::2, ::2] * 2], 1)
        return self.fc((b + b.sigmoid()).flatten(1))

    model = net(forward, conv=conv(2, 3), bn=nn.BatchNorm2d(3), fc=nn.Linear(6 * 9, 2)).eval()
    with torch.no_grad():
        model.conv.weight[1] = 0
        model.bn.bias.fill_(0.5)
        model.conv.bias[1] = 2.0
    found = inputs_of_weights(model, ((torch.randn(1, 2, 8, 8),), {}))
    assert found["conv.weight"].isnan().all()
    a = torch.tensor(0.5 + 2 / (1 + 1e-5) ** 0.5)
    constants = found["fc.weight"].view(6, 9)
    assert constants[[0, 2, 3, 5]].isnan().all()
    for row, value in ((1, a), (4, 2 * a)):
        torch.testing.assert_close(constants[row], (value + value.sigmoid()).expand(9))
