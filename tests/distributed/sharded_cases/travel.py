"""What is sent between ranks: the number and sizes of collectives, and that replicas stay equal."""

from unittest import mock

import torch
import torch.distributed as dist
from sharded_cases.common import (
    SHAPES,
    STRONG,
    R,
    S,
    case,
    check_steps,
    counted,
    device,
    gathered,
    give_gradients,
    local,
    mesh_of,
    parameters,
    placed,
    raised,
    whole,
)
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.debug import CommDebugMode

from cges_kernels import ProxSGD
from cges_kernels.core import reference, shrinkage
from cges_kernels.core.hyperparameters import PROX_MODES
from cges_kernels.distributed import sharded
from cges_kernels.distributed.crossing import MAX_ROUNDS, CrossingTensor
from cges_kernels.distributed.meshes import Packs


@case(2)
def nothing_travels_where_groups_lie_on_one_rank():
    """No collective runs if no group crosses ranks or no sum is needed."""
    mesh = mesh_of(2)
    for spec, placements, options in (
        ("filter", [S(0)], {}),
        ("channel", [S(1)], {}),
        ("feature", [R], {}),
        ("feature", [S(0)], dict(lr=0.0)),
        ("feature", [S(0)], dict(group_lasso=0.0, exclusive_lasso=0.0)),
        ("feature", [S(0)], dict(group_lasso=0.0, exclusive_lasso=0.0, freeze_zeros="element")),
    ):
        params = parameters(mesh, placements)
        optimizer = ProxSGD(params, group_by=spec, **{**STRONG, **options})
        with CommDebugMode() as collectives, counted() as sizes:
            optimizer.step()
        assert collectives.get_total_counts() == 0 and not sizes


@case(2)
def one_packed_all_reduce_of_sums():
    """All sums go in one collective, and each further round of exact mode takes one more."""
    mesh = mesh_of(2)
    groups = 5 * 9 + 8 + 12  # the groups of the first three parameters; in the others none crosses
    for options, sums in ((dict(), 2), (dict(freeze_zeros="group"), 3), (dict(prox_mode="exact"), 3)):
        params = parameters(mesh, [S(0)])
        half = len(params) // 2  # in two param groups, with a plain tensor among the DTensors
        plain = nn.Parameter(torch.randn(4, 4))
        optimizer = ProxSGD([dict(params=[*params[:half], plain]), dict(params=params[half:])], **STRONG)
        for group in optimizer.param_groups:
            group.update(options)
        for _ in range(2):
            give_gradients([*params, plain])
            with CommDebugMode() as collectives, counted() as sizes:
                optimizer.step()
            assert sizes[0] == sums * groups + 1, (sizes, groups)
            assert collectives.get_total_counts() == len(sizes)
            if "prox_mode" in options:
                assert 2 <= len(sizes) <= MAX_ROUNDS
                assert all(n <= sums * groups + len(SHAPES) for n in sizes[1:])
            else:
                assert len(sizes) == 1


@case(4)
def one_all_reduce_per_mesh_and_dim():
    """Tensors on the same mesh dims share a collective, of exactly the groups that cross there."""
    flat, square = mesh_of(4), mesh_of(2, 2)
    shape = (8, 8)
    for parts, expected in (
        ([(square, [S(0), S(1)])], [2 * 4]),  # the columns of this rank's half
        ([(square, [S(0), S(1)]), (square, [S(1), S(0)])], [2 * 4, 2 * 4]),
        ([(square, [R, S(0)])], [2 * 8, 2 * 8]),  # the second is for the replicas
        ([(square, [S(0), R])], [2 * 8, 2 * 8]),
        ([(square, [S(0), S(0)]), (square, [S(0), R])], [2 * 16, 2 * 16]),
        ([(square, [S(0), S(1)]), (square["a"], [S(0)]), (square["b"], [S(0)])], [2 * 12, 2 * 8]),
        ([(square["b"], [S(0)]), (square, [S(0), S(1)]), (square["a"], [S(0)])], [2 * 8, 2 * 12]),
        ([(flat, [S(0)]), (square, [S(0), S(1)]), (flat, [S(0)])], [2 * 16, 2 * 4]),
        ([(square, [S(0), S(0)]), (square, [R, S(0)])], [2 * 8, 2 * 16, 2 * 8 - 1]),  # see below
    ):
        params = [parameters(mesh, placements, shapes=[shape])[0] for mesh, placements in parts]
        optimizer = ProxSGD(params, **STRONG)
        with counted() as sizes:
            optimizer.step()
        # The last case sums one tensor over a dim before another tensor is copied over that dim.
        assert [n - 1 for n in sizes] == expected, sizes
        on_all = [p for p in params if p.device_mesh.size() == 4]
        check_steps(on_all, **STRONG)
        check_steps(on_all, prox_mode="exact", **STRONG)


@case(4)
def packs_of_meshes():
    """Slices of one mesh share a pack; meshes whose dims could be confused get their own."""
    square, packs = mesh_of(2, 2), Packs()
    together = packs.join(square, (0, 1), ())
    assert together[1:] == ((0, 1), ()) and together[0].groups == [square.get_group(m) for m in range(2)]
    again = init_device_mesh(device(), (2, 2), mesh_dim_names=("a", "b"))
    for mesh, crossed, copied, expected in (
        (square["a"], (0,), (), ((0,), ())),
        (square["b"], (0,), (), ((1,), ())),
        (square, (1,), (0,), ((1,), (0,))),
        (again, (1, 0), (), ((1, 0), ())),
    ):
        assert packs.join(mesh, crossed, copied) == (together[0], *expected)
    others = (
        mesh_of(4),
        square._flatten(),
        DeviceMesh(device(), [[0, 1], [3, 2]]),  # rank 0 could take its second dim for the square's
        DeviceMesh(device(), [[0, 2], [1, 3]]),
    )
    assert [packs.join(mesh, (0,), ())[0] is together[0] for mesh in others] == [False] * 4
    assert len(packs.all) == 4  # the flat mesh and the flattened square are the same

    for prox_mode in PROX_MODES:
        placements = [([S(0)], [S(0), S(1)])[mesh.ndim - 1] for mesh in (square, *others)]
        params = [parameters(mesh, on, shapes=[(8, 6)])[0] for mesh, on in zip((square, *others), placements)]
        check_steps(params, prox_mode=prox_mode, **STRONG)


@case(4)
def replicas_stay_equal_whatever_the_order_of_sums():
    """Replicas keep equal bits even if collectives round differently in each process group."""
    all_reduce, mesh = dist.all_reduce, mesh_of(2, 2)

    def inexact(tensor, *args, group, **kwargs):
        all_reduce(tensor, *args, group=group, **kwargs)
        tensor.mul_(1 + 1e-5 * min(dist.get_process_group_ranks(group)))

    for placements, same in (([R, S(0)], [(0, 2), (1, 3)]), ([S(0), R], [(0, 1), (2, 3)])):
        for prox_mode in PROX_MODES:
            params = parameters(mesh, placements)
            optimizer = ProxSGD(params, prox_mode=prox_mode, **STRONG)
            for _ in range(2):
                give_gradients(params)
                with mock.patch.object(dist, "all_reduce", inexact):
                    optimizer.step()
            ranks = gathered([local(p).cpu() for p in params])
            for one, other in same:
                assert all(map(torch.equal, ranks[one], ranks[other]))


@case(1)
def sums_over_one_rank():
    """A mesh of one rank works when it is made to send sums."""
    mesh = mesh_of(1)
    with mock.patch.object(sharded, "crossed_mesh_dims", lambda *args: (0,) * bool(args[-1])):
        for prox_mode in PROX_MODES:
            with counted() as sizes:
                check_steps(parameters(mesh, [S(0)]), prox_mode=prox_mode, **STRONG)
            assert sum(n > 1 for n in sizes) >= 2


@case(4)
def exact_mode_where_some_ranks_could_stop_earlier():
    """All ranks take the same number of rounds, as the hardest group needs, and every group ends right.

    Half of the ranks hold columns of the first tensor that are done at once.
    """
    mesh = mesh_of(2, 2)
    hard = torch.randn(64, 8) * torch.logspace(-3, 3, 64)[:, None]
    hard[:, :4] = 0
    easy, rounds = torch.zeros(64, 8), []
    for other, where in ((easy, [R, S(0)]), (hard, [S(1), S(0)]), (hard, [S(0), S(1)])):
        weights = hard, other
        params = [nn.Parameter(placed(w, mesh, how)) for w, how in zip(weights, ([S(0), S(1)], where))]
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer = ProxSGD(params, lr=1.0, group_lasso=1e-3, exclusive_lasso=3.0, prox_mode="exact")
        with counted() as sizes:
            optimizer.step()
        # on these no group crosses the mesh's second dim, and nothing has to be agreed on
        if where != [S(0), S(1)]:
            rounds.append(len(sizes))
        for p, w in zip(params, weights):
            expected = shrinkage.shrink(w, shrinkage.Thresholds(1e-3, 3.0, 0.0), prox_mode="exact")
            torch.testing.assert_close(whole(p.detach()), expected, rtol=1e-5, atol=1e-6)
    assert gathered(rounds) == [rounds] * 4 and 4 < min(rounds) <= max(rounds) <= 3 * MAX_ROUNDS


@case(2)
def rounds_have_a_limit():
    """If groups never finish, the step ends after MAX_ROUNDS."""
    p = parameters(mesh_of(2), [S(0)], shapes=[(8, 8)])[0]
    optimizer = ProxSGD([p], **STRONG, prox_mode="exact")
    with mock.patch.object(CrossingTensor, "unfinished", torch.tensor(True)), counted() as sizes:
        optimizer.step()
    assert len(sizes) == MAX_ROUNDS


@case(4)
def meshes_of_one_rank_and_of_others():
    """A mesh dim of one rank makes all placements the same.

    A rank outside of a parameter's mesh refuses the parameter.
    """
    mesh = mesh_of(4, 1)
    for on_one in (R, S(0)):
        p = parameters(mesh, [S(0), on_one], shapes=[(8, 6)])[0]
        w, grad = whole(p.detach()).clone(), whole(p.grad)
        p.grad = DTensor.from_local(local(p.grad), mesh, [S(0), Partial()])
        with counted() as sizes:
            ProxSGD([p], **STRONG).step()
        assert len(sizes) == 1  # nothing is sent over the dim of one rank
        expected = reference.step(w, grad, **STRONG)[0]
        torch.testing.assert_close(whole(p.detach()), expected, rtol=1e-5, atol=1e-6)
    half = DeviceMesh(device(), [0, 1])
    q = nn.Parameter(DTensor.from_local(torch.ones(2, 3), half, [S(0)]))
    q.grad = torch.ones_like(q)
    if dist.get_rank() < 2:
        ProxSGD([q], **STRONG).step()
    else:
        assert "this rank" in raised(ValueError, ProxSGD([q], **STRONG).step)
