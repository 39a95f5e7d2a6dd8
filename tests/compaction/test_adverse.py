"""Networks that do what networks may do, and that a smaller copy could get wrong."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import assert_same, conv, kill, mlp, net, plain, shapes
from torch import nn

from cges_kernels import compact

X = torch.randn(2, 5)


# Training mode


def in_training(other):
    def forward(self, x):
        hidden = self.a(x).relu()
        out = self.b(hidden)
        return (out, other(self, hidden)) if self.training else out

    return forward


TRAINING = {
    "outputs": lambda self, hidden: hidden,
    "the same head once more": lambda self, hidden: self.b(hidden.flip(1)),
    "the same head on twice as much": lambda self, hidden: self.b(2 * hidden),
    "by numbers": lambda self, hidden: hidden[:, 2:6].sum(),
}


@pytest.mark.parametrize("other", TRAINING.values(), ids=TRAINING)
def test_what_training_gives_stays(other):
    model = mlp(in_training(other))
    with torch.no_grad():
        model.a.weight[:2] = 0
        model.b.weight[:, 4] = 0
    result = compact(model, X)
    for mode in (True, False):
        ours, theirs = result.model.train(mode)(X), model.train(mode)(X)
        for a, b in zip(ours, theirs) if mode else [(ours, theirs)]:
            torch.testing.assert_close(a, b)


# State and memory


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.o = nn.GRUCell(5, 8), nn.Linear(8, 3)
        self.state, self.seen = None, []
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        if self.state is None or self.state.shape[0] != len(x):
            self.state = x.new_zeros(len(x), 8)
        self.state = self.cell(x, self.state)
        self.seen.append(len(x))
        self.mean += self.state.detach().mean(0)
        return self.o(self.state) + self.mean.mean()


def test_forward_passes_leave_no_trace():
    model = Remembering()
    result = compact(model, X)
    for m in (model, result.model):
        assert m.state is None and not m.seen and not m.mean.any()
    torch.testing.assert_close(result.model(X), model(X))


def test_what_a_forward_pass_makes_once_is_not_kept():
    def forward(self, x):
        if self.scale is None:
            self.scale = x.new_ones(3)
        return plain(self, x) * self.scale

    model = mlp(forward)
    model.scale = None
    with torch.no_grad():
        model.b.weight[:, :2] = 0
    result = compact(model, X)
    assert result.model.scale is None and result.model(X).dtype == torch.float32


def test_a_model_that_writes_into_its_input():
    def forward(self, x):
        x.mul_(2)
        return plain(self, x)

    model, x = kill(mlp(forward)), X.clone()
    result = compact(model, x)
    assert torch.equal(x, X)
    torch.testing.assert_close(result.model(X.clone()), model(X.clone()))


def test_tables_of_a_largest_norm():
    model = net(lambda self, i: self.a(self.e(i)), e=nn.Embedding(9, 4, max_norm=1.0), a=nn.Linear(4, 3))
    with torch.no_grad():
        model.a.weight[:, 0] = 0
    table = model.e.weight.detach().clone()
    result = compact(model, torch.tensor([[0, 3], [1, 2]]))
    assert torch.equal(model.e.weight, table) and shapes(result)["e.weight"] == (9, 4)
    i = torch.arange(9)[None]
    torch.testing.assert_close(result.model(i), model(i))


# First dims that are none of a batch


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
    model = make()
    readers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    with torch.no_grad():
        readers[-1].weight[:, :3] = 0
    result = compact(model, example)
    assert min(shapes(result).values())[0] < 8 and result.parameters[1] < result.parameters[0]
    torch.testing.assert_close(result.model(*example), model(*example))


# Layers of other kinds


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
    model = make()
    result = compact(model, torch.randn(shape))
    assert not result.kept and result.parameters[0] == result.parameters[1]
    with torch.no_grad():
        for p in model.parameters():
            p[:1] = 0 if len(p) > 1 else p[:1]
    assert_same(compact(model, torch.randn(shape)).model, model, torch.randn(shape))


def test_parameters_by_other_names():
    model = net(lambda self, x: F.linear(F.linear(x, self.first).relu(), self.second))
    model.first, model.second = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(3, 8))
    with torch.no_grad():
        model.second[:, :2] = 0
    result = compact(model, X)
    assert shapes(result) == {"first": (6, 5), "second": (3, 6)} and not result.kept
    torch.testing.assert_close(result.model(X), model(X))


def test_a_constant_matrix_in_between():
    model = mlp(lambda self, x: self.b((self.a(x) @ self.basis).relu()))
    model.register_buffer("basis", torch.randn(8, 8))
    with torch.no_grad():
        model.basis[:, 0] = 0
        model.a.weight[:2] = 0
    result = compact(model, X)
    torch.testing.assert_close(result.model(3 * X), model(3 * X))


def test_a_buffer_of_indices_is_not_dead():
    model = mlp(lambda self, x: plain(self, x).gather(1, self.k.expand(len(x), -1)))
    model.register_buffer("k", torch.tensor([[0, 2]]))
    assert not compact(model, X).kept


def test_experts_without_a_token():
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


# Cost


def test_many_refusals_end():
    """Each layer divides by its width, so that every removal shows."""

    def forward(self, x):
        x = self.a(x).relu()
        return self.b(x / x.shape[1])

    blocks = [net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 6)) for _ in range(30)]
    kind = type(blocks[0])
    with torch.no_grad():
        for block in blocks:
            block.__class__ = kind
            block.b.weight[:, :2] = 0
    model, seen = nn.Sequential(*blocks), []
    original = kind.forward
    kind.forward = lambda self, x: (seen.append(1), original(self, x))[1]
    result = compact(model, torch.randn(2, 6))
    assert len(result.kept) == 30 and len(seen) < 30 * 60
    torch.testing.assert_close(result.model(torch.ones(1, 6)), model(torch.ones(1, 6)))


def test_a_copy_is_what_is_worked_on():
    model = kill(mlp(plain)).train()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    flags = [(p.requires_grad, p.dtype, p.grad) for p in model.parameters()]
    compact(model, X)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [(p.requires_grad, p.dtype, p.grad) for p in model.parameters()] == flags
    assert torch.equal(rng, torch.get_rng_state()) and all(m.training for m in model.modules())


def causal(self, x):
    mask = torch.triu(x.new_full((x.shape[1], x.shape[1]), -torch.inf), 1)
    return self.layer(x, src_mask=mask)


def test_masks_of_infinity_are_constants():
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
    """A channel for each of their elements would take far more time and memory than the network."""
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


def test_sizes_that_training_writes_out_stay():
    model = mlp(in_training(lambda self, hidden: hidden * torch.ones(8, dtype=hidden.dtype)))
    with torch.no_grad():
        model.b.weight[:, :2] = 0
    result = compact(model, X)
    result.model.train()(X)
    assert shapes(result)["a.weight"] == (8, 5)


def test_hooks_that_do_not_run_are_told():
    model = kill(mlp(plain))
    model.a.register_forward_hook(lambda module, args, out: out.flip(-1))
    with pytest.warns(UserWarning, match="hooks of the model are not run"):
        compact(model, X)


def test_constants_that_training_makes_otherwise_are_folded():
    """A batch norm makes of a dead filter its shift in training, and something else in eval mode."""
    model = nn.Sequential(conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4))
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[1].running_mean.normal_()
        model[1].bias.fill_(0.5)
    result = compact(model, torch.randn(2, 3, 9, 9))
    assert shapes(result)["0.weight"] == (5, 3, 3, 3) and not result.kept


def test_sparse_outputs():
    model = mlp(lambda self, x: (plain(self, x), plain(self, x).to_sparse()))
    with torch.no_grad():
        model.b.weight[:, :2] = 0
    result = compact(model, X)
    torch.testing.assert_close(result.model(X)[0], model(X)[0])


CANVASES = {
    "channels": lambda x, h: torch.cat([h.new_zeros(2, 0, *h.shape[2:]), _written(h, 1)], 1),
    "places": lambda x, h: _written(h, 2),
    "input first": lambda x, h: _written_after(x, h),
}


def _written(h, dim):
    out = h.new_zeros(h.shape)
    half = h.shape[dim] // 2
    out.narrow(dim, 0, half).copy_(h.narrow(dim, 0, half))
    out.narrow(dim, half, h.shape[dim] - half).copy_(h.narrow(dim, half, h.shape[dim] - half))
    return out


def _written_after(x, h):
    out = h.new_zeros(len(h), x.shape[1] + h.shape[1], *h.shape[2:])
    out[:, : x.shape[1]] = x
    out[:, x.shape[1] :] = h
    return out


@pytest.mark.parametrize("write", CANVASES.values(), ids=CANVASES)
def test_memory_that_is_written_in_parts(write):
    """Told apart by line: by element it would take hundreds of times the network."""
    model = net(lambda self, x: self.b(write(x, self.a(x))), a=conv(3, 8, 1), b=conv(8, 4, 1))
    if write is CANVASES["input first"]:
        model.b = conv(11, 4, 1)
    with torch.no_grad():
        model.b.weight[:, -6:-2] = 0
    result = compact(model, torch.randn(2, 3, 96, 96))
    assert shapes(result)["a.weight"][0] == 4 and not result.kept
    assert_same(result.model, model, torch.randn(2, 3, 9, 9))
