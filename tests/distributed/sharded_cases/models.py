"""Models under fully_shard and tensor parallelism, as users train and save them."""

import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_cases.common import R, case, counted, local, mesh_of, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from cges_kernels import ProxSGD, TargetDensity, sparsity_param_groups
from cges_kernels.core.hyperparameters import PROX_MODES
from cges_kernels.distributed.crossing import MAX_ROUNDS


def conv_net():
    """A network whose layers shard unevenly."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 6, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(96, 10), nn.ReLU(), nn.Linear(10, 3)),
    )


@case(1, 2, 4)
def a_model_under_fully_shard():
    """Training goes as that of an unsharded copy that is given the same gradients.

    Shards are uneven, and those of the last layer are empty on some ranks.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    # the second mesh also replicates
    for mesh in (mesh_of(world), *((mesh_of(2, 2),) if world == 4 else ())):
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
    """The same where weights are sharded by both at once."""
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
    """Weights on a mesh and on a slice of it share their collectives."""
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
def distributed_checkpoints():
    """A checkpoint saved and loaded by shards goes on with the same bits."""
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


@case(2)
def a_density_on_all_ranks():
    """TargetDensity counts, controls and cuts DTensors as it does small whole tensors, to rounding."""
    ends = []
    for shard in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 9))
        with torch.no_grad():
            model[0].weight[:2] = 0
        if shard:
            fully_shard(model, mesh=mesh_of(2))
        groups = sparsity_param_groups(model, group_lasso=0.5, l1=0.1, group_by="feature")
        optimizer = ProxSGD(groups, lr=0.05, momentum=0.9)
        control = TargetDensity(optimizer, 0.3, 20)
        seen = [control.measure()]
        for _ in range(22):
            optimizer.zero_grad()
            model(torch.ones(1, 7)).square().sum().backward()
            optimizer.step()
            control.step()
            seen += [control.density, control.factor]
        ends.append((seen, [whole(p.detach()) for p in model.parameters()]))
    (seen, weights), (alone, expected) = ends
    assert seen[0] == 66 / 80 and seen == pytest.approx(alone, rel=1e-3)
    assert 0.25 < seen[-2] < 0.35
    for w, x in zip(weights, expected):
        torch.testing.assert_close(w, x, rtol=1e-4, atol=1e-5)
