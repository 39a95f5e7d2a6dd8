"""Measures the Triton executor's launch choices on a GPU; ``python -m bench.tune`` prints a table of tiles.

For each tile its neighbours are tried too: parts half and twice as long, half and twice as many groups. Then
other numbers of warps with the best tiles, and windows of other sizes for groups that no tile holds.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import NamedTuple
from unittest.mock import patch

import torch
from tqdm import tqdm

from cges_kernels.backends import unplanned
from cges_kernels.backends.triton import executor, tiles
from cges_kernels.backends.triton.tables import COLUMNS, ELEMENTWISE, GENERAL, ROWS
from cges_kernels.backends.triton.tiles import Tile

from . import baselines
from .lab import DTYPES, Lab, find
from .table import one_line
from .workloads import Case

KINDS = {
    "ELEMENTWISE": ELEMENTWISE.value,
    "COLUMNS": COLUMNS.value,
    "ROWS": ROWS.value,
    "GENERAL": GENERAL.value,
}
LONG = {"COLUMNS": 8192, "ROWS": 65536, "GENERAL": 4096}  # groups that are cut into chunks
WARPS = (4, 8, 16)
WINDOWS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # parts of the L2
PART = range(1024, 16384 + 1)  # elements loaded at once; fewer do not hide latency, more spill
TILE = 32768  # elements of a whole tile: z stays in registers
GAIN = 1.0  # points by which another tile must beat the present one


class Trial(NamedTuple):
    kind: str
    tile: Tile
    warps: int
    dtype: str


def neighbours(tile: Tile) -> list[Tile]:
    """The tile itself, first, and those around it that could do."""
    reds = [n for n in (tile.red, tile.red // 2, 2 * tile.red) if 1 <= n <= (tile.longest or n)]
    tiles = [Tile(tile.longest, r, k) for r in reds for k in (tile.keep, tile.keep // 2, 2 * tile.keep)]
    fitting = [t for t in tiles if t.red * t.keep in PART and t.longest * t.keep <= TILE]
    return [tile, *(t for t in fitting if t != tile)]


def workload(kind: str, longest: int, elements: int) -> Case:
    """A weight whose groups are as long as this tile serves at most, cut the way of ``kind``."""
    size = longest or LONG[kind]
    others = max(elements // size, 16)
    shape, group_by = {
        "ELEMENTWISE": ((others,), "feature"),
        "COLUMNS": ((size, others), "feature"),
        "ROWS": ((others, size), "filter"),
        "GENERAL": ((size // 4, others, 2, 2), "channel"),
    }[kind]
    return Case(f"{kind} {longest}", group_by, [shape])


@contextmanager
def using(trial: Trial) -> Iterator[None]:
    """Plans that are built and run meanwhile cut this kind of layout by this tile alone."""
    mine = {**tiles.TILES, KINDS[trial.kind]: (trial.tile,)}
    unplanned.forget()  # what is kept was cut otherwise
    with patch.multiple(tiles, TILES=mine, NUM_WARPS=trial.warps):
        yield
    unplanned.forget()


def percent_of_copy(lab: Lab, case: Case, dtype: str) -> float:
    lab.free()
    make = partial(baselines.prox_sgd, backend="triton", group_by=case.group_by)
    contender = lab.contender(make, case.shapes, DTYPES[dtype])
    times = lab.beside_copy({"prox_sgd": contender}, case.shapes, DTYPES[dtype])
    return 100 * median(times["copy"]) / median(times["prox_sgd"])


def measured(lab: Lab, trials: Sequence[Trial], elements: int, workers: int) -> dict[Trial, float]:
    """Percent of a copy's speed; NaN for what does not compile or fit."""
    cases = {trial: workload(trial.kind, trial.tile.longest, elements) for trial in trials}
    if workers:
        compile_ahead(lab, cases, workers)
    found = {}
    for trial in (bar := tqdm(cases)):
        bar.set_description(f"{trial.kind} {tuple(trial.tile)} {trial.warps} warps {trial.dtype}")
        with using(trial):
            try:
                found[trial] = percent_of_copy(lab, cases[trial], trial.dtype)
            except Exception as error:
                tqdm.write(f"{trial}: {one_line(error)}", file=sys.stderr)
                found[trial] = math.nan
    return found


def try_once(trial: Trial, case: Case, device: str) -> None:
    """One step, for the compiler's cache on disk; what fails here fails again where it is measured."""
    try:
        with using(trial):
            make = partial(baselines.prox_sgd, case.shapes, "triton", DTYPES[trial.dtype], device)
            make(group_by=case.group_by).step()
    except Exception:
        pass


def compile_ahead(lab: Lab, cases: dict[Trial, Case], workers: int) -> None:
    """Compiling takes seconds a kernel and one core; measuring takes the GPU for itself."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        done = pool.map(partial(try_once, device=lab.device), cases.keys(), cases.values())
        list(tqdm(done, "compiling", len(cases)))


def score(found: dict[Trial, float], kind: str, tile: Tile, warps: int) -> float:
    """The mean over dtypes; a tile that fails for one loses to all others."""
    mean = sum(found[Trial(kind, tile, warps, dtype)] for dtype in DTYPES) / len(DTYPES)
    return -math.inf if math.isnan(mean) else mean


def best_of(found: dict[Trial, float], kind: str, tile: Tile, warps: int) -> Tile:
    """The fastest neighbour of ``tile``, or itself where none is faster by more than noise."""
    winner = max(neighbours(tile), key=lambda t: score(found, kind, t, warps))
    gain = score(found, kind, winner, warps) - score(found, kind, tile, warps)
    return winner if gain > GAIN else tile


def table(found: dict[Trial, float], best: dict[tuple[str, Tile], Tile], warps: int) -> str:
    """As tiles.py holds it, the percent of a copy's speed behind each tile."""
    lines = [f"NUM_WARPS = {warps}", "TILES: dict[int, tuple[Tile, ...]] = {"]
    for kind in dict.fromkeys(kind for kind, _ in best):
        lines.append(f"    {kind}.value: (")
        for tile in (tile for k, tile in best if k == kind):
            new = best[kind, tile]
            percents = ", ".join(f"{dtype} {found[Trial(kind, new, warps, dtype)]:.0f}%" for dtype in DTYPES)
            before = "" if new == tile else f"; {tuple(tile)}: {score(found, kind, tile, warps):.0f}%"
            lines.append(f"        Tile{tuple(new)},  # {percents}{before}")
        lines.append("    ),")
    return "\n".join([*lines, "}"])


def windows(lab: Lab, elements: int) -> str:
    """Percent of a copy's speed by the part of the L2 that a window of whole panels may fill."""
    lines = ["bytes of a window, as a part of the L2:"]
    case = workload("COLUMNS", 0, elements)
    for part in WINDOWS:
        assumed = int(2 * part * lab.l2_bytes)  # the plan takes half of it
        with patch.object(executor, "_l2_bytes", lambda device, assumed=assumed: assumed):
            percents = ", ".join(f"{dtype} {percent_of_copy(lab, case, dtype):.0f}%" for dtype in DTYPES)
        lines.append(f"    {part:6.4f}: {percents}")
    return "\n".join(lines)


def tune(lab: Lab, kinds: Sequence[str], warps: int, elements: int, workers: int = 0) -> str:
    """Everything that is printed, at the number of warps given first."""
    choices = [(kind, tile) for kind in kinds for tile in tiles.TILES[KINDS[kind]]]
    trials = [
        Trial(kind, t, warps, dtype) for kind, tile in choices for t in neighbours(tile) for dtype in DTYPES
    ]
    found = measured(lab, trials, elements, workers)
    best = {(kind, tile): best_of(found, kind, tile, warps) for kind, tile in choices}
    text = [table(found, best, warps)]
    others = [n for n in WARPS if n != warps]
    trials = [Trial(kind, t, n, dtype) for n in others for (kind, _), t in best.items() for dtype in DTYPES]
    found = measured(lab, trials, elements, workers)
    for n in others:
        percents = [f"{kind} {t.longest} {score(found, kind, t, n):.0f}%" for (kind, _), t in best.items()]
        text.append(f"with {n} warps: {', '.join(percents)}")
    return "\n".join([*text, windows(lab, elements)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.tune", description=__doc__)
    parser.add_argument("--kind", choices=KINDS, action="append", help="tune this kind only (repeatable)")
    parser.add_argument("--warps", type=int, default=tiles.NUM_WARPS, help="(default %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=min(os.cpu_count() or 1, 16), help="that compile ahead"
    )
    options = parser.parse_args()
    lab = find("bench.tune")
    lab.seconds = 0.1
    torch.manual_seed(0)
    print(tune(lab, options.kind or list(KINDS), options.warps, 2**24, options.workers))


if __name__ == "__main__":
    main()
