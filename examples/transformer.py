"""A small transformer whose heads and hidden units die under ProxAdamW, made smaller by compact().

    python -m examples.transformer [--out DIR] [--steps N] [--group-lasso X] [--seed N]

It learns to continue the reference texts that come with Python, character by character. Each head and each
hidden unit is one group of group lasso, and compact() removes those that have died. A dense run for
comparison shows what that costs. The command prints a summary, and writes a figure and its numbers. It takes
two minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from cges_kernels import CoefficientWarmup, ProxAdamW, compact

from .common.cli import at_least, write
from .common.figures import RC, STYLES
from .common.jobs import progress
from .common.training import fit

CONTEXT, WIDTH, HEADS, HEAD_WIDTH, HIDDEN, BLOCKS = 48, 64, 4, 16, 256, 2
LR, BATCH = 4e-3, 24
PENALISED = 0.6  # the part of the steps with a penalty
HEADS_MORE = 2.2  # a head's strength over a hidden unit's, because the gradients in a head agree more
EVERY = 25  # steps between two points of the figure


class Head(nn.Module):
    """One head of attention. Its output weights are one group; if they are zero, so is its output."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, HEAD_WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(HEAD_WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x), is_causal=True)
        return self.out(mixed)


class Block(nn.Module):
    """Attention heads, then hidden units. Only one column of ``down`` reads a unit, and it is one group."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.heads = nn.ModuleList(Head() for _ in range(HEADS))
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        for head in self.heads:
            x = x + head(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Predicts the next character: from ints [N, T <= CONTEXT] to logits [N, T, characters]."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.token = nn.Embedding(characters, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.blocks(self.token(x) + self.place[: x.shape[1]])))


def load_text() -> tuple[Tensor, Tensor, int]:
    """(characters to train on, the last tenth to test on, how many different characters there are)."""
    text = "\n".join(topics[name] for name in sorted(topics))
    known = sorted(set(text))
    encoded = torch.tensor([known.index(c) for c in text])
    cut = len(encoded) * 9 // 10
    return encoded[:cut], encoded[cut:], len(known)


def batch_of(text: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random pieces of the text, and the same one character on."""
    begin = torch.randint(len(text) - CONTEXT - 1, (size, 1), generator=generator)
    pieces = text[begin + torch.arange(CONTEXT + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def param_groups(model: Transformer, group_lasso: float) -> list[dict[str, Any]]:
    """Heads and hidden units as groups, each strength times the square root of its group's size."""
    heads = [module.out.weight for module in model.modules() if isinstance(module, Head)]
    units = [module.down.weight for module in model.modules() if isinstance(module, Block)]
    grouped = {id(p) for p in heads + units}
    return [
        {
            "params": heads,
            "group_by": "tensor",
            "group_lasso": HEADS_MORE * group_lasso * heads[0].numel() ** 0.5,
        },
        {"params": units, "group_by": "feature", "group_lasso": group_lasso * WIDTH**0.5},
        {"params": [p for p in model.parameters() if id(p) not in grouped]},
    ]


@torch.no_grad()
def test_loss(model: nn.Module, text: Tensor) -> float:
    """The loss on the test text in nats per character, on the same pieces at each call."""
    x, y = batch_of(text, 128, torch.Generator().manual_seed(0))
    return float(F.cross_entropy(model(x).flatten(0, 1), y.flatten()))


@torch.no_grad()
def alive(model: Transformer) -> tuple[int, int]:
    """(heads, hidden units) whose output is not always zero."""
    heads = [bool(module.out.weight.any()) for module in model.modules() if isinstance(module, Head)]
    units = [int(module.down.weight.any(0).sum()) for module in model.modules() if isinstance(module, Block)]
    return sum(heads), sum(units)


@dataclass
class Run:
    """One training run; a row of ``curve`` is (step, test loss, heads alive, hidden units alive)."""

    label: str
    model: Transformer
    curve: list[tuple[int, float, int, int]] = field(default_factory=list)


def train(label: str, group_lasso: float, steps: int, seed: int, text: tuple[Tensor, Tensor, int]) -> Run:
    """One training run. The penalty grows from 0 over a third of the steps, and ends after PENALISED of them.

    From then on what is zero stays zero, and the rest trains on without a penalty.
    """
    torch.manual_seed(seed)
    training, testing, characters = text
    run = Run(label, Transformer(characters))
    model = run.model
    optimizer = ProxAdamW(param_groups(model, group_lasso), lr=LR, weight_decay=0.01)
    warmup = CoefficientWarmup(optimizer, max(steps // 3, 1))
    schedule = OneCycleLR(optimizer, LR, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False)
    schedulers = [schedule, warmup]
    generator = torch.Generator().manual_seed(seed)
    batches = (batch_of(training, BATCH, generator) for _ in range(steps))

    def after_step(step: int) -> None:
        if step == round(PENALISED * steps):
            schedulers.remove(warmup)
            for group in optimizer.param_groups:
                group.update(group_lasso=0.0, freeze_zeros="group")
        if step % EVERY == 0 or step in (1, steps):
            run.curve.append((step, test_loss(model, testing), *alive(model)))

    fit(model, optimizer, schedulers, progress(batches, label, "step", steps), after_step=after_step)
    return run


def figure_of(runs: Sequence[Run]) -> Figure:
    """The figure of the test loss and of the heads and units alive, over the steps."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run, colour in zip(runs, (STYLES["l2"][0], STYLES["cges"][0])):
        steps, losses, heads, units = zip(*run.curve)
        left.plot(steps, losses, color=colour, label=run.label)
        right.plot(
            steps, [100 * n / (BLOCKS * HEADS) for n in heads], color=colour, label=f"{run.label}: heads"
        )
        share = [100 * n / (BLOCKS * HIDDEN) for n in units]
        right.plot(steps, share, "--", color=colour, label=f"{run.label}: hidden units")
    left.set(xlabel="step", ylabel="test loss, nats a character")
    right.set(xlabel="step", ylabel="% alive", ylim=(-3, 103))
    for panel in (left, right):
        panel.legend()
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Train both, compact the sparse one, print and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo_out"), metavar="DIR", help="of figure and numbers")
    add("--steps", type=at_least(1), default=1500, metavar="N")
    add("--group-lasso", type=float, default=0.3, metavar="X")
    add("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    text = load_text()
    dense = train("dense", 0.0, args.steps, args.seed, text)
    sparse = train("group lasso", args.group_lasso, args.steps, args.seed, text)
    example = batch_of(text[1], BATCH, torch.Generator().manual_seed(1))[0]
    small = compact(sparse.model.eval(), example)
    heads, units = alive(sparse.model)
    lines = [
        f"test loss, nats a character: {dense.curve[-1][1]:.3f} dense, {sparse.curve[-1][1]:.3f} with group "
        f"lasso, {test_loss(small.model, text[1]):.3f} compacted",
        f"alive: {heads} of {BLOCKS * HEADS} heads, {units} of {BLOCKS * HIDDEN} hidden units",
        "",
        str(small),
    ]
    report = {
        "test_loss": {"dense": dense.curve[-1][1], "sparse": sparse.curve[-1][1]},
        "alive": {"heads": heads, "hidden_units": units},
        "compact": small.to_dict(),
        "curves": {run.label: run.curve for run in (dense, sparse)},
    }
    with matplotlib.rc_context(RC):
        figures = {"transformer.png": figure_of((dense, sparse))}
        write(args.out, {"transformer.json": json.dumps(report, indent=1) + "\n"}, figures)
    where = f"Figure and numbers: {args.out}{os.sep} ({time.perf_counter() - start:.0f} s)"
    print("\n".join(["", *lines, "", where]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
