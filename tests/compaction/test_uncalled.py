"""Layers that the example's forward pass never calls: what they may read stays, and that is reported."""

import torch
from helpers.compacting import assert_same, net, shapes
from torch import nn

from cges_kernels import compact

NEVER = "takes no part in the forward pass, but may read them"


def with_head(self, x):
    """A forward with an auxiliary head in training mode."""
    x = self.a(x).relu()
    return (self.b(x), self.aux(x)) if self.training else self.b(x)


def network(forward, **more):
    """Eight units of which layer ``b`` reads four, and ``more`` modules."""
    model = net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 2), **more)
    with torch.no_grad():
        model.b.weight[:, :4] = 0
    return model


def test_what_an_auxiliary_head_reads_stays():
    """Units that only the head reads stay, and both modes give the same outputs."""
    model = network(with_head, aux=nn.Linear(8, 3))
    with torch.no_grad():
        model.aux.weight[:, 2:] = 0  # so that only channels 2 and 3 are read by no layer
    result = compact(model, torch.randn(3, 4))
    assert shapes(result) == {"a.weight": (6, 4), "b.weight": (2, 6), "aux.weight": (3, 6)}
    x = torch.randn(5, 4)
    for mode in (True, False):
        for ours, theirs in zip(result.model.train(mode)(x), model.train(mode)(x)):
            torch.testing.assert_close(ours, theirs)


def test_training_mode_leaves_no_trace():
    """A trial in training mode changes neither batch norm's statistics nor the modes."""
    model = net(
        lambda self, x: self.b(self.n(self.a(x))), a=nn.Linear(4, 8), n=nn.BatchNorm1d(8), b=nn.Linear(8, 2)
    )
    model.spare = nn.Linear(5, 5)
    result = compact(model.train(), torch.randn(3, 4))
    assert result.model.n.num_batches_tracked == 0 and torch.equal(
        result.model.n.running_mean, torch.zeros(8)
    )
    assert result.model.training and model.training


def test_an_optional_branch_holds_what_it_may_read():
    """Units stay if a layer in a branch not taken could read them."""

    def forward(self, x, twice=False):
        x = self.a(x).relu()
        return self.b(x) + self.again(x) if twice else self.b(x)

    model = network(forward, again=nn.Linear(8, 2))
    result = compact(model, torch.randn(3, 4))
    assert shapes(result) == {"a.weight": (8, 4), "b.weight": (2, 8), "again.weight": (2, 8)}
    assert result.kept == {"a": f"dead or unread outputs that stay: 4; again {NEVER}"}
    x = torch.randn(5, 4)
    torch.testing.assert_close(result.model(x, twice=True), model(x, twice=True))


def test_a_branch_of_other_sizes_holds_nothing():
    """A layer that was not called, of sizes that do not fit, holds nothing."""

    def forward(self, x, other=None):
        return self.b(self.a(x).relu()) if other is None else self.other(other)

    model = network(forward, other=nn.Linear(7, 5))
    result = compact(model, torch.randn(3, 4))
    assert shapes(result)["a.weight"] == (4, 4) and not result.kept


def test_a_parameter_that_takes_no_part_holds_its_size():
    """A bare parameter that was not used holds units of its size."""

    def forward(self, x, scaled=False):
        x = self.a(x).relu()
        return self.b(x * self.scale if scaled else x)

    model = network(forward)
    model.scale = nn.Parameter(torch.ones(8))
    result = compact(model, torch.randn(3, 4))
    assert shapes(result)["a.weight"] == (8, 4)
    assert result.kept == {"a": f"dead or unread outputs that stay: 4; scale {NEVER}"}
    assert_same(result.model, model, torch.randn(3, 4))


def test_a_training_mode_that_fails_is_none():
    """If the forward fails in training mode, its layers count as never called."""

    def forward(self, x, targets=None):
        x = self.a(x).relu()
        if self.training:
            return self.aux((x, targets))
        return self.b(x)

    model = network(forward, aux=nn.Linear(8, 3))
    result = compact(model, torch.randn(3, 4))
    assert shapes(result)["a.weight"] == (8, 4) and f"aux {NEVER}" in result.kept["a"]
