"""Networks beyond the usual chain: sizes that vary, layers called twice, packed sequences, scaled weights."""

import pytest
import torch
from helpers.compacting import assert_same, conv, dead, mlp, net, plain, shapes, unread
from torch import nn
from torch.distributions import Distribution, Normal
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from cges_kernels import compact

X = torch.randn(3, 5)


# Constants


def pooled(self, x):
    return self.o(self.l(self.b(self.a(x).relu()).mean((2, 3, 4))))


def positions(self, x):
    return self.o((self.l(self.a(x)) + self.table[: x.shape[1]]).relu().mean(1))


def padded_in_time():
    """A 3d network whose only padding is of the third dim."""
    b = nn.Conv3d(4, 3, (3, 1, 1), padding=(1, 0, 0))
    return net(pooled, a=nn.Conv3d(2, 4, 1), b=b, l=nn.Linear(3, 6), o=nn.Linear(6, 2))


def with_positions():
    """A model for sequences of up to nine tokens, each with its line of a table."""
    model = net(positions, a=nn.Embedding(9, 6), l=nn.Linear(6, 4), o=nn.Linear(4, 2))
    model.table = nn.Parameter(torch.randn(9, 4))
    return model


@pytest.mark.parametrize(
    "make, dies, example, other",
    [
        (padded_in_time, "a", torch.randn(2, 2, 4, 3, 3), torch.randn(1, 2, 7, 3, 2)),
        (with_positions, "l", torch.randint(9, (2, 6)), torch.randint(9, (2, 4))),
    ],
)
def test_constants_that_depend_on_the_size(make, dies, example, other):
    """What padding or a table of positions makes of constants is another number for another size.

    The table has too few lines for twice the length of the example.
    """
    model = make()
    with torch.no_grad():
        getattr(model, dies).weight.zero_()
    result = compact(model, example)
    torch.testing.assert_close(result.model(other), model(other))


def test_constants_differ_by_rounding():
    """The mean of a constant is one constant, although for another size its last bits are others."""
    model = nn.Sequential(conv(2, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6)).double()
    with torch.no_grad():
        model[0].bias.copy_(torch.arange(8).double() / 7)  # float32's sums would be exact
    dead(model[0], slice(0, 6))
    result = compact(model, torch.randn(2, 2, 9, 9).double())
    assert shapes(result)["3.weight"] == (6, 2)
    assert_same(result.model, model, torch.randn(3, 2, 12, 7))


def test_constants_beside_a_sign_that_turns():
    """A batch norm with a negative scale hides no constant of the channels beside it."""
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[1].weight[:2] = -1
    dead(model[2], slice(0, 3))
    result = compact(model, X)
    assert shapes(result)["4.weight"] == (2, 5)
    assert_same(result.model, model, X)


def test_constants_of_a_layer_that_is_called_twice():
    """They are folded if both calls read the same; a constant that differs from call to call stays."""

    def siamese(self, x, y):
        return self.o(torch.cat([self.b(self.a(z).relu()).relu() for z in (x, y)], -1))

    model = net(siamese, a=nn.Linear(5, 8), b=nn.Linear(8, 4), o=nn.Linear(8, 2))
    dead(model.a, slice(0, 3))
    result = compact(model, (X, X + 1))
    assert shapes(result) == {"a.weight": (5, 5), "b.weight": (4, 5), "o.weight": (2, 8)}
    torch.testing.assert_close(result.model(2 * X, X - 1), model(2 * X, X - 1))

    model = net(lambda self, x: self.b(self.a(x)) + self.b(self.c(x)), b=nn.Linear(8, 3))
    model.a, model.c = nn.Linear(5, 8), nn.Linear(5, 8)
    dead(model.a, slice(0, 3))
    dead(model.c, slice(0, 3))
    result = compact(model, X)
    assert shapes(result)["b.weight"] == (3, 8) and "outputs change" not in str(result)
    assert_same(result.model, model, X)


# Operations


def test_packed_sequences():
    """The columns of the embedding and the units of the LSTM go, whatever the lengths."""

    def forward(self, x, lengths):
        packed = pack_padded_sequence(self.e(x), lengths, batch_first=True, enforce_sorted=False)
        return self.o(pad_packed_sequence(self.r(packed)[0], batch_first=True)[0])

    model = net(forward, e=nn.Embedding(9, 6), r=nn.LSTM(6, 4, batch_first=True), o=nn.Linear(4, 2))
    with torch.no_grad():
        model.r.weight_ih_l0[:, :2] = 0
        model.r.weight_hh_l0[:, 0] = 0
    unread(model.o, 0)
    result = compact(model, (torch.randint(9, (3, 5)), torch.tensor([2, 5, 3])))
    assert shapes(result)["e.weight"] == (9, 4) and shapes(result)["r.weight_hh_l0"] == (12, 3)
    other = torch.randint(9, (4, 6)), torch.tensor([6, 1, 4, 4])
    torch.testing.assert_close(result.model(*other), model(*other))


def test_bags_with_offsets():
    """Offsets must begin with 0 and rise, so few other values of them can be tried."""
    model = net(lambda self, x, at: self.o(self.e(x, at)), e=nn.EmbeddingBag(9, 6), o=nn.Linear(6, 2))
    unread(model.o, slice(0, 2))
    small = compact(model, (torch.randint(9, (8,)), torch.tensor([0, 3, 6]))).model
    assert small.e.weight.shape == (9, 4) and small.e.embedding_dim == 4
    other = torch.randint(9, (8,)), torch.tensor([0, 2, 2])
    torch.testing.assert_close(small(*other), model(*other))


def test_distributions_that_check_their_arguments(monkeypatch):
    """The check of a distribution is no branch on the input, and is done as before afterwards."""
    monkeypatch.setattr(Distribution, "_validate_args", True)
    model = mlp(lambda self, x: Normal(plain(self, x), self.std.exp()).mean)
    model.std = nn.Parameter(torch.zeros(3))
    unread(model.b, slice(0, 3))
    result = compact(model, X)
    assert shapes(result)["a.weight"] == (5, 5) and Distribution._validate_args


def test_pooling_in_channels_last():
    """The channels behind a global pooling go in this memory format too."""
    model = nn.Sequential(conv(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    unread(model[3], slice(0, 3))
    result = compact(model.to(memory_format=torch.channels_last), torch.randn(2, 3, 6, 6))
    assert shapes(result)["0.weight"] == (5, 3, 3, 3)


class Scaled(nn.Linear):
    """A Linear with an equalised learning rate: its weight is a multiple of the parameter."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.in_features**0.5 / 7, self.bias)


def in_bfloat16(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = self.a(x).relu()
    return self.b(hidden.float())


@pytest.mark.parametrize("scaled", [True, False], ids=["a multiple", "a cast"])
def test_weights_that_are_scaled_or_cast(scaled):
    """A multiple of a parameter has the parameter's channels."""
    model = net(plain, a=Scaled(5, 8), b=Scaled(8, 3)) if scaled else mlp(in_bfloat16)
    unread(model.b, slice(0, 3))
    result = compact(model, X)
    if scaled:
        assert result.kept["a"].endswith("without them the outputs change")  # in_features is in the scale
    else:
        assert shapes(result) == {"a.weight": (5, 5), "b.weight": (3, 5)}
    torch.testing.assert_close(result.model(X + 1), model(X + 1), rtol=1e-2, atol=1e-2)


# Attributes


class Tapped(nn.Module):
    """A model that reads what a hook has put into an attribute."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.tapped = nn.Linear(5, 8), nn.Linear(8, 3), None
        self.a.register_forward_hook(self.tap)

    def tap(self, module, args, out):
        self.tapped = out

    def forward(self, x):
        return self.b(self.a(x).relu()) + self.b(self.tapped)


@pytest.mark.parametrize("grad", [False, True])
def test_tensors_of_an_earlier_call(grad):
    """What a hook left behind is no constant, and it may have a gradient, with which it does not copy."""
    model = Tapped()
    unread(model.b, slice(0, 3))
    with torch.set_grad_enabled(grad):
        model(X)
    result = compact(model, X)
    assert shapes(result) == {"a.weight": (5, 5), "b.weight": (3, 5)}
    torch.testing.assert_close(result.model(X - 1), model(X - 1))


def test_a_hook_that_holds_on_to_the_original():
    """No copy of such a model runs as the model does, which the error says."""
    model = mlp(lambda self, x: plain(self, x) + self.seen["a"].mean())
    model.seen = {}
    model.a.register_forward_hook(lambda module, args, out: model.seen.update(a=out))
    with pytest.raises(ValueError, match=r"Net: expected a copy .* got KeyError"), pytest.warns(UserWarning):
        compact(model, X[:2])
