"""Sparse training with Lightning, on scikit-learn's handwritten digits.

ProxSGD is the module's optimizer. The warm-up of its penalties is a scheduler, which Lightning steps after
each step of the optimizer and keeps in its checkpoints. The run uses mixed precision, accumulated gradients
and clipping, and it can be resumed from any of its checkpoints.

    python examples/train_with_lightning.py
    python examples/train_with_lightning.py --resume lightning_out/epoch=9.ckpt --out resumed

Needs lightning and scikit-learn. It takes about half a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
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


class Module(LightningModule):
    def __init__(self, model: nn.Module, warmup_steps: int) -> None:
        super().__init__()
        self.model, self.warmup_steps = model, warmup_steps

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return loss_fn(self.model(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.model)
        warmup = CoefficientWarmup(optimizer, steps=self.warmup_steps)
        return [optimizer], [{"scheduler": warmup, "interval": "step"}]  # not once an epoch


def train(
    model: nn.Module, loader: DataLoader[Any], epochs: int, out: Path, resume: Path | None = None
) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs,
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[ModelCheckpoint(out, "{epoch}", save_top_k=-1)],  # one for each epoch
        logger=False,
    )
    steps = epochs * len(loader) // 2
    trainer.fit(Module(model, warmup_steps=steps // 2), loader, ckpt_path=resume)
    return trainer


@torch.no_grad()
def accuracy(model: nn.Module, dataset: TensorDataset) -> float:
    x, y = dataset.tensors
    return float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("lightning_out"), help="folder for the checkpoints")
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    args = parser.parse_args()
    torch.manual_seed(0)
    training, testing = digits()
    # In a fixed order, so that a run that is resumed sees the batches that it would have seen.
    loader = DataLoader(training, batch_size=64)
    model = network()
    train(model, loader, args.epochs, args.out, args.resume)
    print(sparsity_report(model.eval(), testing.tensors[0][:1]))
    print(f"test accuracy: {accuracy(model, testing):.1%}")


if __name__ == "__main__":
    main()
