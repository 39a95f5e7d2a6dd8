"""What each experiment found, in words and tables. Every verdict is computed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from cges_kernels.reporting.explain import Table

from ..common.methods import RIVALS
from ..common.results import COSTS, Group, Interval, Results, Row
from .experiments import DENSITY, ROUNDS, THRESHOLD

SHARE = 0.95  # of the dense network's last accuracy: what Figure 4 a waits for
LOSS = 1.0  # points of accuracy that a network may lose and still count as no worse than the dense one


class Section(NamedTuple):
    """What was found in an experiment: the claims with their verdicts in short, and paragraphs."""

    claims: dict[str, str]
    paragraphs: list[str | Table]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    return Table(tuple(header), tuple(map(tuple, rows)), left=len(header))


def margins(results: Results, pairs: Sequence[tuple[str, str]]) -> Table:
    """A line per pair: accuracy of the first less the second's at equal cost, for each cost."""
    lines = []
    for arm, rival in pairs:
        cells = [str(results.margin(arm, rival, x)) for x in COSTS]
        lines.append([f"{results.labels[arm]} against {results.labels[rival]}", *cells])
    return table(["points of accuracy, at equal", *COSTS.values()], lines)


def against(results: Results, arm: str, rivals: Sequence[str]) -> str:
    """The verdicts on an arm against others at equal nonzero weights."""
    verdicts = {rival: results.margin(arm, rival, "nonzero").verdict for rival in rivals}
    return "; ".join(f"against {results.labels[rival]}: {verdict}" for rival, verdict in verdicts.items())


def no_worse(group: Group, dense: Group) -> bool:
    """Whether the claim holds that the group loses less than LOSS against the dense network."""
    mean, half = group.gain(dense)
    return Interval(mean + LOSS, half).verdict == "holds"


def fewest(groups: Sequence[Group], dense: Group) -> str:
    """The weights and lambda of the sparsest network that is no worse than the dense one."""
    least = min(
        (group for group in groups if no_worse(group, dense)),
        key=lambda group: group.interval("nonzero").mean,
        default=None,
    )
    if least is None:
        return "none"
    which = ", its weakest" if least is groups[0] else ""
    return f"{least.interval('nonzero')}%, λ {least.lam:g}{which}"


def every_lambda(results: Results) -> Table:
    """A line per arm: its range of lambda, and accuracy and weights at each, from weakest to strongest."""
    arms = {arm: results.of(arm) for arm in results.labels if results.of(arm)}
    lines = []
    for arm, groups in arms.items():
        cells = [f"{group.interval('accuracy')} ({group.interval('nonzero').mean:.0f}%)" for group in groups]
        lines.append([results.labels[arm], f"{groups[0].lam:g} to {groups[-1].lam:g}", *cells])
    count = max(map(len, arms.values()))
    return table(["accuracy, % (weights)", "range of λ", *(f"λ {i + 1}" for i in range(count))], lines)


def fig3(results: Results) -> Section:
    dense = results.best("l2")
    ours = [arm for arm in ("cges", "cges_authors") if results.of(arm)]
    lines = []
    for arm in (*RIVALS, *ours):
        cells = [results.over("l2", arm), fewest(results.of(arm), dense)]
        lines.append([results.labels[arm], *cells])
    header = [
        "",
        "at its most accurate λ, against dense",
        f"fewest weights that lose less than {LOSS:g} point",
    ]
    paragraphs: list[str | Table] = [
        "**Claim:** CGES is more accurate than l1, group sparsity and exclusive sparsity with as many "
        "parameters and FLOPs.",
        margins(results, [(arm, rival) for arm in ours for rival in RIVALS]),
        "Every λ is below, from each method's weakest to its strongest, with the test accuracy and, in "
        "brackets, the share of nonzero weights.",
        every_lambda(results),
        "**Claim:** CGES saves parameters at the accuracy of the dense network, or even improves on it.",
        f"The dense network (l2, its most accurate λ {dense.lam:g}) reaches {dense.interval('accuracy')}%. "
        f"The last column has the sparsest network of which it holds that it loses less than {LOSS:g} point "
        f"against that: the interval of the difference lies above -{LOSS:g}. Where this is a method's "
        "weakest λ, the grid is too coarse to say how few weights would do.",
        table(header, lines),
    ]
    if results.of("slimming"):
        normed = "cges_norm" if results.of("cges_norm") else "cges"
        paragraphs += [
            "The thesis does not compare with network slimming, which puts l1 on batch-norm scales and "
            "removes the channels whose scale is zero. Here `compact()` removes them. Both networks have "
            "batch norm.",
            margins(results, [(normed, "slimming")]),
        ]
    claims = {}
    for arm in ours:
        label, top = results.labels[arm].replace(", ", " with the "), results.best(arm)
        weights = f"which leaves {top.interval('nonzero').mean:.0f}% of the weights"
        claims[f"{label} is more accurate at equal nonzero weights"] = against(results, arm, RIVALS)
        claims[f"{label} is more accurate than the dense network"] = (
            f"{top.gain(dense).verdict} (at its most accurate λ, {weights})"
        )
    return Section(claims, paragraphs)


def epochs_to(rows: Iterable[Row], arm: str, share: float, rival: str) -> dict[int, float]:
    """Per seed, the first epoch at which ``arm`` has ``share`` of ``rival``'s last accuracy; inf: none."""
    rows = list(rows)
    found = {}
    for seed in sorted({row["seed"] for row in rows}):
        of = {a: [r for r in rows if r["seed"] == seed and r["arm"] == a] for a in (arm, rival)}
        wanted = share * max(of[rival], key=lambda row: row["epoch"])["accuracy"]
        found[seed] = min((r["epoch"] for r in of[arm] if r["accuracy"] >= wanted), default=math.inf)
    return found


def sooner(ours: dict[int, float], theirs: dict[int, float], rival: str) -> tuple[str, str]:
    """(by how many epochs CGES reaches SHARE before a rival, whether that holds)."""
    reached = [sum(math.isfinite(epoch) for epoch in epochs.values()) for epochs in (ours, theirs)]
    if min(reached) < len(ours):  # a seed has no difference
        return "", f"CGES gets there in {reached[0]} of {len(ours)} seeds, {rival} in {reached[1]}"
    found = Interval.of([theirs[seed] - ours[seed] for seed in ours])
    return f"{found.signed}: ", found.verdict


def fig4a(results: Results) -> Section:
    labels = results.labels
    reached = {arm: epochs_to(results.rows, arm, SHARE, "l2") for arm in labels}
    verdicts = {arm: sooner(reached["cges"], reached[arm], labels[arm]) for arm in labels if arm != "cges"}
    lines = []
    for group in results.at(max(row["epoch"] for row in results.rows)).groups:
        median = statistics.median(reached[group.arm].values())
        shown = "not reached" if math.isinf(median) else f"{median:g}"
        label = f"{labels[group.arm]}, λ {group.lam:g}"
        found = [str(group.interval(key)) for key in ("accuracy", "nonzero")]
        lines.append([label, shown, "".join(verdicts.get(group.arm, "")), *found])
    header = ["", "median epoch", "epochs that CGES is sooner", "accuracy at the end, %", "weights, %"]
    paragraphs: list[str | Table] = [
        "**Claim:** training with CGES converges faster than with the other regularisers.",
        "The table shows after how many epochs the test accuracy reaches "
        f"{SHARE:.0%} of what the dense network (l2) ends with. Each sparse method has a λ that leaves about "
        "as many weights as the others'. The warm-up of the penalty is part of the epochs that are counted.",
        table(header, lines),
    ]
    told = "; ".join(f"against {labels[arm]}: {verdict}" for arm, (_, verdict) in verdicts.items())
    return Section({"CGES converges faster": told}, paragraphs)


def fig4b(results: Results) -> Section:
    paragraphs: list[str | Table] = [
        "**Claim:** convolutions and fully connected layers should both be regularised, because together "
        "they save most at equal accuracy.",
        margins(results, [("both", "conv"), ("both", "fc"), ("conv", "fc")]),
    ]
    claim = "CGES on all layers is better than on some, at equal nonzero weights"
    return Section({claim: against(results, "both", ("conv", "fc"))}, paragraphs)


def fig4c(results: Results) -> Section:
    paragraphs: list[str | Table] = [
        "**Claim:** sharing in low layers and competition in high ones (mu rising from layer to layer) is "
        "better than mu = 0.5 everywhere.",
        'With `scale="size"` the exclusive part is nearly inactive. So this compares a group lasso that '
        "fades from layer to layer with one that is the same in every layer, and says little about "
        "competition.",
        margins(results, [("increasing", "constant")]),
    ]
    claim = "mu rising over the layers is better than constant, at equal nonzero weights"
    return Section({claim: against(results, "increasing", ("constant",))}, paragraphs)


def table2(results: Results) -> Section:
    before, ends = results.at(100), results.at(100 * DENSITY)
    tops = {arm: ends.best(arm) for arm in results.labels}
    lines = []
    for arm, top in tops.items():
        first = next(group for group in before.of(arm) if group.lam == top.lam)
        found = [first.interval("accuracy"), top.interval("accuracy"), top.interval("nonzero")]
        lines.append([f"{results.labels[arm]}, λ {top.lam:g}", *map(str, found)])
    gain = tops["cges"].gain(tops["l2"])
    header = ["", "before pruning, %", f"pruned to {DENSITY:.0%}, %", "weights left, %"]
    paragraphs: list[str | Table] = [
        "**Claim:** with CGES in place of l2, iterative pruning (Han et al.) to a tenth of the parameters "
        "keeps more of the accuracy.",
        f"The network is pruned and retrained in {ROUNDS} rounds, each half as long as the first training "
        "and without a warm-up. Each method is shown at that of its λ which is most accurate at the end. "
        'With `scale="size"` the exclusive part is nearly inactive, so this tests a mild group lasso.',
        table(header, lines),
        f"CGES against l2: {gain.signed} points: {gain.verdict}.",
    ]
    return Section({"pruned to 10%, CGES keeps more accuracy than l2": gain.verdict}, paragraphs)


def subgradient(results: Results) -> Section:
    order = ("sequential", "exact", "cut", "threshold", "untouched")
    lines = [
        [results.labels[group.arm], f"{group.lam:g}"]
        + [str(group.interval(key)) for key in ("accuracy", "nonzero", "flops_compacted")]
        for group in sorted(results.groups, key=lambda group: (group.lam, order.index(group.arm)))
    ]
    pairs = [("sequential", "exact"), ("sequential", "cut"), ("sequential", "threshold"), ("exact", "cut")]
    paragraphs: list[str | Table] = [
        "This comparison is not in the thesis. Its algorithm (sequential mode) stands beside the exact "
        "proximal operator, and both beside the subgradient method, which adds the penalty to the loss. All "
        "have the same objective. The subgradient method leaves no exact zeros, so its weights are set to "
        f"zero at the end: those below {THRESHOLD:g}, or the smallest until as many are left as in "
        "sequential mode. A line holds if the method that it names first is the more accurate. With "
        '`scale="size"` and these λ the exclusive thresholds are so small that both modes agree by '
        "construction, so the first line cannot tell which is better.",
        margins(results, pairs),
        table(["CGES", "λ", "accuracy, %", "weights, %", "FLOPs, compacted, %"], lines),
    ]
    return Section({}, paragraphs)


SECTIONS: dict[str, Callable[[Results], Section]] = {
    "fig3": fig3,
    "fig4a": fig4a,
    "fig4b": fig4b,
    "fig4c": fig4c,
    "table2": table2,
    "subgradient": subgradient,
}
