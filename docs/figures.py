"""Draws the figures of the README and of docs/design into docs: ``python docs/figures.py [FOLDER]``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from exact_figures import BLUE, GREEN, ORANGE, RED, draw_exact_root, draw_fractions
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as MatplotlibPath
from sklearn.datasets import load_digits
from torch import Tensor, nn

from cges_kernels import ProxSGD, compact, plot_weights, prox
from cges_kernels.core import groups

LIGHT = "#e8e8e8"
# Text is not turned into paths, and equal drawings give equal bytes.
STYLE = {"svg.hashsalt": "cges_kernels", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 9.5}


def sheet(width: float, height: float, panels: int, **options: Any) -> tuple[Figure, list[Axes]]:
    """Panels side by side, without axes, in units of their own with y downwards."""
    figure = Figure(figsize=(width, height), layout="constrained")
    found = list(figure.subplots(1, panels, squeeze=False, **options)[0])
    for axes in found:
        axes.set_axis_off()
        axes.invert_yaxis()
    return figure, found


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: Any = "") -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="black", linewidth=0.5))
    if text:
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8)


def caption(axes: Axes, title: str, above: str, below: str) -> None:
    """Writes a title, a line above and a line below a matrix that is drawn 10 wide and at most 10 high."""
    axes.set_title(title, fontweight="bold")
    axes.text(5, -0.5, above, ha="center", va="bottom", fontsize=8.5)
    axes.text(5, 11, below, ha="center", va="top", fontsize=8.5)


def cells(axes: Axes, dead: np.ndarray, x: float, y: float) -> None:
    for zero, colour in ((False, LIGHT), (True, RED)):
        corners = [[(c, r), (c + 1, r), (c + 1, r + 1), (c, r + 1)] for r, c in np.argwhere(dead == zero)]
        if corners:
            path = MatplotlibPath.make_compound_path_from_polys(np.array(corners) + (x, y))
            axes.add_patch(PathPatch(path, facecolor=colour, edgecolor="black", linewidth=0.5))


def draw_groups() -> Figure:
    """The zeros of one dead group in a matrix and in a filter bank, as prox makes them."""
    figure, panels = sheet(10, 4.6, 4)
    notes = {
        "feature": "one input of all outputs;\nof a convolution one tap of it",
        "filter": "one output unit or filter",
        "channel": "one input channel, all its taps",
        "tensor": "all of the tensor",
    }
    for axes, (spec, note) in zip(panels, notes.items()):
        for shape, group, top in (((4, 6), (1, 2), 1), ((4, 3, 3, 3), (1, 1, 1, 1), 7)):
            reduced = groups.reduced_dims(len(shape), spec)
            w = torch.ones(shape)
            w[tuple(slice(None) if d in reduced else i for d, i in enumerate(group))] = 1e-3
            dead = (prox(w, group_lasso=0.1, group_by=spec) == 0).numpy()
            if len(shape) == 2:
                cells(axes, dead, 1.5, top)
            else:
                for out, into in np.ndindex(4, 3):
                    cells(axes, dead[out, into], 3.2 * into, top + 3.2 * out)
        axes.set_title(f'group_by="{spec}"', fontweight="bold")
        axes.text(4.7, 20.2, note, ha="center", va="top", fontsize=8.5)
        axes.text(4.7, 0.6, "matrix [4, 6]", ha="center", fontsize=8)
        axes.text(4.7, 6.6, "filters [4, 3, 3, 3]", ha="center", fontsize=8)
        axes.set(xlim=(-0.4, 9.8), ylim=(23, -0.4), aspect="equal")
    return figure


def trained(**penalties: float) -> tuple[Tensor, float]:
    """The last layer of a small network trained on some digits, and its accuracy on the others."""
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.from_numpy(digits.data / 16).float(), torch.from_numpy(digits.target)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    last = {"params": [model[2].weight], **penalties}
    others = {"params": [*model[0].parameters(), model[2].bias]}
    optimizer = ProxSGD([others, last], lr=0.1, momentum=0.9, prox_mode="exact", backend="reference")
    for _ in range(1200):
        batch = torch.randint(1200, (100,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    accuracy = (model(x[1200:]).argmax(1) == y[1200:]).double().mean()
    return model[2].weight.detach(), float(accuracy)


def draw_weights() -> Figure:
    """A last layer trained under each penalty."""
    penalties = {
        "l1": {"l1": 1e-2},
        "group lasso": {"group_lasso": 7e-2},
        "exclusive lasso": {"exclusive_lasso": 3e-2},
        "CGES, both": {"group_lasso": 5e-2, "exclusive_lasso": 3e-2},
    }
    shown: dict[str, Tensor] = {}
    for name, coefficients in penalties.items():
        w, accuracy = trained(**coefficients)
        left, dead = float((w != 0).double().mean()), int((w == 0).all(0).sum())
        shown[f"{name}: {left:.0%} nonzero, {dead} of 64 features dead, accuracy {accuracy:.1%}"] = w
    return plot_weights(shown, xlabel="feature (hidden unit)", ylabel="digit")


def draw_cpu_tiles() -> Figure:
    """How the CPU executor cuts a matrix; the colours are two threads."""
    figure, panels = sheet(10, 3.6, 4)
    threads = (BLUE + "66", ORANGE + "66")

    def tiles(axes: Axes, places: Iterable[tuple[float, float, float, float]]) -> None:
        places = list(places)
        for i, place in enumerate(places):
            box(axes, *place, threads[2 * i // len(places)], i + 1)

    tiles(panels[0], ((0, y, 10, 1.25) for y in np.arange(8) * 1.25))
    tiles(panels[1], ((x, 0, 1.25, 4) for x in np.arange(8) * 1.25))
    tiles(panels[2], ((0, y, 10, 2.5) for y in np.arange(4) * 2.5))
    tiles(panels[3], ((0, y, 2.5, 2.5) for y in np.arange(4) * 2.5))
    panels[2].annotate("", (10.8, 9.5), (10.8, 0.5), arrowprops={"arrowstyle": "->"})
    panels[2].annotate("", (11.8, 0.5), (11.8, 9.5), arrowprops={"arrowstyle": "->", "color": RED})
    panels[2].text(11.3, 10.3, "1  2", ha="center", va="top", fontsize=8)
    for k in range(8):
        box(panels[3], 4.5, 1 + k, 7.5, 1, "white", f"element {k + 1} of each")
    panels[3].annotate("", (4.4, 4.5), (2.6, 1.25), arrowprops={"arrowstyle": "->"})
    kept = "update, sum, shrink in the cache"
    caption(panels[0], "rows", '"filter": contiguous groups', f"{kept}\n20 bytes an element")
    caption(panels[1], "panels", '"feature", under 256 rows', f"{kept}\n20 bytes an element")
    passes = "pass 1: z into w, and sums\npass 2, backward: w = s·soft(z, t)\n28 bytes an element"
    caption(panels[2], "pieces of whole rows", '"feature", from 256 rows on', passes)
    together = "64 groups side by side in the L1\n20 bytes an element"
    caption(panels[3], "short groups", "2 to 64 elements each", together)
    for axes in panels:
        axes.set(xlim=(-0.6, 12.4), ylim=(15, -1.6))
    return figure


def draw_cuda_paths() -> Figure:
    """The parts of a matrix that thread blocks hold on each path; the numbers are the order of work items."""
    figure, panels = sheet(10, 3.6, 4)
    colours = (BLUE + "66", ORANGE + "66", GREEN + "66", RED + "66")
    for i in range(8):
        box(panels[0], 0, i * 1.25, 10, 1.25, colours[i % 4], i + 1)
        box(panels[1], i * 1.25, 0, 1.25, 10, colours[i % 4], i + 1)
    for part, panel in np.ndindex(4, 4):
        band, across = divmod(panel, 2)
        box(panels[2], panel * 2.5, part * 2.5, 2.5, 2.5, colours[panel], band * 8 + part * 2 + across + 1)
        box(panels[3], panel * 2.5, part * 2.5, 2.5, 2.5, LIGHT, panel * 4 + part + 1)
    teams = "neighbouring threads have a group;\na block of 128 or 256 has several"
    caption(panels[0], "rows", "z in registers", teams)
    caption(panels[1], "tiles", "z in shared memory", "a block has all rows,\n256 bytes of each (or 128)")
    parts = "blocks share a panel, and exchange\nsums; a band of panels, then the next"
    caption(panels[2], "shared panels", "z in shared memory", parts)
    stages = "stage 1: all chunks leave sums;\nlast stage: read again, apply"
    caption(panels[3], "tickets", "z nowhere", stages)
    for axes in panels:
        axes.set(xlim=(-0.6, 10.6), ylim=(13.6, -1.6))
    return figure


def draw_cuda_ring() -> Figure:
    """A block's time, with four rows a tile: the apply of a tile runs beside the update of the next."""
    figure, (axes,) = sheet(10, 2.5, 1)
    colours = {"A": BLUE + "66", "B": ORANGE + "66", "C": GREEN + "66"}
    lanes = ("asynchronous copies", "apply: w = s·soft(z, t)", "update: z, new buffer", "sums, then (s, t)")
    for lane, name in enumerate(lanes):
        axes.text(-0.3, 1.3 * lane + 0.5, name, ha="right", va="center")
    order, now, starts = [tile + str(row + 1) for tile in "ABC" for row in range(4)], 2.0, []
    for i in range(len(order)):
        starts.append(now)
        now += 1 if i % 4 < 3 else 2
    for i, row in enumerate(order):
        if i < 2:
            box(axes, i, 0, 1, 1, colours["A"], row)
        if i + 2 < len(order):
            box(axes, starts[i], 0, 1, 1, colours[order[i + 2][0]], order[i + 2])
        if i >= 4:
            box(axes, starts[i], 1.3, 1, 1, colours[order[i - 4][0]], order[i - 4])
        box(axes, starts[i], 2.6, 1, 1, colours[row[0]], row)
        if i % 4 == 3:
            box(axes, starts[i] + 1, 3.9, 1, 1, colours[row[0]], row[0])
    axes.annotate("", (now, 5.4), (0, 5.4), arrowprops={"arrowstyle": "->"})
    axes.text(
        now / 2,
        5.5,
        "time; A1 is what all threads of the block read of tile A at once",
        ha="center",
        va="top",
    )
    axes.set(xlim=(-4.6, now + 0.2), ylim=(6.3, -0.2))
    return figure


def network(axes: Axes, layers: list[nn.Linear], title: str, names: list[list[int]]) -> None:
    """Units as circles with their numbers, weights other than 0 as lines."""

    def place(depth: int, unit: int) -> tuple[float, float]:
        return 2.2 * depth, unit - (len(names[depth]) - 1) / 2

    for depth, layer in enumerate(layers):
        for out, into in layer.weight.detach().nonzero().tolist():
            axes.plot(*zip(place(depth, into), place(depth + 1, out)), color=BLUE, linewidth=0.8, zorder=1)
    for depth, units in enumerate(names):
        for unit, number in enumerate(units):
            reads = depth == 0 or bool(layers[depth - 1].weight[unit].any())
            read = depth == len(layers) or bool(layers[depth].weight[:, unit].any())
            colour = "white" if reads and read else ORANGE if read else LIGHT
            axes.plot(
                *place(depth, unit), "o", color=colour, markersize=15, markeredgecolor="black", zorder=2
            )
            axes.text(*place(depth, unit), number, ha="center", va="center", fontsize=8, zorder=3)
    axes.set(xlim=(-0.6, 7.2), ylim=(4, -3), title=title)


def draw_compact() -> Figure:
    """A small network with dead weights, and the result of compact on it."""
    torch.manual_seed(2)
    layers = [nn.Linear(5, 6), nn.Linear(6, 5), nn.Linear(5, 3)]
    with torch.no_grad():
        for layer in layers:
            layer.weight[torch.rand(layer.weight.shape) < 0.45] = 0
        layers[0].weight[1] = 0  # its output is its bias, a constant
        layers[1].weight[:, 3] = 0  # no weight reads it
        layers[2].weight[:, 2] = 0
        layers[1].weight[2, 4], layers[1].weight[[0, 1, 3, 4], 4] = 1.0, 0  # read by that unit alone
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    result = compact(model, torch.zeros(1, 5))
    small = [layer for layer in result.model if isinstance(layer, nn.Linear)]
    left = [[i for i in range(6) if i not in (1, 3, 4)], [i for i in range(5) if i != 2]]
    assert [layer.out_features for layer in small[:-1]] == list(map(len, left))
    figure, panels = sheet(9, 3.6, 2)
    ends = list(range(5)), list(range(3))
    before, after = result.parameters
    network(
        panels[0], layers, f"before: {before} parameters", [ends[0], list(range(6)), list(range(5)), ends[1]]
    )
    network(panels[1], small, f"after compact: {after} parameters", [ends[0], *left, ends[1]])
    panels[0].text(3.3, 3.3, "orange: reads nothing, a constant", ha="center", fontsize=8.5)
    panels[0].text(3.3, 3.75, "grey: no weight reads it", ha="center", fontsize=8.5)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "figures/groups": draw_groups,
    "figures/weights": draw_weights,
    "design/figures/cpu-tiles": draw_cpu_tiles,
    "design/figures/cuda-paths": draw_cuda_paths,
    "design/figures/cuda-ring": draw_cuda_ring,
    "design/figures/exact-root": draw_exact_root,
    "design/figures/exact-fraction": draw_fractions,
    "design/figures/compact": draw_compact,
}


def draw(folder: Path) -> list[Path]:
    """Draws all figures as SVG and returns the paths written."""
    written, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    with matplotlib.rc_context(STYLE), torch.random.fork_rng(devices=[]):
        for name, make in FIGURES.items():
            path = folder / f"{name}.svg"
            path.parent.mkdir(parents=True, exist_ok=True)
            make().savefig(path, metadata={"Date": None})
            written.append(path)
    torch.set_num_threads(threads)
    return written


if __name__ == "__main__":
    print(*draw(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)), sep="\n")
