"""How another update rule is added: Lion, by helpers/lion.py, on the reference; see docs/design/a-step.md.

The same for the other executors is in tests/backends/*/test_*_third_rule.py.
"""

import pytest
import torch
from helpers.lion import ProxLion, lion_update
from helpers.steps import PENALTY, assert_same_bits, everything, parameters, through_a_file, train

from cges_kernels.core import reference


def test_the_reference_steps_it():
    """A Rule is all that the reference needs: steps are the update and then the prox."""
    params = parameters()
    optimizer = ProxLion(params, lr=0.01, weight_decay=0.1, **PENALTY)
    weights, states = [p.detach().clone() for p in params], [()] * len(params)
    for step in range(4):
        train(optimizer, params, [step])
        for i, p in enumerate(params):
            options = dict(lr=0.01, weight_decay=0.1, update=lion_update, **PENALTY)
            weights[i], *states[i] = reference.step(weights[i], p.grad, *states[i], **options)
    assert_same_bits([p.detach() for p in params], weights)
    assert_same_bits([optimizer.state[p]["exp_avg"] for p in params], [x for (x,) in states])
    assert any((p == 0).any() for p in params)


def test_what_is_around_it_takes_it():
    """Files, and checks of options, work for the new rule without more code."""
    params = parameters()
    optimizer = ProxLion(params, lr=0.01, **PENALTY)
    train(optimizer, params, range(3))
    others = parameters()
    again = ProxLion(others, lr=7.0)
    with torch.no_grad():
        for p, q in zip(others, params):
            p.copy_(q)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    train(optimizer, params, [3])
    train(again, others, [3])
    assert_same_bits(everything(again), everything(optimizer))
    with pytest.raises(ValueError, match="Invalid weight_decay value: -1"):
        ProxLion(parameters(), weight_decay=-1)
