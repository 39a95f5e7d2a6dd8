"""Layers, weights and examples of other kinds, which a smaller copy could get wrong."""

import pytest
import torch
import torch.nn.functional as F
from helpers.compacting import assert_same, conv, mlp, net, plain, shapes
from torch import nn

from cges_kernels import compact

X = torch.randn(2, 5)


def test_tables_of_a_largest_norm():
    """An embedding with max_norm, which rescales rows when used, is neither changed nor narrowed."""
    model = net(lambda self, i: self.a(self.e(i)), e=nn.Embedding(9, 4, max_norm=1.0), a=nn.Linear(4, 3))
    with torch.no_grad():
        model.a.weight[:, 0] = 0
    table = model.e.weight.detach().clone()
    result = compact(model, torch.tensor([[0, 3], [1, 2]]))
    assert torch.equal(model.e.weight, table) and shapes(result)["e.weight"] == (9, 4)
    i = torch.arange(9)[None]
    torch.testing.assert_close(result.model(i), model(i))


UNBATCHED = {
    "vector": (lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), (torch.randn(5),)),
    "image": (lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)), (torch.randn(3, 9, 9),)),
    "graph": (
        lambda: net(lambda self, x, a: self.b(a @ self.a(x).relu()), a=nn.Linear(5, 8), b=nn.Linear(8, 3)),
        (torch.randn(7, 5), torch.rand(7, 7)),
    ),
}


@pytest.mark.parametrize("make, example", UNBATCHED.values(), ids=UNBATCHED)
def test_examples_without_a_batch(make, example):
    """A vector, an image and a graph without a batch dimension are examples, too."""
    model = make()
    readers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    with torch.no_grad():
        readers[-1].weight[:, :3] = 0
    result = compact(model, example)
    assert min(shapes(result).values())[0] < 8 and result.parameters[1] < result.parameters[0]
    torch.testing.assert_close(result.model(*example), model(*example))


OTHERS = {
    "transposed, depthwise, two each": (
        lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 16, 3, groups=8), nn.ReLU(), conv(16, 4)),
        (2, 3, 9, 9),
    ),
    "projected": (
        lambda: net(lambda self, x: self.o(self.r(x)[0]), r=nn.LSTM(5, 8, proj_size=4), o=nn.Linear(4, 3)),
        (3, 2, 5),
    ),
    "one output": (lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1)), (2, 5)),
    "no layer": (lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), (2, 5)),
    "cells": (
        lambda: net(lambda self, x: self.o(self.c(x)[0]), c=nn.LSTMCell(5, 8), o=nn.Linear(8, 3)),
        (2, 5),
    ),
}


@pytest.mark.parametrize("make, shape", OTHERS.values(), ids=OTHERS)
def test_other_layers(make, shape):
    """Dense models of other layers stay as they are, and with dead rows they compute the same."""
    model = make()
    result = compact(model, torch.randn(shape))
    assert not result.kept and result.parameters[0] == result.parameters[1]
    with torch.no_grad():
        for p in model.parameters():
            p[:1] = 0 if len(p) > 1 else p[:1]
    assert_same(compact(model, torch.randn(shape)).model, model, torch.randn(shape))


def test_parameters_by_other_names():
    """Weights that are used by F.linear, under names of the model's own, are narrowed."""
    model = net(lambda self, x: F.linear(F.linear(x, self.first).relu(), self.second))
    model.first, model.second = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(3, 8))
    with torch.no_grad():
        model.second[:, :2] = 0
    result = compact(model, X)
    assert shapes(result) == {"first": (6, 5), "second": (3, 6)} and not result.kept
    torch.testing.assert_close(result.model(X), model(X))


def test_a_constant_matrix_in_between():
    """A product with a buffer between two layers mixes their channels."""
    model = mlp(lambda self, x: self.b((self.a(x) @ self.basis).relu()))
    model.register_buffer("basis", torch.randn(8, 8))
    with torch.no_grad():
        model.basis[:, 0] = 0
        model.a.weight[:2] = 0
    result = compact(model, X)
    torch.testing.assert_close(result.model(3 * X), model(3 * X))


def test_a_buffer_of_indices_is_not_dead():
    """An index of 0 in a buffer is not taken for a dead weight."""
    model = mlp(lambda self, x: plain(self, x).gather(1, self.k.expand(len(x), -1)))
    model.register_buffer("k", torch.tensor([[0, 2]]))
    assert not compact(model, X).kept


def test_experts_without_a_token():
    """A model with an expert that the example sends no row to is compacted, and its outputs stay."""

    def forward(self, x):
        out = torch.zeros_like(x)
        for i, expert in enumerate((self.a, self.b)):
            mine = (self.route(x).argmax(1) == i).nonzero().flatten()
            out = out.index_add(0, mine, expert(x[mine]))
        return out

    model = net(forward, a=nn.Linear(5, 5), b=nn.Linear(5, 5), route=nn.Linear(5, 2))
    with torch.no_grad():
        model.route.bias[0] = 1e3
    result = compact(model, X)
    assert not result.kept
    torch.testing.assert_close(result.model(X), model(X))
    large = torch.cat([1e4 * X, -1e4 * X])  # of which the second expert has some rows
    assert len(set(model.route(large).argmax(1).tolist())) == 2
    torch.testing.assert_close(result.model(large), model(large))


def causal(self, x):
    """A causally masked transformer layer."""
    mask = torch.triu(x.new_full((x.shape[1], x.shape[1]), -torch.inf), 1)
    return self.layer(x, src_mask=mask)


def test_masks_of_infinity_are_constants():
    """A mask of -inf does not count as a failure, and dead units behind it go."""
    model = net(causal, layer=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    with torch.no_grad():
        model.layer.linear1.weight[:4] = 0
    result = compact(model, torch.randn(2, 5, 8))
    assert result.model.layer.linear1.out_features == 12 and not result.kept
    assert_same(result.model, model, torch.randn(2, 5, 8))


@pytest.mark.parametrize(
    "merge", [lambda self: self.w * self.mask, lambda self: self.w + self.up @ self.down]
)
def test_weights_that_are_computed_are_not_followed(merge):
    """Dead rows of a computed weight stay and are reported.

    Following a channel for each of its elements would take far more time and memory than the network.
    """
    model = mlp(lambda self, x: self.b(F.linear(F.linear(x, self.first), merge(self)).relu()), 1024)
    model.first = nn.Parameter(torch.randn(1024, 5))
    model.w = nn.Parameter(torch.randn(1024, 1024))
    model.register_buffer("mask", (torch.rand(1024, 1024) > 0.5).float())
    model.up, model.down = nn.Parameter(torch.randn(1024, 4)), nn.Parameter(torch.randn(4, 1024))
    with torch.no_grad():
        model.w[:3] = 0
    result = compact(model, X)
    assert "w: dead rows and columns that stay: 3 and 0" in result.kept["w"]
    torch.testing.assert_close(result.model(X), model(X))


@pytest.mark.parametrize(
    "layer, shape", [(nn.Embedding(9, 5), None), (nn.LSTM(5, 6), (3, 2, 5)), (nn.PReLU(5), (2, 5))], ids=str
)
def test_other_layers_whose_weight_is_computed(layer, shape):
    """Embeddings, LSTMs and PReLUs with a parametrised weight are left as they are."""

    class Doubled(nn.Module):
        def forward(self, w):
            return 2 * w

    for name in [name for name, _ in layer.named_parameters()][:1]:
        nn.utils.parametrize.register_parametrization(layer, name, Doubled())
    model = net(
        lambda self, x: self.o(out[0] if isinstance(out := self.layer(x), tuple) else out), layer=layer
    )
    model.o = nn.Linear(6 if isinstance(layer, nn.LSTM) else 5, 3)
    x = torch.tensor([[0, 3], [1, 2]]) if shape is None else torch.randn(shape)
    result = compact(model, x)
    assert not result.kept
    torch.testing.assert_close(result.model(x), model(x))


def test_sparse_outputs():
    """A model may return sparse tensors."""
    model = mlp(lambda self, x: (plain(self, x), plain(self, x).to_sparse()))
    with torch.no_grad():
        model.b.weight[:, :2] = 0
    result = compact(model, X)
    torch.testing.assert_close(result.model(X)[0], model(X)[0])
