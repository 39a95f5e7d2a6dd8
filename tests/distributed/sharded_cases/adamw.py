"""ProxAdamW on shards: both moments are sharded, and each rank counts steps for itself."""

import copy
from functools import partial

import torch
import torch.distributed as dist
from sharded_cases.common import S, case, give_gradients, mesh_of, parameters, whole
from torch import nn

from cges_kernels import ProxAdamW
from cges_kernels.core import reference
from cges_kernels.core.updates import adamw_update

OPTIONS = dict(lr=0.2, betas=(0.8, 0.95), weight_decay=0.1)
PENALTY = dict(group_lasso=0.4, exclusive_lasso=0.05, l1=0.1)


def states_of(optimizer, p):
    """Both moments, unsharded."""
    return tuple(whole(optimizer.state[p][key]) for key in ("exp_avg", "exp_avg_sq"))


@case(2)
def steps_are_the_references():
    """Weights, moments and zeros are the reference's.

    Groups cross ranks under "feature" and do not under "filter", and a bias has no groups at all.
    """
    mesh = mesh_of(2)
    for group_by in ("feature", "filter"):
        for more in (PENALTY, dict(PENALTY, prox_mode="exact"), dict(), dict(PENALTY, freeze_zeros="group")):
            params = parameters(mesh, [S(0)])
            optimizer = ProxAdamW(params, group_by=group_by, **OPTIONS, **more)
            weights, states = [whole(p.detach()) for p in params], [()] * len(params)
            for step in range(3):
                grads = give_gradients(params)
                optimizer.step()
                for i, (p, grad) in enumerate(zip(params, grads)):
                    update = partial(adamw_update, step=step + 1)
                    expected, *moments = reference.step(
                        weights[i], grad, *states[i], update=update, group_by=group_by, **OPTIONS, **more
                    )
                    weights[i], states[i] = whole(p.detach()), states_of(optimizer, p)
                    for got, wanted in zip((weights[i], *states[i]), (expected, *moments)):
                        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
                    assert torch.equal(weights[i] == 0, expected == 0)
                    assert float(optimizer.state[p]["step"]) == step + 1


@case(2)
def gradients_may_be_missing_at_first():
    """A parameter that joins late begins its own count, on every rank."""
    mesh = mesh_of(2)
    params = parameters(mesh, [S(0)])
    optimizer = ProxAdamW(params, **OPTIONS, **PENALTY)
    for step in range(3):
        give_gradients(params)
        if step < 2:
            params[0].grad = None
        optimizer.step()
    counts = [float(optimizer.state[p]["step"]) for p in params]
    assert counts == [1.0] + [3.0] * (len(params) - 1)


@case(2)
def an_overflow_on_one_rank_counts_on_none():
    """If one rank has an overflow, no rank steps, makes states or counts."""
    mesh = mesh_of(2)
    params = parameters(mesh, [S(0)])
    optimizer = ProxAdamW(params, fused=True, **OPTIONS, **PENALTY)
    before = [whole(p.detach()) for p in params]
    optimizer.grad_scale = torch.ones(())
    optimizer.found_inf = torch.tensor(float(dist.get_rank() == 1))
    optimizer.step()
    assert not any(optimizer.state.values())
    assert all(torch.equal(whole(p.detach()), w) for p, w in zip(params, before))
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert {float(optimizer.state[p]["step"]) for p in params} == {1.0}


@case(2)
def a_state_dict_goes_on():
    """A loaded optimizer takes the next step with the same bits and its count."""
    mesh = mesh_of(2)
    params = parameters(mesh, [S(0)])
    optimizer = ProxAdamW(params, **OPTIONS, **PENALTY)
    optimizer.step()
    state, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    grads = give_gradients(params)
    optimizer.step()
    resumed = [nn.Parameter(w) for w in weights]
    again = ProxAdamW(resumed, lr=7.0)
    again.load_state_dict(state)
    for p, q in zip(resumed, params):
        p.grad = q.grad
    again.step()
    assert grads and all(torch.equal(whole(p.detach()), whole(q.detach())) for p, q in zip(resumed, params))
    assert {float(again.state[p]["step"]) for p in resumed} == {2.0}
