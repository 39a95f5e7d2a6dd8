"""The experiments: their arms, and the runs that each makes of an arm at a lambda."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cges_kernels import density_schedule, prune_to_density, sparsity_report

from .arms import CGES, FIG3, FIG4A, FIG4B, FIG4C, TABLE2, Arm
from .data import Dataset
from .networks import NORMED
from .training import Repetition, Settings

DENSITY, ROUNDS = 0.1, 4  # of Table 2
THRESHOLD = 1e-3  # below which the subgradient method's weights are set to zero

Row = dict[str, Any]
Measure = Callable[[Repetition, Arm, float], list[Row]]


def trained(repetition: Repetition, arm: Arm, lam: float) -> list[Row]:
    """Train, then measure."""
    model = repetition.network(arm.norm)
    repetition.fit(model, repetition.optimizer(model, arm, lam))
    return [repetition.measure(model, arm.slimming)]


def curve(repetition: Repetition, arm: Arm, lam: float) -> list[Row]:
    """Train, and measure after every epoch."""
    model, rows = repetition.network(arm.norm), []

    def after_epoch(epoch: int) -> None:
        nonzero = sparsity_report(model).total.percent_nonzero
        rows.append({"epoch": epoch, "accuracy": repetition.accuracy(model), "nonzero": nonzero})

    optimizer = repetition.optimizer(model, arm, lam)
    repetition.fit(model, optimizer, after_epoch=after_epoch)
    return rows


def pruned(repetition: Repetition, arm: Arm, lam: float) -> list[Row]:
    """Train, then prune and retrain half as long in rounds; measured before and after every round."""
    model = repetition.network(arm.norm)
    optimizer = repetition.optimizer(model, arm, lam)
    repetition.fit(model, optimizer)
    rows = [{"density": 100.0, **repetition.measure(model)}]
    for density in density_schedule(DENSITY, ROUNDS):
        prune_to_density(model, density, optimizer=optimizer)
        repetition.fit(model, optimizer, epochs=-(-repetition.settings.epochs // 2), warmup=0)
        rows.append({"density": 100 * density, **repetition.measure(model)})
    return rows


def side_by_side(repetition: Repetition, arm: Arm, lam: float) -> list[Row]:
    """Sequential mode, exact mode and the subgradient method, on the same network and images in one order."""
    rows = []
    for mode in ("sequential", "exact"):
        model = repetition.network(arm.norm)
        repetition.fit(model, repetition.optimizer(model, arm, lam, prox_mode=mode))
        rows.append({"arm": mode, **repetition.measure(model)})
    model = repetition.network(arm.norm)
    repetition.fit_subgradient(model, arm, lam)
    rows.append({"arm": "untouched", **repetition.measure(model)})
    cut = copy.deepcopy(model)
    prune_to_density(cut, max(rows[0]["nonzero"] / 100, 1e-3))
    rows.append({"arm": "cut", **repetition.measure(cut)})
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.masked_fill_(p.abs() < THRESHOLD, 0)
    rows.append({"arm": "threshold", **repetition.measure(model)})
    return rows


@dataclass(frozen=True)
class Experiment:
    """``measure`` runs an arm at a lambda; ``labels`` are of the rows' arms where those have others."""

    title: str
    arms: dict[str, Arm]
    measure: Measure
    lambdas: int = 4
    labels: dict[str, str] | None = None

    def label(self, arm: str) -> str:
        return self.labels[arm] if self.labels else self.arms[arm].label

    @property
    def order(self) -> list[str]:
        """The arms that rows may be of."""
        return list(self.labels or self.arms)


EXPERIMENTS = {
    "fig3": Experiment("Figure 3: accuracy over parameters and FLOPs", FIG3, trained),
    "fig4a": Experiment("Figure 4 a: convergence", FIG4A, curve, lambdas=1),
    "fig4b": Experiment("Figure 4 b: which layers CGES is put on", FIG4B, trained),
    "fig4c": Experiment("Figure 4 c: mu increasing or constant", FIG4C, trained),
    "table2": Experiment("Table 2: iterative pruning to 10% of the weights", TABLE2, pruned, lambdas=3),
    "subgradient": Experiment(
        "Sequential mode, exact mode and the subgradient method",
        {"cges": CGES},
        side_by_side,
        labels={
            "sequential": "sequential (thesis)",
            "exact": "exact",
            "cut": "subgradient, cut to sequential's number",
            "threshold": f"subgradient, cut at {THRESHOLD:g}",
            "untouched": "subgradient, as trained",
        },
    ),
}


class Job(NamedTuple):
    """One unit of work; ``experiment`` "l2" is the training that fine-tuning starts from."""

    experiment: str
    arm: str
    lam: float
    seed: int


def jobs_of(name: str, settings: Settings, seeds: int, lambdas: int | None) -> list[Job]:
    """The jobs of an experiment, without the arms that ask for batch norm where there is none to be had."""
    experiment = EXPERIMENTS[name]
    has_norm = NORMED.get(settings.net) == settings.net
    fresh = (
        settings.net in NORMED and not settings.pretrain_epochs
    )  # a variant would need its own pretraining
    arms = {key: arm for key, arm in experiment.arms.items() if not arm.norm or has_norm or fresh}
    if has_norm:  # it would be CGES again
        arms.pop("cges_norm", None)
    return [
        Job(name, key, lam, seed)
        for seed in range(seeds)
        for key, arm in arms.items()
        for lam in arm.lambdas(lambdas or experiment.lambdas)
    ]


def pretraining(settings: Settings, seeds: int) -> Sequence[Job]:
    """What must be done before any experiment's jobs."""
    return [Job("l2", "", 0.0, seed) for seed in range(seeds)] if settings.pretrain_epochs else []


def work(job: Job, dataset: Dataset, settings: Settings, folder: Path) -> list[Row]:
    """The rows of a job."""
    repetition = Repetition(dataset, settings, folder, job.seed)
    if job.experiment == "l2":
        repetition.pretrain()
        return []
    experiment = EXPERIMENTS[job.experiment]
    rows = experiment.measure(repetition, experiment.arms[job.arm], job.lam)
    return [{"arm": job.arm, "lambda": job.lam, "seed": job.seed, **row} for row in rows]
