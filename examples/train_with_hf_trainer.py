"""Sparse training with the Hugging Face Trainer, on scikit-learn's handwritten digits.

ProxSGD is passed to the Trainer, whose linear schedule lowers its learning rate, and with it the thresholds.
The warm-up of the penalties is a callback beside that schedule. Gradients are accumulated and clipped, and
the run can be resumed from any of its checkpoints.

    python examples/train_with_hf_trainer.py
    python examples/train_with_hf_trainer.py --resume hf_trainer_out/checkpoint-120 --out resumed

Needs transformers, accelerate and scikit-learn. It takes about ten seconds on two CPU cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from cges_kernels import CoefficientWarmup, ProxSGD, cges_param_groups, sparsity_report


class Warmup(TrainerCallback):
    """Raises the penalties to their full strength. A resumed run continues from the checkpoint's step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        optimizer, taken = rest["optimizer"], state.global_step
        self.schedule = CoefficientWarmup(optimizer, self.steps, last_epoch=taken - 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.schedule.step()


class Net(nn.Module):
    """Returns the loss too if it gets labels, as the Trainer expects of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.features(pixels))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def digits() -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """1,536 digits to train on, 261 to test on."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)[order]
    samples = [dict(pixels=image, labels=label) for image, label in zip(x, torch.tensor(labels)[order])]
    return samples[:1536], samples[1536:]


def make_optimizer(model: nn.Module) -> ProxSGD:
    return ProxSGD(cges_param_groups(model, lam=3e-2, scale="size"), lr=0.1, momentum=0.9)


def train(model: nn.Module, dataset: Any, epochs: int, out: Path, resume: Path | None = None) -> Trainer:
    args = TrainingArguments(
        str(out),
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        save_strategy="epoch",
        report_to="none",
    )
    steps = epochs * len(dataset) // 128
    trainer = Trainer(
        model,
        args,
        train_dataset=dataset,
        optimizers=(make_optimizer(model), None),  # None: the Trainer's own schedule of lr
        callbacks=[Warmup(steps // 2)],
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


@torch.no_grad()
def accuracy(model: nn.Module, samples: list[dict[str, Tensor]]) -> float:
    x, y = (torch.stack([sample[key] for sample in samples]) for key in ("pixels", "labels"))
    return float((model(x)["logits"].argmax(1) == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("hf_trainer_out"), help="folder for the checkpoints")
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    args = parser.parse_args()
    torch.manual_seed(0)
    training, testing = digits()
    model = Net()
    train(model, training, args.epochs, args.out, args.resume)
    model = model.cpu().eval()
    print(sparsity_report(model, testing[0]["pixels"][None]))
    print(f"test accuracy: {accuracy(model, testing):.1%}")


if __name__ == "__main__":
    main()
