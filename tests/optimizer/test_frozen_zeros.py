"""freeze_zeros: weights that are 0 before a step stay 0, and their momentum becomes 0."""

import pytest
import torch
from helpers.right import as_large_as_may_be
from helpers.steps import PENALTY, bits, give_grads, parameters, train
from helpers.tiers import covering

from cges_kernels import ProxSGD, available_backends

SHAPES = [(6, 5), (130, 70), (4, 3, 3, 3), (9,)]
LARGE = {"filter": [(2, 600_000)], "feature": [(40_000, 16)]}  # groups that fit into no cache
FREEZES = ("element", "group")
PENALTIES = [{}, PENALTY, dict(PENALTY, prox_mode="exact")]


def partly_zero(shapes, dtype):
    """Parameters of which some elements, and some groups of each spec, are 0, with either sign."""
    params = parameters(shapes, dtype)
    for p in params:
        p.data.view(-1)[::3] = 0.0
        p.data.view(-1)[1::6] = -0.0
        if p.dim() >= 2:
            p.data[:, :1] = 0.0  # whole groups of "feature" and "channel"
            p.data[-1:] = -0.0  # and a group of "filter"
    return params


def frozen_entries(w, mode, group_by):
    """The entries that this mode freezes, written naively."""
    if mode == "element":
        return w == 0
    if w.dim() < 2:
        return torch.zeros_like(w, dtype=torch.bool)
    dims = {"feature": [0], "filter": list(range(1, w.dim())), "channel": [0, *range(2, w.dim())]}[group_by]
    return (w.abs().amax(dims, keepdim=True) == 0).expand_as(w)


@pytest.mark.filterwarnings("ignore:.*sequential mode zeroes")
@covering(
    group_by=("feature", "filter", "channel"),
    mode=FREEZES,
    penalty=PENALTIES,
    executor=available_backends(),
)
def test_frozen_zeros_stay_zero_and_lose_their_momentum(executor, group_by, mode, penalty):
    """Frozen weights and their momentum are +0.0 after a step, and the others are stepped as usual."""
    check_frozen(executor, group_by, SHAPES, mode, penalty)


@pytest.mark.full(
    "groups that fit into no cache; test_executors.py freezes in small groups that are cut in the same way"
)
@pytest.mark.filterwarnings("ignore:.*sequential mode zeroes")
@pytest.mark.parametrize("group_by", LARGE)
@pytest.mark.parametrize("mode", FREEZES)
@pytest.mark.parametrize("penalty", PENALTIES, ids=["none", "seq", "exact"])
def test_frozen_zeros_of_large_groups(backend, group_by, mode, penalty):
    """The same for groups that have to be cut into pieces because of their size."""
    check_frozen(backend, group_by, LARGE[group_by], mode, penalty)


def check_frozen(backend, group_by, shapes, mode, penalty):
    """Checks frozen and other entries after two steps. A NaN gradient of frozen ones must not matter."""
    shapes = [as_large_as_may_be(backend, shape) for shape in shapes]
    params, free = (partly_zero(shapes, torch.float32) for _ in range(2))
    options = dict(lr=0.1, momentum=0.9, group_by=group_by, backend=backend)
    optimizer = ProxSGD(params, freeze_zeros=mode, **options, **penalty)
    unfrozen = ProxSGD(free, **options)
    frozen = [frozen_entries(p.detach(), mode, group_by) for p in params]
    assert any(f.any() and not f.all() for f in frozen)
    for p, q in zip(params, free):
        optimizer.state[p]["momentum_buffer"] = torch.ones_like(p)
        unfrozen.state[q]["momentum_buffer"] = torch.ones_like(q)
    for step in range(2):
        give_grads(params, step, free)
        for p, f in zip(params, frozen):
            p.grad[f] = float("nan")
        optimizer.step()
        unfrozen.step()
        for p, q, f in zip(params, free, frozen):
            buf = optimizer.state[p]["momentum_buffer"]
            assert not bits(p)[f].any() and not bits(buf)[f].any()  # +0.0
            assert not torch.isnan(p).any() and not torch.isnan(buf).any()
            if not penalty:
                assert torch.equal(p[~f], q[~f])
                assert torch.equal(buf[~f], unfrozen.state[q]["momentum_buffer"][~f])


@pytest.mark.parametrize(("momentum", "nesterov"), [(0, False), (0.9, False), (0.9, True)])
def test_frozen_zeros_at_the_first_step(backend, momentum, nesterov):
    """Nothing of the gradient enters frozen weights or their new momentum."""
    params = partly_zero(SHAPES, torch.float64)
    frozen = [p.detach() == 0 for p in params]
    options = dict(momentum=momentum, nesterov=nesterov, weight_decay=0.1, backend=backend)
    optimizer = ProxSGD(params, lr=0.1, freeze_zeros="element", **options)
    train(optimizer, params, range(2))
    for p, f in zip(params, frozen):
        assert not bits(p)[f].any() and (p[~f] != 0).all()
        assert not momentum or not bits(optimizer.state[p]["momentum_buffer"])[f].any()
