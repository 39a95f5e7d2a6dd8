"""The cases of test_sharded.py, as torchrun runs them: every rank goes through all of its world's cases.

    torchrun --nproc_per_node N tests/distributed/sharded_worker.py DIRECTORY DEVICE BACKEND [CASE ...]

with tests/ in PYTHONPATH. DEVICE is cpu or cuda, of which ranks take one each as far as they go round,
BACKEND torch.distributed's. Each rank writes rank<r>.json there: by case, what went wrong, or null.
"""

import gc
import json
import os
import sys
import traceback
import weakref
from collections.abc import Callable
from copy import deepcopy
from datetime import timedelta
from functools import cache, partial
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from helpers.right import assert_right, threshold_margin
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from cges_kernels import ProxSGD, available_backends
from cges_kernels.core import reference
from cges_kernels.core.hyperparameters import PROX_MODES
from cges_kernels.distributed import sharded
from cges_kernels.distributed.crossing import MAX_ROUNDS, CrossingTensor
from cges_kernels.distributed.meshes import Packs

HANGS_AFTER = timedelta(seconds=45)
R, S = Replicate(), Shard
DEVICE = "cpu"  # or what main is told
SPECS = ("feature", "filter", "channel", "tensor", (-1,))
# Uneven shards, and with fewer rows than ranks empty ones; a tap per rank, a single row, a bias.
SHAPES = ((7, 5, 3, 3), (3, 8), (16, 12), (1, 6, 2), (5,))
PLACED = {
    1: {"rows": ((1,), [S(0)])},
    2: {
        "rows": ((2,), [S(0)]),
        "columns": ((2,), [S(1)]),
        "taps": ((2,), [S(2)]),
        "replicas": ((2,), [R]),
    },
    4: {
        "rows": ((4,), [S(0)]),
        "columns": ((4,), [S(1)]),
        "rows-and-columns": ((2, 2), [S(0), S(1)]),
        "columns-and-rows": ((2, 2), [S(1), S(0)]),
        "rows-twice": ((2, 2), [S(0), S(0)]),
        "replicas-of-rows": ((2, 2), [R, S(0)]),
        "as-fsdp-and-tp": ((2, 2), [_StridedShard(0, split_factor=2), S(0)]),
    },
}
STRONG = dict(lr=0.1, momentum=0.9, weight_decay=0.01, group_lasso=12.0, exclusive_lasso=0.1, l1=0.5)
QUICK = ("rows-feature",)  # of the matrix
CASES: dict[int, dict[str, Callable[[], None]]] = {1: {}, 2: {}, 4: {}}
# On GPUs. The last is not for gloo, whose only sure collective there is all_reduce.
ON_GPUS = {
    1: ("rows-feature", "sums-over-one-rank", "a-model-under-fully-shard"),
    2: (
        "rows-feature",
        "rows-filter",
        "frozen-zeros",
        "options-of-sgd-and-freezing",
        "a-model-under-fully-shard",
    ),
}


def case(*worlds):
    def add(function):
        for world in worlds:
            CASES[world][function.__name__.replace("_", "-")] = function
        return function

    return add


def dtypes():
    fused = "cpu" in available_backends() if DEVICE == "cpu" else len(available_backends()) > 1
    # The reference takes SGD's part in 16 bits, and is no measure of itself.
    return (torch.float32, torch.float64, *[torch.bfloat16] * fused)


@cache
def mesh_of(*shape):
    return init_device_mesh(DEVICE, shape, mesh_dim_names=tuple("abc"[: len(shape)]))


def placed(x, mesh, placements):
    """A DTensor of ``x``, which all ranks have; dims that it lacks are replicated."""
    placements = [R if getattr(p, "dim", 0) >= x.dim() else p for p in placements]
    return distribute_tensor(x.clone(), mesh, placements, src_data_rank=None)


def local(x):
    with torch.no_grad():
        return x.to_local() if isinstance(x, DTensor) else x


def whole(x):
    if isinstance(x, DTensor) and DEVICE == "cuda" and dist.get_backend() == "gloo":
        return all_whole([x])[0]  # it may lack the gather of CUDA tensors
    return x.full_tensor().clone() if isinstance(x, DTensor) else x.clone()


@cache
def indices(shape, mesh, placements):
    """Which elements of a tensor this rank holds."""
    return local(placed(torch.arange(shape.numel()).view(shape), mesh, placements)).flatten()


def all_whole(tensors):
    """``whole`` of each, by one collective; ranks that hold the same element must hold the same bits."""
    full = [torch.full((x.numel(),), -torch.inf, dtype=torch.float64) for x in tensors]
    for x, elements in zip(tensors, full):
        elements[indices(x.shape, x.device_mesh, x.placements)] = local(x).detach().flatten().double()
    packed = torch.cat(full)
    dist.all_reduce(packed, dist.ReduceOp.MAX)
    result = [
        e.view(x.shape).to(x.dtype) for x, e in zip(tensors, packed.split([x.numel() for x in tensors]))
    ]
    for x, w in zip(tensors, result):
        assert torch.equal(w.flatten()[indices(x.shape, x.device_mesh, x.placements)], local(x).flatten())
    return result


def buffer(optimizer, p):
    return optimizer.state.get(p, {}).get("momentum_buffer")


def parameters(mesh, placements, dtype=torch.float32, shapes=SHAPES):
    params = [nn.Parameter(placed(torch.randn(n).to(dtype), mesh, placements)) for n in shapes]
    give_gradients(params)
    return params


def give_gradients(params):
    """New ones; returns them unsharded."""
    grads = [torch.randn(p.shape).to(p.dtype) for p in params]
    for p, grad in zip(params, grads):
        p.grad = placed(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
    return grads


def check_steps(params, steps=2, checker=0, **options):
    """Steps are as right as an executor's must be, zeros included, each judged by what the one before left.

    The rule, twice the error of the same formulas, is for large samples: here few groups may by luck have
    sums without an error, so these formulas are taken to err by two roundings of the largest weight at least.
    One rank, ``checker``, checks for all. Returns how many zeros there were.
    """
    optimizer, seen = ProxSGD(params, **options), []
    weights, buffers = all_whole(params), [None] * len(params)
    for _ in range(steps):
        inputs = list(zip(weights, give_gradients(params), buffers))
        optimizer.step()
        weights = all_whole(params)
        if options["momentum"] != 0:
            new = [buffer(optimizer, p) for p in params]
            assert all(buf.placements == p.placements for p, buf in zip(params, new))
            buffers = all_whole(new)
        seen += [(*x, w, buf) for x, w, buf in zip(inputs, weights, buffers)]

    def check():
        rows, buffer_rows = [], []
        for *x, w, buf in seen:
            truth, truth_buf = reference.step(*x, accumulate=torch.float64, **options)
            same, same_buf = reference.step(*x, accumulate=torch.float32, **options)
            least = 2 * torch.finfo(torch.float32).eps * x[0].abs().max().double()
            same = torch.where((same - truth).abs() < least, truth + least, same.double())
            rows.append((w, truth, same, threshold_margin(*x, **options)))
            if buf is not None:
                buffer_rows.append((buf + 0.0, truth_buf, same_buf, torch.zeros_like(truth_buf)))
        for columns in (zip(*table) for table in (rows, buffer_rows) if table):
            assert_right(
                *(torch.cat([x.flatten().cpu() for x in column]) for column in columns), params[0].dtype
            )

    together(check if dist.get_rank() == checker % dist.get_world_size() else lambda: None)
    return sum(int((w == 0).sum()) for *_, w, _ in seen)


def gathered(x):
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, x)
    return everyone


def together(function):
    """Call it; what it raises on one rank is raised on all, so that none waits for one that has failed."""
    error = None
    try:
        function()
    except Exception:
        error = traceback.format_exc()
    if errors := list(filter(None, gathered(error))):
        raise AssertionError("\n".join(errors))


def matrix(mesh_shape, placements, spec):
    mesh = mesh_of(*mesh_shape)
    probe = torch.arange(40.0).view(5, 4, 2)
    assert torch.equal(whole(placed(probe, mesh, placements)), probe)  # else the checks check nothing
    zeros = 0
    for i, (dtype, prox_mode) in enumerate(product(dtypes(), PROX_MODES)):
        params = parameters(mesh, placements, dtype)
        zeros += check_steps(params, checker=i, group_by=spec, prox_mode=prox_mode, **STRONG)
    assert zeros > 0


for world, table in PLACED.items():
    for name, (mesh_shape, placements) in table.items():
        for spec in SPECS:
            spec_name = spec if isinstance(spec, str) else "dims" + "".join(map(str, spec))
            CASES[world][f"{name}-{spec_name}"] = partial(matrix, mesh_shape, placements, spec)


@case(2)
def options_of_sgd_and_freezing():
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
    for options in (dict(), dict(freeze_zeros="group")):
        w = torch.tensor([[-0.0, 1.0, 0.3], [2.0, -0.0, 0.1]])
        p = nn.Parameter(placed(w, mesh_of(2), [S(0)]))
        p.grad = placed(torch.tensor([[0.0, 0.3, 0.7]] * 2), p.device_mesh, p.placements)
        expected = reference.step(w, whole(p.grad), lr=0.1)[0]
        assert expected.signbit().sum() == 2
        ProxSGD([p], lr=0.1, **options).step()
        assert torch.equal(whole(p.detach()).view(torch.int32), expected.view(torch.int32))


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
            w[:4, :2] = 0  # dead on the first rank
            w[4:, 2:4] = 0  # and on the second
            w[:, 4] = 0
            p = nn.Parameter(placed(w, mesh, placements))
            check_steps([p], **{**STRONG, "group_lasso": 3.0, **options})
            got = whole(p.detach())
            assert not got[:, 4].any()
            if options["freeze_zeros"] == "group":
                assert got[:4, :2].any() and got[4:, 2:4].any()


@case(2)
def nothing_travels_where_groups_lie_on_one_rank():
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


class counted:
    """The numbers of elements that dist.all_reduce is called with, as a list."""

    def __enter__(self):
        self.sizes, all_reduce = [], dist.all_reduce

        def counting(tensor, *args, **kwargs):
            self.sizes.append(tensor.numel())
            return all_reduce(tensor, *args, **kwargs)

        self.patch = mock.patch.object(dist, "all_reduce", counting)
        self.patch.__enter__()
        return self.sizes

    def __exit__(self, *error):
        self.patch.__exit__(*error)


@case(2)
def one_packed_all_reduce_of_sums():
    mesh = mesh_of(2)
    groups = 5 * 9 + 8 + 12  # of the first three; in the others nothing crosses
    for options, sums in ((dict(), 2), (dict(freeze_zeros="group"), 3), (dict(prox_mode="exact"), 3)):
        params = parameters(mesh, [S(0)])
        half = len(params) // 2  # in two param groups, and with plain tensors among them
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
    flat, square = mesh_of(4), mesh_of(2, 2)
    shape = (8, 8)
    for parts, expected in (
        ([(square, [S(0), S(1)])], [2 * 4]),  # columns of this rank's half
        ([(square, [S(0), S(1)]), (square, [S(1), S(0)])], [2 * 4, 2 * 4]),
        ([(square, [R, S(0)])], [2 * 8, 2 * 8]),  # the second for the copies
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
        # The last of these sums one tensor over a dim, before another that is to be copied over it.
        assert [n - 1 for n in sizes] == expected, sizes
        on_all = [p for p in params if p.device_mesh.size() == 4]
        check_steps(on_all, **STRONG)
        check_steps(on_all, prox_mode="exact", **STRONG)


@case(4)
def packs_of_meshes():
    """One for slices of one mesh, however made; others where two dims of meshes could not be told apart."""
    square, packs = mesh_of(2, 2), Packs()
    together = packs.join(square, (0, 1), ())
    assert together[1:] == ((0, 1), ()) and together[0].groups == [square.get_group(m) for m in range(2)]
    again = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("a", "b"))
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
        DeviceMesh(DEVICE, [[0, 1], [3, 2]]),  # rank 0 could take its second dim for the square's
        DeviceMesh(DEVICE, [[0, 2], [1, 3]]),
    )
    assert [packs.join(mesh, (0,), ())[0] is together[0] for mesh in others] == [False] * 4
    assert len(packs.all) == 4  # the flat mesh and the flattened one are one

    for prox_mode in PROX_MODES:
        placements = [([S(0)], [S(0), S(1)])[mesh.ndim - 1] for mesh in (square, *others)]
        params = [parameters(mesh, on, shapes=[(8, 6)])[0] for mesh, on in zip((square, *others), placements)]
        check_steps(params, prox_mode=prox_mode, **STRONG)


@case(4)
def replicas_stay_equal_whatever_the_order_of_sums():
    """Also where collectives do not give the same bits in all process groups, as if added up otherwise."""
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
    """As if groups crossed shards, so that the sums do travel."""
    mesh = mesh_of(1)
    with mock.patch.object(sharded, "crossed_mesh_dims", lambda *args: (0,) * bool(args[-1])):
        for prox_mode in PROX_MODES:
            with counted() as sizes:
                check_steps(parameters(mesh, [S(0)]), prox_mode=prox_mode, **STRONG)
            assert sum(n > 1 for n in sizes) >= 2


@case(4)
def exact_mode_where_some_ranks_could_stop_earlier():
    """Of the first tensor half of the ranks hold columns that are done at once; the others' are hard."""
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
        if where != [S(0), S(1)]:  # else no group crosses the mesh's second dim: nothing is to be agreed on
            rounds.append(len(sizes))
        for p, w in zip(params, weights):
            expected = reference.shrink(w, reference.Thresholds(1e-3, 3.0, 0.0), prox_mode="exact")
            torch.testing.assert_close(whole(p.detach()), expected, rtol=1e-5, atol=1e-6)
    assert gathered(rounds) == [rounds] * 4 and 4 < min(rounds) <= max(rounds) <= 3 * MAX_ROUNDS


@case(2)
def rounds_have_a_limit():
    p = parameters(mesh_of(2), [S(0)], shapes=[(8, 8)])[0]
    optimizer = ProxSGD([p], **STRONG, prox_mode="exact")
    with mock.patch.object(CrossingTensor, "unfinished", torch.tensor(True)), counted() as sizes:
        optimizer.step()
    assert len(sizes) == MAX_ROUNDS


@case(2, 4)
def not_a_number_on_one_rank():
    """Its groups become what they become unsharded, also where frozen zeros get it as a gradient."""
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
    """Its part stays as it is, counts in the norms of the others', and hangs no one."""
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
        z, _ = reference.sgd_update(
            before[0], grads[0], None, **{k: options[k] for k in ("lr", "momentum", "weight_decay")}
        )
        z = torch.cat([z[:4], before[0][4:]])
        thresholds = reference.Thresholds(
            *(0.1 * options[k] for k in ("group_lasso", "exclusive_lasso", "l1"))
        )
        shrunk = reference.shrink(z, thresholds, prox_mode=options.get("prox_mode", "sequential"))
        expected = torch.cat([shrunk[:4], before[0][4:]])
        torch.testing.assert_close(whole(params[0].detach()), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            whole(params[1].detach()), reference.step(before[1], grads[1], **options)[0], rtol=1e-5, atol=1e-6
        )
        assert torch.equal(whole(params[2].detach()), before[2]) and params[2] not in optimizer.state
        assert (buffer(optimizer, params[0]) is None) == (rank == 1)


@case(2)
def scaled_gradients_and_overflow():
    """Overflow on any rank leaves all as it was; where groups cross, even if only that rank is told of it."""
    mesh, rank = mesh_of(2), dist.get_rank()
    for spec in ("feature", "filter"):  # crossing, and not
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
    """For other plans of the same optimizer; where nothing travels it is this rank's."""
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


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 6, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(96, 10), nn.ReLU(), nn.Linear(10, 3)),
    )


@case(1, 2, 4)
def a_model_under_fully_shard():
    """Trained beside an unsharded copy that takes its gradients; uneven, and the last with empty shards."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for mesh in (mesh_of(world), *((mesh_of(2, 2),) if world == 4 else ())):  # the second replicates too
        for prox_mode in PROX_MODES:
            model, copy = conv_net(), conv_net()
            for layer in (model[0], model[3]):
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            options = dict(lr=0.05, momentum=0.9, group_lasso=0.3, exclusive_lasso=0.02, prox_mode=prox_mode)
            optimizer = ProxSGD(model.parameters(), **options)
            unsharded = ProxSGD(copy.parameters(), **options)
            torch.manual_seed(rank)
            for _ in range(4):
                loss = model(torch.randn(4, 3, 8, 8)).square().mean()
                loss.backward()
                for p, q in zip(model.parameters(), copy.parameters()):
                    q.grad = whole(p.grad)
                optimizer.step()
                unsharded.step()
                optimizer.zero_grad()
            zeros = 0
            for p, q in zip(model.parameters(), copy.parameters()):
                got = whole(p.detach())
                torch.testing.assert_close(got, q.detach(), rtol=1e-5, atol=1e-6)
                zeros += int((got == 0).sum())
            assert zeros > 0


@case(4)
def a_model_under_fully_shard_and_tensor_parallel():
    mesh = mesh_of(2, 2)
    model, copy = (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)) for _ in range(2))
    copy.load_state_dict(model.state_dict())
    parallelize_module(model, mesh["b"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["a"])
    assert isinstance(model[0].weight.placements[0], _StridedShard)
    options = dict(lr=0.05, momentum=0.9, group_lasso=0.5, exclusive_lasso=0.1)
    optimizer, unsharded = ProxSGD(model.parameters(), **options), ProxSGD(copy.parameters(), **options)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        for p, q in zip(model.parameters(), copy.parameters()):
            q.grad = whole(p.grad)
        optimizer.step()
        unsharded.step()
    for p, q in zip(model.parameters(), copy.parameters()):
        torch.testing.assert_close(whole(p.detach()), q.detach(), rtol=1e-5, atol=1e-6)
    assert (whole(model[0].weight.detach()) == 0).any()


@case(4)
def a_layer_that_is_not_tensor_parallel_travels_with_the_others():
    mesh, columns = mesh_of(2, 2), ColwiseParallel(output_layouts=R)
    for prox_mode in PROX_MODES:
        torch.manual_seed(1)
        layers = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)
        model, copy = (deepcopy(nn.Sequential(*layers)) for _ in range(2))
        parallelize_module(model, mesh["b"], {"0": columns, "4": columns})
        fully_shard(model, mesh=mesh["a"])
        assert [model[i].weight.device_mesh.ndim for i in (0, 2, 4)] == [2, 1, 2]
        options = dict(lr=0.05, momentum=0.9, group_lasso=0.5, exclusive_lasso=0.1, prox_mode=prox_mode)
        optimizer, unsharded = ProxSGD(model.parameters(), **options), ProxSGD(copy.parameters(), **options)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 6)).square().mean().backward()
            for p, q in zip(model.parameters(), copy.parameters()):
                q.grad = whole(p.grad)
            with counted() as sizes:
                optimizer.step()
            assert len(sizes) == 2 if prox_mode == "sequential" else len(sizes) <= 2 * MAX_ROUNDS
            assert len(sizes) % 2 == 0
            unsharded.step()
        for p, q in zip(model.parameters(), copy.parameters()):
            torch.testing.assert_close(whole(p.detach()), q.detach(), rtol=1e-5, atol=1e-6)


@case(2)
def views():
    """Heads, grouped convolutions, LSTM units: where each shard holds whole slices of the view."""
    mesh, zeros = mesh_of(2), 0
    for shape, view, spec, placements in (
        ((8, 6), (4, 2, 6), (1, 2), [S(0)]),  # heads on one rank each
        ((8, 6), (4, 2, 6), (0,), [S(0)]),  # across the heads
        ((8, 6), (4, 2, 6), (0, 2), [S(1)]),
        ((6, 2, 3, 3), (3, 2, 2, 3, 3), (1,), [R]),
        ((5, 4, 3), (5, 12), (0,), [S(0)]),  # merged, and uneven
        ((5, 4, 3), (5, 12), (1,), [S(0)]),
        ((5, 4, 3), (5, -1), (0,), [S(0)]),
        ((1, 6), (2, 3), (0,), [S(0)]),  # all on one rank
        ((4, 6), (8, 3), (0,), [S(0)]),
    ):
        for prox_mode in PROX_MODES:
            options = {**STRONG, "group_lasso": 3.0, "prox_mode": prox_mode, "group_by": spec, "view": view}
            zeros += check_steps(parameters(mesh, placements, shapes=[shape]), **options)
    assert zeros > 0
    for shape, view, placements in (
        ((6, 4), (3, 2, 4), [S(0)]),  # three slices for two ranks
        ((8, 6), (4, 12), [S(1)]),  # a shard would hold pieces of slices
        ((6, 4), (2, 12), [S(1)]),
        ((8, 6), (4, 2, 6), [_StridedShard(0, split_factor=4)]),  # every other row
    ):
        p = parameters(mesh, placements, shapes=[shape])[0]
        error = raised(
            ValueError, lambda p=p, view=view: ProxSGD([p], group_by=(0,), view=view, **STRONG).step()
        )
        assert "param_groups[0]['params'][0]: view=" in error and str(p.placements) in error, error


@case(4)
def views_on_two_mesh_dims():
    mesh = mesh_of(2, 2)
    strided = [_StridedShard(0, split_factor=2), S(0)]
    for view, spec, placements in (((4, 2, 6), (0,), strided), ((4, 2, 6), (0,), [S(0), S(1)])):
        options = {**STRONG, "group_lasso": 3.0, "group_by": spec, "view": view}
        assert check_steps(parameters(mesh, placements, shapes=[(8, 6)]), **options) > 0
    p = parameters(mesh, strided, shapes=[(8, 6)])[0]
    raised(ValueError, ProxSGD([p], group_by=(0,), view=(2, 4, 6), **STRONG).step)


def raised(kind, function):
    try:
        function()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


@case(2, 4)
def omega_of_sharded_parameters():
    """The reference takes DTensors: to log the objective nobody gathers weights."""
    penalty = dict(group_lasso=0.7, exclusive_lasso=0.1, l1=0.3)
    for mesh_shape, placements in PLACED[dist.get_world_size()].values():
        for spec in SPECS:
            for p in parameters(mesh_of(*mesh_shape), placements, shapes=((7, 5, 3, 3), (3, 8))):
                omega = reference.omega(p.detach(), group_by=spec, **penalty)
                expected = reference.omega(whole(p.detach()), group_by=spec, **penalty)
                torch.testing.assert_close(whole(omega), expected)


@case(2)
def errors_before_anything_is_written():
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


@case(4)
def meshes_of_one_rank_and_of_others():
    """A mesh dim of one rank makes all placements alike; a mesh that a rank is not in is refused there."""
    mesh = mesh_of(4, 1)
    p = parameters(mesh, [S(0), R], shapes=[(8, 6)])[0]
    w, grad = whole(p.detach()).clone(), whole(p.grad)
    p.grad = DTensor.from_local(local(p.grad), mesh, [S(0), Partial()])
    ProxSGD([p], **STRONG).step()
    torch.testing.assert_close(whole(p.detach()), reference.step(w, grad, **STRONG)[0], rtol=1e-5, atol=1e-6)
    half = DeviceMesh(DEVICE, [0, 1])
    q = nn.Parameter(DTensor.from_local(torch.ones(2, 3), half, [S(0)]))
    q.grad = torch.ones_like(q)
    if dist.get_rank() < 2:
        ProxSGD([q], **STRONG).step()
    else:
        assert "this rank" in raised(ValueError, ProxSGD([q], **STRONG).step)


@case(2)
def what_a_step_leaves_behind():
    """Versions move, gradients are let go, the same bits come again, and a moved parameter is noticed."""
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
    for p in params:  # one whose groups cross, and others
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


@case(2)
def distributed_checkpoints():
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    directory = Path(sys.argv[1]) / "checkpoint"
    mesh, results = mesh_of(2), []

    def made():
        model = conv_net()
        fully_shard(model, mesh=mesh)
        return model, ProxSGD(
            model.parameters(), lr=0.05, momentum=0.9, group_lasso=0.3, exclusive_lasso=0.02
        )

    def train(model, optimizer, seed):
        torch.manual_seed(seed)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(4, 3, 8, 8)).square().mean().backward()
            optimizer.step()

    model, optimizer = made()
    train(model, optimizer, 1)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.save(states, checkpoint_id=directory)
    train(model, optimizer, 2)
    results.append([local(p).clone() for p in model.parameters()])
    model, optimizer = made()
    train(model, optimizer, 3)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.load(states, checkpoint_id=directory)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    train(model, optimizer, 2)
    results.append([local(p).clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def main(directory, device, backend, *names):
    global DEVICE
    DEVICE = device
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.init()  # else a mesh would set one by LOCAL_RANK alone
        torch.set_default_device("cuda")
    dist.init_process_group(backend, timeout=HANGS_AFTER)
    torch.set_num_threads(1)
    results, file = {}, Path(directory) / f"rank{dist.get_rank()}.json"
    cases = CASES[dist.get_world_size()]
    for name in names or cases:
        torch.manual_seed(len(name))
        error = None
        try:
            cases[name]()
        except Exception:
            error = traceback.format_exc()
        results[name] = f"not all ranks finished it; here: {error}"
        file.write_text(json.dumps(results))
        results[name] = "\n".join(filter(None, gathered(error))) or None  # fails where ranks are out of step
        file.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
