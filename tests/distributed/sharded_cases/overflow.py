"""Scaled gradients, and overflows that only one rank knows of."""

from unittest import mock

import torch
import torch.distributed as dist
from sharded_cases.common import (
    STRONG,
    S,
    buffer,
    case,
    give_gradients,
    local,
    mesh_of,
    parameters,
    whole,
)

from cges_kernels import ProxSGD, available_backends
from cges_kernels.core import reference
from cges_kernels.distributed import sharded


@case(2)
def scaled_gradients_and_overflow():
    """An overflow leaves weights and states of all ranks as they were; without one gradients are unscaled.

    Where groups cross ranks, that holds even if only one rank knows of the overflow.
    """
    mesh, rank = mesh_of(2), dist.get_rank()
    for spec in ("feature", "filter"):  # groups that cross ranks, and groups that do not
        params = parameters(mesh, [S(0)], shapes=[(8, 6), (6, 4), (5,)])
        before = [whole(p.detach()) for p in params]
        optimizer = ProxSGD(params, group_by=spec, **STRONG)
        optimizer.grad_scale = torch.tensor(8.0)
        for told in (rank == 1, True) if spec == "feature" else (True,):
            if rank == 1:
                local(params[0].grad)[0, 0] = float("inf")
            optimizer.found_inf = torch.tensor(float(told))
            optimizer.step()
            assert all(torch.equal(whole(p.detach()), w) for p, w in zip(params, before))
            assert not any(optimizer.state.values())
        grads = give_gradients(params)
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
        for p, w, grad in zip(params, before, grads):
            expected, buf = reference.step(w, grad / 8, group_by=spec, **STRONG)
            torch.testing.assert_close(whole(p.detach()), expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(whole(buffer(optimizer, p)), buf, rtol=1e-5, atol=1e-6)


@case(2)
def grad_scaler_of_torch():
    """torch's GradScaler works, whether it unscales or the step does."""
    mesh, rank = mesh_of(2), dist.get_rank()
    for fused in (None, True) if "cpu" in available_backends() else (None,):
        params = parameters(mesh, [S(0)], shapes=[(8, 6), (5,)])
        optimizer = ProxSGD(params, fused=fused, **STRONG)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        scaler.scale(torch.ones(()))
        for overflow in (True, False):
            before, grads = [whole(p.detach()) for p in params], give_gradients(params)
            for p in params:
                local(p.grad).mul_(16)
            if overflow and rank == 1:
                local(params[0].grad)[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            for p, w, grad in zip(params, before, grads):
                expected = w if overflow else reference.step(w, grad, **STRONG)[0]
                torch.testing.assert_close(whole(p.detach()), expected, rtol=1e-5, atol=1e-6)
            scaler.update(16.0)


@case(2)
def the_agreed_overflow_is_returned():
    """A plan returns the overflow that ranks have agreed on, for other plans of the same optimizer.

    Where nothing is sent, it is this rank's own.
    """
    mesh, run, results = mesh_of(2), sharded.ShardedPlan.run, []
    told = float(dist.get_rank() == 1)

    def spy(*args, **kwargs):
        results.append(run(*args, **kwargs))
        return results[-1]

    for spec, agreed in (("feature", 1.0), ("filter", told)):
        optimizer = ProxSGD(parameters(mesh, [S(0)], shapes=[(8, 6)]), group_by=spec, **STRONG)
        for flag, expected in ((torch.tensor(told), agreed), (torch.tensor(0.0), 0.0), (None, None)):
            if flag is not None:
                optimizer.found_inf = flag
            else:
                del optimizer.found_inf
            with mock.patch.object(sharded.ShardedPlan, "run", spy):
                optimizer.step()
            got = results.pop()
            assert (got is None) == (flag is None) and (got is None or bool(got) == bool(expected))
            assert got is None or (got.shape, got.dtype, got.device) == (flag.shape, flag.dtype, flag.device)
