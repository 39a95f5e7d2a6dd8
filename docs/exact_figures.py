"""The figures of docs/design/exact-mode.md, and the colours of all figures; figures.py draws them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from cges_kernels import prox
from cges_kernels.core import shrinkage

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
GREY = "#8c8c8c"


def draw_exact_root() -> Figure:
    """Exact mode's equation on a random group, and both searches for its root."""
    z = torch.from_numpy(np.random.default_rng(1).normal(size=(64, 1)))
    thresholds = shrinkage.Thresholds(1.0, 0.08, 0.1)

    def stats(t: Any) -> shrinkage.GroupStats:
        return shrinkage.group_stats(z, t, (0,), with_count=True)

    def right(t: float) -> float:
        sums = stats(t)
        return float(thresholds.c + thresholds.b * shrinkage.group_scale(sums.l2, thresholds.a) * sums.l1)

    newton, search = [], shrinkage.start_search(stats(thresholds.c), thresholds)
    while not search.done.all():
        newton.append(float(search.t))
        search = shrinkage.sweep(search, stats(search.t), thresholds)
    root = float(search.t)
    halley, t = [], thresholds.c
    while len(halley) < 12 and (not halley or abs(t - halley[-1]) > 1e-15):
        halley.append(t)
        t = halleys_step(t, stats(torch.tensor(t, dtype=z.dtype)), thresholds)
    figure = Figure(figsize=(8.6, 3.3), layout="constrained")
    axes, errors = figure.subplots(1, 2, width_ratios=(1.5, 1))
    grid = np.linspace(thresholds.c, 1.15 * root, 300)
    axes.plot(grid, list(map(right, grid)), color="black", label="c + b·s(t)·‖u(t)‖₁")
    axes.plot(grid, grid, color=GREY, linewidth=1, label="t")
    for name, steps, colour in (("Newton", newton, ORANGE), ("Halley", halley, BLUE)):
        path = [(p, height) for p in steps[:5] for height in (p, right(p))]
        axes.plot(*zip(*path), color=colour, linewidth=1, linestyle="dotted")
        axes.plot(
            steps[:5], list(map(right, steps[:5])), "o", color=colour, markersize=4, label=f"{name}'s sweeps"
        )
        errors.semilogy([max(root - p, 1e-17) for p in steps], "o-", color=colour, markersize=4, label=name)
    axes.set(xlabel="t", ylabel="both sides of the equation", title="a group of 64 normal numbers")
    errors.set(xlabel="sweep", ylabel="distance from the root", ylim=(1e-9, 2), title="how fast it is found")
    for panel in (axes, errors):
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    return figure


def halleys_step(t: float, sums: shrinkage.GroupStats, h: shrinkage.Thresholds) -> float:
    """The step of csrc/common/shrinkage.h, inside its bracket."""
    s, l1, l2 = float(shrinkage.group_scale(sums.l2, h.a)), float(sums.l1), float(sums.l2)
    excess = t - h.c - h.b * s * l1
    slope = 1 + h.b * (float(sums.alive) * s + h.a * l1**2 / l2**3)
    if excess < 0:
        many, most = max(float(sums.alive) - 4, 0), h.b * s
        slope -= 0.4 * min(-excess / l1, most) * many * most * many / slope
    return t - excess / slope


def fractions_left(strength: float) -> tuple[float, float]:
    """The fractions of groups of 1,024 normal numbers that sequential and exact mode leave at this b*n."""
    z = torch.from_numpy(np.random.default_rng(0).normal(size=(1024, 64)))
    both = (
        prox(z, exclusive_lasso=strength / 1024, prox_mode=mode, backend="reference")
        for mode in ("sequential", "exact")
    )
    sequential, exact = (float((w != 0).double().mean()) for w in both)
    return sequential, exact


def draw_fractions() -> Figure:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    strengths = np.geomspace(0.01, 30, 40)
    for name, found, colour in zip(
        ("sequential", "exact"), zip(*map(fractions_left, strengths)), (ORANGE, BLUE)
    ):
        axes.plot(strengths, found, color=colour, label=name)
    axes.axvline(1, color=GREY, linewidth=1, linestyle="dotted")
    axes.text(1.06, 0.97, "a warning from here on", fontsize=8, color=GREY, va="top")
    axes.set(
        xscale="log", xlabel="b·n = lr · exclusive_lasso · group size", ylabel="fraction left", ylim=(0, 1)
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure
