"""What came of the runs, as text. Every verdict is computed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor, nn

from cges_kernels import compact, sparsity_report
from cges_kernels.reporting.explain import Table

from ..common.jobs import one_thread
from ..common.methods import LABELS, RIVALS
from ..common.results import COSTS, KEPT, Results, Row
from ..common.training import Repetition

PASSES = 50  # of each network, of whose times the median is shown
SHOWN = 30.0  # percent of weights nonzero at which the methods' networks are shown, or as near as they come
COLUMNS = {
    "accuracy": "test accuracy",
    "nonzero": "weights",
    "flops_nonzero": "FLOPs nonzero",
    "flops_compacted": "FLOPs compacted",
    "dead_groups": "dead groups",
    "dead_units": "dead units",
}
LEGEND = """\
All columns are in %, as mean ± half of the 95% confidence interval over the repetitions (Student's t).
"weights" are exactly nonzero. "FLOPs nonzero" counts each layer's FLOPs times its share of nonzero weights,
"FLOPs compacted" those of the smaller network that compact() makes. A dead group is an input, or a tap of an
input channel, that no unit reads. A dead unit has no weights but zeros."""
CLAIMS = f"""\
What the thesis claims, and what came out here

A claim holds where the 95% interval of a difference lies above zero. It does not hold where the interval lies
below zero, and is undecided otherwise. At equal cost, methods are compared on curves that are interpolated
between their lambdas, averaged over the levels in brackets. A lambda at which a method keeps less than
{KEPT:.0%} of the greatest mean accuracy is not on its curve."""


def table(results: Results) -> str:
    """A line per method and lambda, the methods apart."""
    lines: list[tuple[str, ...]] = []
    for arm, label in results.labels.items():
        lines += [("",) * (2 + len(COLUMNS))] if lines else []
        for group in results.of(arm):
            lines.append((label, f"{group.lam:g}", *(str(group.interval(key)) for key in COLUMNS)))
    return f"{Table(('method', 'lambda', *COLUMNS.values()), tuple(lines))}\n\n{LEGEND}"


def claims(results: Results) -> str:
    """Which claims of the thesis hold here."""
    dense, label = results.best("l2"), results.labels
    margins = [
        (cost if rival == RIVALS[0] else "", label[rival], str(results.margin("cges", rival, x)))
        for x, cost in COSTS.items()
        for rival in RIVALS
    ]
    gains = [(label[arm], results.over("l2", arm)) for arm in (*RIVALS, "cges")]
    classes = [
        (label[arm], label[rival], str(results.margin(rival, arm, "last_nonzero", "classes_per_feature")))
        for arm in ("es", "cges")
        for rival in ("l1", "gs_feature")
    ]
    paragraphs = [
        CLAIMS,
        *results.caution,
        "1. CGES is more accurate at equal cost.",
        Table(("at equal", "against", "points of accuracy more"), tuple(margins), left=2),
        "2. Sparsity improves on the dense network. Each method is taken at its most accurate lambda, as "
        f"tested.\nThe dense network (l2, lambda {dense.lam:g}) reaches {dense.interval('accuracy')}%.",
        Table(("", "points of accuracy more than l2"), tuple(gains)),
        "3. Exclusive sparsity makes the classes compete: fewer of them read a feature of the last layer,\n"
        "at an equal number of nonzero weights in that layer.",
        Table(("", "against", "classes per feature less"), tuple(classes), left=2),
    ]
    return "\n\n".join(map(str, paragraphs))


def nearest(results: Results, models: Sequence[nn.Module]) -> dict[str, tuple[Row, nn.Module]]:
    """Per method, the row and network of repetition 0 whose % of weights is nearest to SHOWN (as ratios)."""
    found: dict[str, tuple[Row, nn.Module]] = {}
    for arm in results.labels:
        mine = [pair for pair in zip(results.rows, models) if (pair[0]["arm"], pair[0]["seed"]) == (arm, 0)]
        found[arm] = min(mine, key=lambda pair: abs(math.log(max(pair[0]["nonzero"], 1e-3) / SHOWN)))
    return found


@torch.no_grad()
def latencies(models: Sequence[nn.Module], x: Tensor) -> list[float]:
    """The median milliseconds of a pass of each; they take turns, so that a busy machine slows all alike."""
    taken: list[list[float]] = [[] for _ in models]
    for _ in range(PASSES):
        for model, times in zip(models, taken):
            start = time.perf_counter()
            model(x).cpu()
            times.append(1000 * (time.perf_counter() - start))
    return [median(times) for times in taken]


def dense_to_small(row: Row, model: nn.Module, repetition: Repetition) -> str:
    """The zeros of a network, the smaller network without them, and what both make of the test images."""
    example = repetition.test_x[:256]
    small = compact(model.eval().to(example.device), example[:1])
    with one_thread():
        before, after = latencies((model, small.model.eval()), example)
    accuracies = [f"{repetition.accuracy(network):.1f}%" for network in (model, small.model)]
    paragraphs = [
        f"From dense to small: the network of {LABELS[row['arm']]} at lambda {row['lambda']:g}, repetition 0",
        sparsity_report(model, example[:1]),
        "compact() makes a smaller dense network of it. It follows dead channels from layer to layer, so it\n"
        "removes more than the report finds in any layer alone. FLOPs are of one image. The latency is of\n"
        f"{len(example)} images by one thread, the median of {PASSES} passes in which the two took turns.",
        replace(small, latency_ms=(before, after)),
        f"Test accuracy: {accuracies[0]} of the sparse network, {accuracies[1]} of the small one.",
    ]
    return "\n\n".join(map(str, paragraphs))
