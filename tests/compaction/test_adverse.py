"""Models whose behaviour a smaller copy could get wrong: in training, with state, by writing into memory."""

import copy

import pytest
import torch
from helpers.compacting import assert_same, conv, kill, mlp, net, plain, shapes
from torch import nn

from cges_kernels import compact

X = torch.randn(2, 5)


def in_training(other):
    """A forward that in training also returns what ``other`` makes of the hidden units."""

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
    """The smaller copy gives the same outputs in training mode, where more hidden units are read."""
    model = mlp(in_training(other))
    with torch.no_grad():
        model.a.weight[:2] = 0
        model.b.weight[:, 4] = 0
    result = compact(model, X)
    for mode in (True, False):
        ours, theirs = result.model.train(mode)(X), model.train(mode)(X)
        for a, b in zip(ours, theirs) if mode else [(ours, theirs)]:
            torch.testing.assert_close(a, b)


class Remembering(nn.Module):
    """A model that keeps tensors, a list and a buffer from call to call."""

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
    """The forward passes that compact() makes leave neither model in another state."""
    model = Remembering()
    result = compact(model, X)
    for m in (model, result.model):
        assert m.state is None and not m.seen and not m.mean.any()
    torch.testing.assert_close(result.model(X), model(X))


def test_what_a_forward_pass_makes_once_is_not_kept():
    """A tensor that the model caches in its first call is not in the copy."""

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
    """The caller's example is unchanged, and the copy computes the same."""

    def forward(self, x):
        x.mul_(2)
        return plain(self, x)

    model, x = kill(mlp(forward)), X.clone()
    result = compact(model, x)
    assert torch.equal(x, X)
    torch.testing.assert_close(result.model(X.clone()), model(X.clone()))


def test_many_refusals_end():
    """If every removal turns out wrong, the number of forward passes stays in proportion to the layers.

    Each layer divides by its width, so that every removal changes the outputs.
    """

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
    """compact() leaves weights, flags, gradients, modes and the random state of the model alone."""
    model = kill(mlp(plain)).train()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    flags = [(p.requires_grad, p.dtype, p.grad) for p in model.parameters()]
    compact(model, X)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [(p.requires_grad, p.dtype, p.grad) for p in model.parameters()] == flags
    assert torch.equal(rng, torch.get_rng_state()) and all(m.training for m in model.modules())


def test_sizes_that_training_writes_out_stay():
    """A layer keeps its width if code that runs only in training has it written out."""
    model = mlp(in_training(lambda self, hidden: hidden * torch.ones(8, dtype=hidden.dtype)))
    with torch.no_grad():
        model.b.weight[:, :2] = 0
    result = compact(model, X)
    result.model.train()(X)
    assert shapes(result)["a.weight"] == (8, 5)


def test_hooks_that_do_not_run_are_told():
    """A warning says that forward hooks do not run, because they could change the outputs."""
    model = kill(mlp(plain))
    model.a.register_forward_hook(lambda module, args, out: out.flip(-1))
    with pytest.warns(UserWarning, match="hooks of the model are not run"):
        compact(model, X)


def test_constants_that_training_makes_otherwise_are_folded():
    """A constant is folded by its value in eval mode.

    In training, a batch norm makes its shift of a dead filter, and something else in eval mode.
    """
    model = nn.Sequential(conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4))
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[1].running_mean.normal_()
        model[1].bias.fill_(0.5)
    result = compact(model, torch.randn(2, 3, 9, 9))
    assert shapes(result)["0.weight"] == (5, 3, 3, 3) and not result.kept


CANVASES = {
    "channels": lambda x, h: torch.cat([h.new_zeros(2, 0, *h.shape[2:]), _written(h, 1)], 1),
    "places": lambda x, h: _written(h, 2),
    "input first": lambda x, h: _written_after(x, h),
}


def _written(h, dim):
    """A copy of h, written into new memory in two halves along ``dim``."""
    out = h.new_zeros(h.shape)
    half = h.shape[dim] // 2
    out.narrow(dim, 0, half).copy_(h.narrow(dim, 0, half))
    out.narrow(dim, half, h.shape[dim] - half).copy_(h.narrow(dim, half, h.shape[dim] - half))
    return out


def _written_after(x, h):
    """x and h side by side along dim 1, written into new memory."""
    out = h.new_zeros(len(h), x.shape[1] + h.shape[1], *h.shape[2:])
    out[:, : x.shape[1]] = x
    out[:, x.shape[1] :] = h
    return out


@pytest.mark.parametrize("write", CANVASES.values(), ids=CANVASES)
def test_memory_that_is_written_in_parts(write):
    """Channels are followed through memory that is written in parts.

    That is done by line of memory: by element it would take hundreds of times as long as the network.
    """
    model = net(lambda self, x: self.b(write(x, self.a(x))), a=conv(3, 8, 1), b=conv(8, 4, 1))
    if write is CANVASES["input first"]:
        model.b = conv(11, 4, 1)
    with torch.no_grad():
        model.b.weight[:, -6:-2] = 0
    result = compact(model, torch.randn(2, 3, 96, 96))
    assert shapes(result)["a.weight"][0] == 4 and not result.kept
    assert_same(result.model, model, torch.randn(2, 3, 9, 9))
