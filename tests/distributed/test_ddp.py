"""DistributedDataParallel: each rank makes the same step from the same averaged gradients, to the bit.

This file is also the training program. The tests start it as a user would, by torchrun, with tests/ in
PYTHONPATH.
"""

import json
import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from helpers.programs import PATHS
from helpers.steps import FASTEST
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from cges_kernels import ProxAdamW, ProxSGD, sparsity_param_groups, sparsity_report

RANKS, STEPS = 2, 50
HANG = 60  # seconds after which a rank gives up waiting for another


def make_optimizer(name, model, zero, **options):
    """One of the two optimizers; `zero` lets ZeroRedundancyOptimizer give each rank a part of the state."""
    strength = 1 if name == "sgd" else 6
    groups = sparsity_param_groups(
        model, group_lasso=0.05 * strength, exclusive_lasso=0.01 * strength, scale="size", names=not zero
    )
    make, own = (ProxSGD, dict(lr=0.05, momentum=0.9)) if name == "sgd" else (ProxAdamW, dict(lr=0.004))
    options = {**own, **options}
    return ZeroRedundancyOptimizer(groups, make, **options) if zero else make(groups, **options)


def train(name, zero, device, backend, prox_mode, as_bucket_views):
    """Trains on a different random half of the data on each rank; returns what the ranks must agree on."""
    torch.manual_seed(0)
    images, labels = torch.randn(256, 1, 8, 8), torch.randint(4, (256,))
    images += 2 * torch.eye(8)[2 * labels][:, None, None]  # the label brightens one column
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 4),
    ).to(device)  # fmt: skip
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=as_bucket_views)
    optimizer = make_optimizer(name, model, zero, prox_mode=prox_mode, backend=backend)
    torch.manual_seed(1 + dist.get_rank())
    dead, losses = [], []
    for _ in range(STEPS):
        mine = torch.randint(256, (32,))
        loss = nn.functional.cross_entropy(parallel(images[mine].to(device)), labels[mine].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        dead.append(sparsity_report(model).to_dict()["total"]["dead_groups"])
    if zero:
        optimizer.consolidate_state_dict(to=0)
    state = optimizer.state_dict()["state"] if not zero or dist.get_rank() == 0 else {}
    state = [x for index in sorted(state) for x in state[index].values()]
    tensors = [x.detach().cpu() for x in [*model.parameters(), *state]]
    return tensors, dead, losses


def main(device, backend, prox_mode, as_bucket_views):
    """Trains with each optimizer, and prints how the two ranks compare, and a run with divided state."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=HANG))
    reports = {}
    for name in ("sgd", "adamw"):
        mine, divided = (
            train(name, zero, device, backend, prox_mode, as_bucket_views == "views")
            for zero in (False, True)
        )
        everyone = [None] * RANKS
        dist.all_gather_object(everyone, mine)
        if dist.get_rank() == 0:
            (first, dead, losses), (second, _, others) = everyone
            reports[name] = dict(
                tensors=len(first),
                same=count_same(first, second),
                same_divided=count_same(first, divided[0]),
                dead=dead,
                losses=[losses, others],
            )
    if dist.get_rank() == 0:
        print("report:" + json.dumps(reports))
    dist.destroy_process_group()


def count_same(xs, ys):
    """The number of tensors that have the same bits in both lists."""
    return sum(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(xs, ys, strict=True))


def torchrun(*options):
    """Runs this file on RANKS ranks with these arguments, and returns its report."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    # The path finds a package that is not installed. Unless the threads are set, torchrun sets them and
    # prints that.
    path = os.pathsep.join(filter(None, [PATHS, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, __file__, *options], capture_output=True, text=True, timeout=2 * HANG, env=environment
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout.split("report:")[1])


def assert_ranks_agree(reports):
    """All tensors are equal, and the training was one that could tell: it learnt, and groups died."""
    for name, report in reports.items():
        assert report["same"] == report["same_divided"] == report["tensors"] > 10, name
        one, other = report["losses"]
        assert one != other  # the ranks saw different data
        assert sum(one[-5:]) < 0.7 * sum(one[:5]), name  # and the model learnt
        dead = report["dead"]
        assert dead[0] == 0 and len(set(dead)) > 5, name  # groups died during training


needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs a torch with gloo"
)


@needs_gloo
@pytest.mark.parametrize(
    "prox_mode, gradients",
    [
        ("sequential", "views"),  # gradients are views of the buckets that ranks average
        pytest.param(
            "exact",
            "own",
            marks=pytest.mark.full(
                "exact mode, and gradients in memory of their own; a launch of torchrun takes seconds"
            ),
        ),
    ],
)
def test_ranks_agree_to_the_bit(prox_mode, gradients):
    """Parameters and buffers of two ranks are equal after training."""
    assert_ranks_agree(torchrun("cpu", FASTEST, prox_mode, gradients))


@pytest.mark.gpu
@needs_gloo
@pytest.mark.parametrize("executor", ["cuda", "triton"])
def test_ranks_agree_to_the_bit_on_a_gpu(executor):
    """The same with both ranks on one GPU, which gloo allows."""
    assert_ranks_agree(torchrun("cuda", executor, "sequential", "views"))


if __name__ == "__main__":
    main(*sys.argv[1:])
