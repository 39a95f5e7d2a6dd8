"""Writes what was measured into docs/claims.md, from the CSV files: ``python -m bench.accuracy page``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from cges_kernels.reporting.files import write_text

from .experiments import DENSITY, EXPERIMENTS, ROUNDS, THRESHOLD, Row
from .results import RESULTS, Group, Interval, best, epochs_to, gain, grouped, margin, read_runs

PAGE = Path(__file__).parent.parent.parent / "docs" / "claims.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
COSTS = {
    "nonzero": "nonzero weights",
    "flops_nonzero": "FLOPs by nonzeros",
    "weights_compacted": "weights, compacted",
    "flops_compacted": "FLOPs, compacted",
}
SHARE = 0.95  # of the dense network's last accuracy: what Figure 4 a waits for


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def margins(name: str, rows: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> str:
    """A line per pair: accuracy of the first less the second's at equal cost, for each cost."""
    lines = []
    for arm, rival in pairs:
        found = [margin(rows, arm, rival, x) for x in COSTS]
        cells = ["no level that all reach" if m is None else str(m) for m in found]
        lines.append([f"{EXPERIMENTS[name].label(arm)} against {EXPERIMENTS[name].label(rival)}", *cells])
    return table(["points of accuracy, at equal", *COSTS.values()], lines)


def _least_as_good(groups: Sequence[Group], dense: Group) -> Group | None:
    """Of those that are not measurably worse than the dense network, the one with fewest weights."""
    as_good = [g for g in groups if gain(g, dense).mean + gain(g, dense).half >= 0]
    return min(as_good, key=lambda group: group.interval("nonzero").mean, default=None)


def fig3(rows: Sequence[Row]) -> list[str]:
    groups, dense = grouped("fig3", rows), best("fig3", rows, "l2")
    methods = ("l1", "gs_filter", "gs_feature", "es", "cges")
    lines = []
    for arm in methods:
        mine, top = [group for group in groups if group.arm == arm], best("fig3", rows, arm)
        least = _least_as_good(mine, dense)
        label, over = EXPERIMENTS["fig3"].label(arm), gain(top, dense)
        saved = "none" if least is None else f"{least.interval('nonzero')}%, λ {least.lam:g}"
        weights = f"{over.signed} ({top.interval('nonzero').mean:.0f}% of the weights): {over.verdict}"
        lines.append([label, weights, saved])
    header = ["", "at its most accurate λ, against dense", "fewest weights not measurably worse than dense"]
    text = [
        "**Stated:** CGES is more accurate than l1, group sparsity and exclusive sparsity with as many "
        "parameters and FLOPs.",
        margins("fig3", rows, [("cges", rival) for rival in methods[:-1]]),
        "**Stated:** it saves parameters at the accuracy of the dense network, or even improves on it.",
        f"The dense network (l2, its best λ {dense.lam:g}) has {dense.interval('accuracy')}%.",
        table(header, lines),
    ]
    if any(row["arm"] == "slimming" for row in rows):
        text += [
            "Not in the thesis: network slimming (l1 on batch-norm scales, channels then removed by "
            "`compact()`), on the same network with batch norm behind its convolutions.",
            margins("fig3", rows, [("cges_norm", "slimming")]),
        ]
    return text


def sooner(rows: Sequence[Row], rival: str) -> str:
    """By how many epochs CGES reaches SHARE before the rival, and whether that holds."""
    ours, theirs = (epochs_to(rows, arm, SHARE, "l2") for arm in ("cges", rival))
    for epochs, whom in ((ours, "CGES"), (theirs, "it")):
        if never := list(epochs.values()).count(math.inf):
            return f"{whom} does not get there with {never} of {len(epochs)} seeds"
    found = Interval.of([theirs[seed] - ours[seed] for seed in ours])
    return f"{found.signed}: {found.verdict}"


def fig4a(rows: Sequence[Row]) -> list[str]:
    reached = {arm: epochs_to(rows, arm, SHARE, "l2") for arm in EXPERIMENTS["fig4a"].arms}
    last = [g for g in grouped("fig4a", rows) if g.point == max(row["epoch"] for row in rows)]
    lines = []
    for group in last:
        epochs = reached[group.arm]
        median = statistics.median(epochs.values())
        shown = "not reached" if math.isinf(median) else f"{median:g}"
        against = "" if group.arm == "cges" else sooner(rows, group.arm)
        label = f"{EXPERIMENTS['fig4a'].label(group.arm)}, λ {group.lam:g}"
        lines.append([label, shown, against, f"{group.interval('accuracy')}", f"{group.interval('nonzero')}"])
    header = ["", "median epoch", "epochs that CGES is sooner", "accuracy at the end, %", "weights, %"]
    return [
        "**Stated:** training with CGES converges faster than with the other regularisers.",
        f"Epochs until the test accuracy is {SHARE:.0%} of what the dense network (l2) ends with, at a λ of "
        "each method that leaves about as many weights. The penalty grows over the first 30% of the steps.",
        table(header, lines),
    ]


def fig4b(rows: Sequence[Row]) -> list[str]:
    return [
        "**Stated:** convolutions and fully connected layers should both be regularised: together they save "
        "most at equal accuracy.",
        margins("fig4b", rows, [("both", "conv"), ("both", "fc"), ("conv", "fc")]),
    ]


def fig4c(rows: Sequence[Row]) -> list[str]:
    return [
        "**Stated:** sharing in low layers and competition in high ones (mu rising from layer to layer) is "
        "better than mu = 0.5 everywhere.",
        margins("fig4c", rows, [("increasing", "constant")]),
    ]


def table2(rows: Sequence[Row]) -> list[str]:
    ends = [row for row in rows if row["density"] == 100 * DENSITY]
    dense = [row for row in rows if row["density"] == 100]
    tops = {arm: best("table2", ends, arm) for arm in EXPERIMENTS["table2"].arms}
    lines = []
    for arm, top in tops.items():
        before = next(g for g in grouped("table2", dense) if (g.arm, g.lam) == (arm, top.lam))
        cells = [
            f"{g.interval(key)}" for g, key in ((before, "accuracy"), (top, "accuracy"), (top, "nonzero"))
        ]
        lines.append([f"{EXPERIMENTS['table2'].label(arm)}, λ {top.lam:g}", *cells])
    over = gain(tops["cges"], tops["l2"])
    header = ["", "before pruning, %", f"pruned to {DENSITY:.0%}, %", "weights left, %"]
    return [
        "**Stated:** with CGES in place of l2, iterative pruning (Han et al.) to a tenth of the parameters "
        "keeps more of the accuracy.",
        f"{ROUNDS} rounds of pruning and retraining, each method at the λ (of three) with the greatest "
        "accuracy at the end.",
        table(header, lines),
        f"CGES against l2: {over.signed} points: {over.verdict}.",
    ]


def subgradient(rows: Sequence[Row]) -> list[str]:
    order = ("sequential", "exact", "cut", "threshold", "untouched")
    lines = [
        [EXPERIMENTS["subgradient"].label(g.arm), f"{g.lam:g}"]
        + [str(g.interval(key)) for key in ("accuracy", "nonzero", "flops_compacted")]
        for g in sorted(grouped("subgradient", rows), key=lambda g: (g.lam, order.index(g.arm)))
    ]
    pairs = [("sequential", "exact"), ("sequential", "cut"), ("sequential", "threshold"), ("exact", "cut")]
    return [
        "Not in the thesis: its algorithm (sequential mode) beside the exact proximal operator, and both "
        "beside the penalty added to the loss, its weights set to zero at the end only, where they are below "
        f"{THRESHOLD:g} or by magnitude down to sequential mode's number; the same objective for all. Read a "
        'line\'s "holds" as: the first is more accurate.',
        margins("subgradient", rows, pairs),
        table(["CGES", "λ", "accuracy, %", "weights, %", "FLOPs, compacted, %"], lines),
    ]


SECTIONS: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "fig3": fig3,
    "fig4a": fig4a,
    "fig4b": fig4b,
    "fig4c": fig4c,
    "table2": table2,
    "subgradient": subgradient,
}


def _against(rows: Sequence[Row], name: str, arm: str, rivals: Sequence[str]) -> str:
    """The verdicts on an arm against others at equal nonzero weights."""
    found = {EXPERIMENTS[name].label(rival): margin(rows, arm, rival, "nonzero") for rival in rivals}
    verdicts = {label: "no common level" if m is None else m.interval.verdict for label, m in found.items()}
    return "; ".join(f"against {label}: {verdict}" for label, verdict in verdicts.items())


def _epochs_against(rows: Sequence[Row]) -> str:
    rivals = [arm for arm in EXPERIMENTS["fig4a"].arms if arm != "cges"]
    labels = {EXPERIMENTS["fig4a"].label(arm): sooner(rows, arm).rpartition(": ")[2] for arm in rivals}
    return "; ".join(f"against {label}: {verdict}" for label, verdict in labels.items())


def _dense(rows: Sequence[Row]) -> str:
    top = best("fig3", rows, "cges")
    over = gain(top, best("fig3", rows, "l2"))
    weights = top.interval("nonzero").mean
    return f"{over.verdict} (at its most accurate λ, with {weights:.0f}% of the weights)"


def _pruned(rows: Sequence[Row]) -> str:
    ends = [row for row in rows if row["density"] == 100 * DENSITY]
    return gain(best("table2", ends, "cges"), best("table2", ends, "l2")).verdict


CLAIMS: list[tuple[str, str, Callable[[Sequence[Row]], str]]] = [
    (
        "fig3",
        "CGES is more accurate at equal nonzero weights",
        lambda rows: _against(rows, "fig3", "cges", ("l1", "gs_filter", "gs_feature", "es")),
    ),
    ("fig3", "CGES is more accurate than the dense network, and sparse", _dense),
    ("fig4a", "CGES converges faster", _epochs_against),
    (
        "fig4b",
        "CGES on all layers is better than on some, at equal nonzero weights",
        lambda rows: _against(rows, "fig4b", "both", ("conv", "fc")),
    ),
    (
        "fig4c",
        "mu rising over the layers is better than constant, at equal nonzero weights",
        lambda rows: _against(rows, "fig4c", "increasing", ("constant",)),
    ),
    ("table2", "pruned to 10%, CGES keeps more accuracy than l2", _pruned),
]


def overview(folder: Path) -> str:
    """The claims and whether they held, in short."""
    paths = {name: folder / f"{name}-runs.csv" for name in EXPERIMENTS}
    rows = {name: read_runs(path) for name, path in paths.items() if path.exists()}
    lines = [
        [
            EXPERIMENTS[name].title.partition(":")[0],
            claim,
            judge(rows[name]) if name in rows else "not measured",
        ]
        for name, claim, judge in CLAIMS
    ]
    return "## In short\n\n" + table(["", "claim", "here"], lines)


def section(name: str, folder: Path) -> str:
    """What was found in an experiment, on what, over how many seeds."""
    title = f"## {EXPERIMENTS[name].title}"
    path = folder / f"{name}-runs.csv"
    if not path.exists():
        return f"{title}\n\nNot measured yet: `python -m bench.accuracy {name}`."
    rows = read_runs(path)
    first, seeds = rows[0], len({row["seed"] for row in rows})
    told = (
        f"Measured by `python -m bench.accuracy {name}`: {first['data']}, network {first['net']}, "
        f"{first['epochs']:g} epochs, {seeds} seeds."
    )
    picture = f"![{EXPERIMENTS[name].title}](../bench/results/accuracy/{name}.svg)"
    return "\n\n".join([title, told, *SECTIONS[name](rows), picture])


def with_measured(text: str, folder: Path = RESULTS) -> str:
    """The page's text with its measurements made anew."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    parts = [overview(folder), *(section(name, folder) for name in SECTIONS)]
    return f"{before}{BEGIN}\n" + "\n\n".join(parts) + f"\n{END}{after}"


def main() -> None:
    write_text(PAGE, with_measured(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
