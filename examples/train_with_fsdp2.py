"""Sparse training of a sharded model: FSDP2's fully_shard, on scikit-learn's handwritten digits.

The parameters become DTensors, of which each process holds and steps its own part. The model, the optimizer
and the warm-up of the penalties are saved as a distributed checkpoint after each epoch, and a run can be
resumed from there. At the end the whole weights are gathered and their sparsity is reported.

    torchrun --nproc_per_node 2 examples/train_with_fsdp2.py
    torchrun --nproc_per_node 2 examples/train_with_fsdp2.py --resume fsdp2_out/epoch-10 --out resumed

Each process takes a GPU of its own, with NCCL; without GPUs it runs on the CPU, with gloo. Needs
scikit-learn. It takes about half a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cges_kernels import CoefficientWarmup, ProxSGD, cges_param_groups, sparsity_report

BATCH = 128  # the batch of all processes together


def network() -> nn.Sequential:
    features = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*features, nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10))


def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 digits and their labels, in a random order that is always the same."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)[order], torch.tensor(labels)[
        order
    ]


def make_optimizer(model: nn.Module) -> ProxSGD:
    """The optimizer. Call this after fully_shard, which replaces the parameters."""
    return ProxSGD(cges_param_groups(model, lam=1e-2, scale="size"), lr=0.1, momentum=0.9)


def state_of(model: nn.Module, optimizer: ProxSGD, warmup: CoefficientWarmup) -> dict[str, Any]:
    weights, steps = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": steps, "warmup": warmup.state_dict()}


def load(model: nn.Module, optimizer: ProxSGD, warmup: CoefficientWarmup, folder: Path) -> None:
    state = state_of(model, optimizer, warmup)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    warmup.load_state_dict(state["warmup"])  # last: the full strengths are in the optimizer's state


def train(
    model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, out: Path, resume: Path | None = None
) -> None:
    """Trains. Each process takes its own part of each batch; fully_shard averages the gradients."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x, y = data
    starts = range(0, len(x) - BATCH + 1, BATCH)
    optimizer = make_optimizer(model)
    warmup = CoefficientWarmup(optimizer, steps=epochs * len(starts) // 2)
    first = 0
    if resume:
        load(model, optimizer, warmup, resume)
        first = int(resume.name.removeprefix("epoch-"))
    for epoch in range(first, epochs):
        for start in starts:
            own = slice(start + rank, start + BATCH, world)
            nn.functional.cross_entropy(model(x[own]), y[own]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            warmup.step()
            optimizer.zero_grad()
        dcp.save(state_of(model, optimizer, warmup), checkpoint_id=out / f"epoch-{epoch + 1}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("fsdp2_out"), help="folder for the checkpoints")
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    args = parser.parse_args()
    device = "cpu"
    if torch.cuda.is_available():
        device = "cuda"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    torch.manual_seed(0)  # the same weights in every process
    model = network().to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x, y = (tensor.to(device) for tensor in digits())
    train(model, (x[:1536], y[:1536]), args.epochs, args.out, args.resume)

    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:  # the other processes get an empty state
        dense = network().eval()
        dense.load_state_dict(whole)
        x, y = x[1536:].cpu(), y[1536:].cpu()
        print(sparsity_report(dense, x[:1]))
        print(f"test accuracy: {(dense(x).argmax(1) == y).float().mean():.1%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
