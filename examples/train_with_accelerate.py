"""Sparse training with Hugging Face's accelerate, on scikit-learn's handwritten digits.

ProxSGD and the warm-up of its penalties go through `Accelerator.prepare`, so that accelerate steps both when
the accumulated gradients are complete, and saves and loads both. The state is saved after each epoch, and a
run can be resumed from there.

    python examples/train_with_accelerate.py
    accelerate launch examples/train_with_accelerate.py
    python examples/train_with_accelerate.py --resume accelerate_out/epoch-10 --out resumed

Needs accelerate and scikit-learn. It takes about ten seconds on two CPU cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cges_kernels import CoefficientWarmup, ProxSGD, cges_param_groups, sparsity_report

loss_fn = nn.CrossEntropyLoss()


def network() -> nn.Module:
    features = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*features, nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10))


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,536 digits to train on, 261 to test on."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)[order]
    y = torch.tensor(labels)[order]
    return TensorDataset(x[:1536], y[:1536]), TensorDataset(x[1536:], y[1536:])


def make_optimizer(model: nn.Module) -> ProxSGD:
    return ProxSGD(cges_param_groups(model, lam=1e-2, scale="size"), lr=0.1, momentum=0.9)


def train(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Any,
    epochs: int,
    out: Path,
    resume: Path | None = None,
) -> nn.Module:
    steps = epochs * len(loader) // 2  # of all processes: accelerate steps a schedule once for each process
    optimizer: Any = make_optimizer(model)  # before `prepare`, which may replace the parameters in it
    warmup: Any = CoefficientWarmup(optimizer, steps=steps // 2)
    model, optimizer, warmup, loader = accelerator.prepare(model, optimizer, warmup, loader)
    first = 0
    if resume:
        accelerator.load_state(str(resume))
        first = int(resume.name.removeprefix("epoch-"))
    for epoch in range(first, epochs):
        model.train()
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss_fn(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                warmup.step()
                optimizer.zero_grad()
        accelerator.save_state(str(out / f"epoch-{epoch + 1}"))
    return accelerator.unwrap_model(model)


@torch.no_grad()
def accuracy(model: nn.Module, dataset: TensorDataset) -> float:
    x, y = dataset.tensors
    return float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("accelerate_out"), help="folder for the states")
    parser.add_argument("--resume", type=Path, help="a state to go on from")
    args = parser.parse_args()
    torch.manual_seed(0)
    training, testing = digits()
    # In a fixed order, so that a run that is resumed sees the batches that it would have seen.
    loader = DataLoader(training, batch_size=64)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = train(accelerator, network(), loader, args.epochs, args.out, args.resume).cpu().eval()
    accelerator.print(sparsity_report(model, testing.tensors[0][:1]))
    accelerator.print(f"test accuracy: {accuracy(model, testing):.1%}")


if __name__ == "__main__":
    main()
