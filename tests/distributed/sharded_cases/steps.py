"""Steps whose groups cross ranks: options, freezing, NaN and infinities, missing gradients."""

import torch
import torch.distributed as dist
from sharded_cases.common import STRONG, S, buffer, case, check_steps, mesh_of, parameters, placed, whole
from torch import nn

from cges_kernels import ProxSGD
from cges_kernels.core import reference, shrinkage
from cges_kernels.core.hyperparameters import PROX_MODES
from cges_kernels.core.updates import sgd_update


@case(2)
def options_of_sgd_and_freezing():
    """Steps are right under each option of SGD, and without each coefficient."""
    mesh = mesh_of(2)
    for options in (
        dict(momentum=0.0),
        dict(nesterov=True),
        dict(maximize=True, dampening=0.5),
        dict(exclusive_lasso=0.0),
        dict(group_lasso=0.0),
        dict(group_lasso=0.0, exclusive_lasso=0.0),
        dict(group_lasso=0.0, exclusive_lasso=0.0, l1=0.0),
        dict(lr=0.0),
    ):
        for prox_mode in PROX_MODES:
            check_steps(parameters(mesh, [S(0)]), prox_mode=prox_mode, **{**STRONG, **options})


@case(2)
def without_thresholds_weights_are_sgds_to_the_bit():
    """Without coefficients zeros keep their sign, as in torch.optim.SGD."""
    for options in (dict(), dict(freeze_zeros="group")):
        w = torch.tensor([[-0.0, 1.0, 0.3], [2.0, -0.0, 0.1]])
        p = nn.Parameter(placed(w, mesh_of(2), [S(0)]))
        p.grad = placed(torch.tensor([[0.0, 0.3, 0.7]] * 2), p.device_mesh, p.placements)
        expected = reference.step(w, whole(p.grad), lr=0.1)[0]
        assert expected.signbit().sum() == 2
        ProxSGD([p], lr=0.1, **options).step()
        assert torch.equal(whole(p.detach()).view(torch.int32), expected.view(torch.int32))


@case(2)
def what_is_written_to_dtensors_is_seen_whatever_is_skipped():
    """skip_dead notices writes to a DTensor, which bump no version of its local tensor."""
    mesh, w = mesh_of(2), torch.randn(8, 300)
    w[1::3] = 0
    grad, found = torch.randn(8, 300), []
    for skip_dead in (True, False):
        p = nn.Parameter(placed(w, mesh, [S(0)]))
        options = dict(group_by="filter", group_lasso=2.0, freeze_zeros="group", skip_dead=skip_dead)
        optimizer = ProxSGD([p], lr=0.05, momentum=0.9, **options)
        for i in range(5):
            if i == 3:
                with torch.no_grad():
                    p.add_(1.0)
            p.grad = placed(grad, mesh, [S(0)])
            optimizer.step()
        found.append(whole(p.detach()))
    assert torch.equal(*found) and found[0][1].all()


@case(2, 4)
def frozen_zeros():
    """A group that is zero on one rank only must not freeze; one that is zero on all must."""
    world = dist.get_world_size()
    for placements in ([S(0)],) if world == 2 else ([S(0), S(1)], [S(0), S(0)]):
        mesh = mesh_of(*([2] * len(placements)))
        for options in (
            dict(freeze_zeros="group"),
            dict(freeze_zeros="group", prox_mode="exact"),
            dict(freeze_zeros="group", group_lasso=0.0, exclusive_lasso=0.0, l1=0.0),
            dict(freeze_zeros="element"),
            dict(freeze_zeros="element", prox_mode="exact"),
        ):
            w = torch.randn(8, 6)
            w[:4, :2] = 0  # zero on the first rank
            w[4:, 2:4] = 0  # zero on the second
            w[:, 4] = 0
            p = nn.Parameter(placed(w, mesh, placements))
            check_steps([p], **{**STRONG, "group_lasso": 3.0, **options})
            got = whole(p.detach())
            assert not got[:, 4].any()
            if options["freeze_zeros"] == "group":
                assert got[:4, :2].any() and got[4:, 2:4].any()


@case(2, 4)
def not_a_number_on_one_rank():
    """Groups with NaN or infinities become what they become unsharded.

    That holds where frozen zeros have such gradients, too.
    """
    mesh = mesh_of(*([2] * (dist.get_world_size() // 2)))
    for bad in (float("nan"), float("inf"), float("-inf")):
        for options in (dict(), dict(prox_mode="exact"), dict(prox_mode="exact", freeze_zeros="group")):
            options = {**STRONG, **options}
            w, grad = torch.randn(8, 6), torch.randn(8, 6)
            w[:, 4] = 0
            grad[1, 2] = grad[7, 4] = bad
            p = nn.Parameter(placed(w, mesh, [S(0), S(1)][: mesh.ndim]))
            p.grad = placed(grad, mesh, p.placements)
            ProxSGD([p], **options).step()
            expected, _ = reference.step(w, grad, **options)
            assert expected[:, 2].isfinite().sum() < 8
            assert expected[:, 4].isfinite().all() == (options.get("freeze_zeros") == "group")
            torch.testing.assert_close(whole(p.detach()), expected, equal_nan=True, rtol=1e-5, atol=1e-6)


@case(2)
def gradients_that_one_rank_lacks():
    """A rank without a gradient keeps its part, counts in the norms of the others, and makes no rank wait."""
    mesh, rank = mesh_of(2), dist.get_rank()
    for options in (dict(), dict(prox_mode="exact"), dict(freeze_zeros="group")):
        options = {**STRONG, **options}
        params = parameters(mesh, [S(0)], shapes=[(8, 6), (4, 6), (4, 4, 2)])
        before, grads = [whole(p.detach()).clone() for p in params], [whole(p.grad) for p in params]
        if rank == 1:
            params[0].grad = None
        params[2].grad = None
        optimizer = ProxSGD(params, **options)
        optimizer.step()
        z, _ = sgd_update(
            before[0], grads[0], None, **{k: options[k] for k in ("lr", "momentum", "weight_decay")}
        )
        z = torch.cat([z[:4], before[0][4:]])
        thresholds = shrinkage.Thresholds(
            *(0.1 * options[k] for k in ("group_lasso", "exclusive_lasso", "l1"))
        )
        shrunk = shrinkage.shrink(z, thresholds, prox_mode=options.get("prox_mode", "sequential"))
        expected = torch.cat([shrunk[:4], before[0][4:]])
        torch.testing.assert_close(whole(params[0].detach()), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            whole(params[1].detach()), reference.step(before[1], grads[1], **options)[0], rtol=1e-5, atol=1e-6
        )
        assert torch.equal(whole(params[2].detach()), before[2]) and params[2] not in optimizer.state
        assert (buffer(optimizer, params[0]) is None) == (rank == 1)
