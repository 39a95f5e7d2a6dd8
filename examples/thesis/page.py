"""Writes what was measured into docs/claims.md, from the CSV files: ``python -m examples.thesis page``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from cges_kernels.reporting.files import write_text

from ..common.results import COSTS, Group, Interval, Results, Row, read_runs
from .experiments import DENSITY, EXPERIMENTS, ROUNDS, THRESHOLD

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "claims.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
RIVALS = ("l1", "gs_filter", "gs_feature", "es")  # of CGES
SHARE = 0.95  # of the dense network's last accuracy: what Figure 4 a waits for


class Section(NamedTuple):
    """What was found in an experiment: the claims with their verdicts in short, and paragraphs."""

    claims: dict[str, str]
    paragraphs: list[str]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def margins(results: Results, pairs: Sequence[tuple[str, str]]) -> str:
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


def least_as_good(groups: Sequence[Group], dense: Group) -> str:
    """Of those that are not measurably worse than the dense network, the one with the fewest weights."""
    as_good = [g for g in groups if g.gain(dense).mean + g.gain(dense).half >= 0]
    least = min(as_good, key=lambda group: group.interval("nonzero").mean, default=None)
    return f"{least.interval('nonzero')}%, λ {least.lam:g}" if least else "none"


def fig3(results: Results) -> Section:
    dense, top = results.best("l2"), results.best("cges")
    lines = []
    for arm in (*RIVALS, "cges"):
        cells = [results.over("l2", arm), least_as_good(results.of(arm), dense)]
        lines.append([results.labels[arm], *cells])
    header = ["", "at its most accurate λ, against dense", "fewest weights not measurably worse than dense"]
    paragraphs = [
        "**Claim:** CGES is more accurate than l1, group sparsity and exclusive sparsity with as many "
        "parameters and FLOPs.",
        margins(results, [("cges", rival) for rival in RIVALS]),
        "**Claim:** CGES saves parameters at the accuracy of the dense network, or even improves on it.",
        f"The dense network (l2, its most accurate λ {dense.lam:g}) reaches {dense.interval('accuracy')}%.",
        table(header, lines),
    ]
    if results.of("slimming"):
        paragraphs += [
            "The thesis does not compare with network slimming, which puts l1 on batch-norm scales and "
            "removes the channels whose scale is zero. Here `compact()` removes them. Both networks have "
            "batch norm behind their convolutions.",
            margins(results, [("cges_norm", "slimming")]),
        ]
    weights = f"with {top.interval('nonzero').mean:.0f}% of the weights"
    claims = {
        "CGES is more accurate at equal nonzero weights": against(results, "cges", RIVALS),
        "CGES is more accurate than the dense network, and sparse": f"{top.gain(dense).verdict} (at its most "
        f"accurate λ, {weights})",
    }
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


def sooner(ours: dict[int, float], theirs: dict[int, float]) -> tuple[str, str]:
    """(by how many epochs CGES reaches SHARE before a rival, whether that holds)."""
    for epochs, whom in ((ours, "CGES"), (theirs, "the other")):
        if never := list(epochs.values()).count(math.inf):
            return "", f"{whom} does not get there in {never} of {len(epochs)} seeds"
    found = Interval.of([theirs[seed] - ours[seed] for seed in ours])
    return f"{found.signed}: ", found.verdict


def fig4a(results: Results) -> Section:
    reached = {arm: epochs_to(results.rows, arm, SHARE, "l2") for arm in results.labels}
    verdicts = {arm: sooner(reached["cges"], reached[arm]) for arm in results.labels if arm != "cges"}
    lines = []
    for group in results.at(max(row["epoch"] for row in results.rows)).groups:
        median = statistics.median(reached[group.arm].values())
        shown = "not reached" if math.isinf(median) else f"{median:g}"
        label = f"{results.labels[group.arm]}, λ {group.lam:g}"
        found = [str(group.interval(key)) for key in ("accuracy", "nonzero")]
        lines.append([label, shown, "".join(verdicts.get(group.arm, "")), *found])
    header = ["", "median epoch", "epochs that CGES is sooner", "accuracy at the end, %", "weights, %"]
    paragraphs = [
        "**Claim:** training with CGES converges faster than with the other regularisers.",
        "The table shows after how many epochs the test accuracy reaches "
        f"{SHARE:.0%} of what the dense network (l2) ends with. Each sparse method has a λ that leaves about "
        "as many weights as the others'. The penalty grows over the first 30% of the steps.",
        table(header, lines),
    ]
    told = "; ".join(f"against {results.labels[arm]}: {verdict}" for arm, (_, verdict) in verdicts.items())
    return Section({"CGES converges faster": told}, paragraphs)


def fig4b(results: Results) -> Section:
    paragraphs = [
        "**Claim:** convolutions and fully connected layers should both be regularised, because together "
        "they save most at equal accuracy.",
        margins(results, [("both", "conv"), ("both", "fc"), ("conv", "fc")]),
    ]
    claim = "CGES on all layers is better than on some, at equal nonzero weights"
    return Section({claim: against(results, "both", ("conv", "fc"))}, paragraphs)


def fig4c(results: Results) -> Section:
    paragraphs = [
        "**Claim:** sharing in low layers and competition in high ones (mu rising from layer to layer) is "
        "better than mu = 0.5 everywhere.",
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
    paragraphs = [
        "**Claim:** with CGES in place of l2, iterative pruning (Han et al.) to a tenth of the parameters "
        "keeps more of the accuracy.",
        f"The network is pruned and retrained in {ROUNDS} rounds. Each method is shown at that of its three "
        "λ which is most accurate at the end.",
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
    paragraphs = [
        "This comparison is not in the thesis. Its algorithm (sequential mode) stands beside the exact "
        "proximal operator, and both beside the subgradient method, which adds the penalty to the loss. All "
        "have the same objective. The subgradient method leaves no exact zeros, so its weights are set to "
        f"zero at the end: those below {THRESHOLD:g}, or the smallest until as many are left as in "
        'sequential mode. "Holds" means here that the first of a line is more accurate.',
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


def measured(folder: Path, names: Iterable[str] = SECTIONS) -> str:
    """The claims and whether they held in short, then each experiment: what it was of, and what came out."""
    claims, parts = [], []
    for name in names:
        experiment = EXPERIMENTS[name]
        results = Results(read_runs(folder / f"{name}-runs.csv"), experiment.labels)
        found = SECTIONS[name](results)
        title = experiment.title.partition(":")[0]
        claims += [[title, claim, verdict] for claim, verdict in found.claims.items()]
        told = f"`python -m examples.thesis {name}` measured this: {results.told}."
        picture = f"![{experiment.title}](../examples/thesis/results/{name}.svg)"
        parts += [f"## {experiment.title}", told, *found.paragraphs, picture]
    return "\n\n".join(["## In short", table(["", "claim", "here"], claims), *parts])


def with_measured(text: str) -> str:
    """The page's text with its measurements made anew."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{measured(RESULTS)}\n{END}{after}"


def main() -> None:
    write_text(PAGE, with_measured(PAGE.read_text(encoding="utf-8")))
