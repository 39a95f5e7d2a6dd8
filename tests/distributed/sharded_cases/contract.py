"""What a step refuses before it writes anything, and what it leaves behind."""

import gc
import weakref

import numpy as np
import torch
from sharded_cases.common import (
    STRONG,
    R,
    S,
    buffer,
    case,
    give_gradients,
    local,
    mesh_of,
    parameters,
    placed,
    raised,
    whole,
)
from torch import nn
from torch.distributed.tensor import DTensor, Partial

from cges_kernels import ProxSGD


@case(2)
def errors_before_anything_is_written():
    """Gradients, buffers and weights placed otherwise than their parameter are errors that name it."""
    mesh, rows = mesh_of(2), S(0)

    def refused(kind, *words, break_it, momentum_first=False, placement=rows):
        params = parameters(mesh, [placement], shapes=[(4, 4), (8, 6)])
        optimizer = ProxSGD(params, **STRONG)
        if momentum_first:
            optimizer.step()
        break_it(params[1], optimizer)
        before, state = [local(p).clone() for p in params], dict(optimizer.state)
        error = raised(kind, optimizer.step)
        assert all(word in error for word in ("param_groups[0]['params'][1]", *words)), error
        assert (
            all(torch.equal(local(p), w) for p, w in zip(params, before)) and dict(optimizer.state) == state
        )

    def plain_gradient(p, _):
        p.grad = whole(p.grad)

    def gradient_elsewhere(p, _):
        p.grad = placed(whole(p.grad), mesh, [S(1)])

    def partial_gradient(p, _):
        p.grad = DTensor.from_local(torch.ones(8, 6), mesh, [Partial()])

    def plain_buffer(p, optimizer):
        optimizer.state[p]["momentum_buffer"] = torch.zeros(8, 6)

    def buffer_elsewhere(p, optimizer):
        optimizer.state[p]["momentum_buffer"] = placed(torch.zeros(8, 6), mesh, [S(1)])

    def partial_weights(p, optimizer):
        bad = nn.Parameter(DTensor.from_local(torch.ones(8, 6), mesh, [Partial()]))
        bad.grad = DTensor.from_local(torch.ones(8, 6), mesh, [Partial()])
        optimizer.param_groups[0]["params"][1] = bad

    refused(RuntimeError, "gradient", "plain", "Shard(dim=0)", break_it=plain_gradient)
    refused(RuntimeError, "gradient", "Shard(dim=0)", "Shard(dim=1)", break_it=gradient_elsewhere)
    refused(RuntimeError, "gradient", "Shard(dim=0)", "Partial(sum)", break_it=partial_gradient)
    refused(RuntimeError, "gradient", "Replicate()", "Partial(sum)", break_it=partial_gradient, placement=R)
    refused(RuntimeError, "momentum_buffer", "plain", break_it=plain_buffer, momentum_first=True)
    refused(RuntimeError, "momentum_buffer", "Shard(dim=1)", break_it=buffer_elsewhere, momentum_first=True)
    refused(ValueError, "placements", "Partial(sum)", break_it=partial_weights)


@case(2)
def what_a_step_leaves_behind():
    """Versions move on, gradients are released, bits are repeatable, and a moved parameter is noticed."""
    mesh = mesh_of(2)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        params = parameters(mesh, [S(0)])
        optimizer = ProxSGD(params, **STRONG, prox_mode="exact")
        for _ in range(3):
            give_gradients(params)
            versions = [p._version for p in params]
            optimizer.step()
            assert all(p._version > v for p, v in zip(params, versions))
        results.append([local(x).clone() for p in params for x in (p, buffer(optimizer, p))])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    for p in params:  # some of these have groups that cross ranks
        array = np.ones(tuple(local(p).shape), np.float32)
        p.grad = DTensor.from_local(
            torch.from_numpy(array), mesh, p.placements, shape=p.shape, stride=p.stride()
        )
        watch = weakref.ref(array)
        del array
        optimizer.step()
        p.grad = None
        gc.collect()
        assert watch() is None, "the plan keeps gradients alive"
    p = params[0]
    before = torch.randn(local(p).shape)
    p._local_tensor = before.clone()  # as fully_shard does when it is reset
    give_gradients(params)
    optimizer.step()
    assert not torch.equal(local(p), before)
    give_gradients(params)
    saved = params[1] * params[1]
    optimizer.step()
    assert "modified by an inplace operation" in raised(
        RuntimeError, lambda: saved.to_local().sum().backward()
    )
