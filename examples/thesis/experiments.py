"""The experiments: the arms that each compares, and how an arm is measured at a lambda."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cges_kernels import (
    cges_param_groups,
    density_schedule,
    exclusivity_schedule,
    penalty,
    prune_to_density,
    sparsity_param_groups,
    sparsity_report,
)
from cges_kernels.training.layers import regularised_weights

from ..common.data import Dataset
from ..common.jobs import Job, jobs_of, row_of
from ..common.methods import METHODS, Arm, ParamGroups
from ..common.networks import NORMED, scaled
from ..common.results import Row
from ..common.training import Repetition, Settings

DENSITY, ROUNDS = 0.1, 4  # the last density and the number of rounds for Table 2
THRESHOLD = 1e-3  # smaller weights of the subgradient method are set to zero
PENALTY = ("group_lasso", "exclusive_lasso", "l1", "group_by", "view")  # keys that penalty() takes

Measure = Callable[[Repetition, Arm, float], list[Row]]


def trained(repetition: Repetition, arm: Arm, lam: float) -> list[Row]:
    """The row of a network that is measured once, after training."""
    return [repetition.measure(repetition.train(arm, lam), arm.slimming)]


def curve(repetition: Repetition, arm: Arm, lam: float) -> list[Row]:
    """The rows of a network that is measured after every epoch."""
    model, rows = repetition.network(arm.norm), []

    def after_epoch(epoch: int) -> None:
        nonzero = sparsity_report(model).total.percent_nonzero
        rows.append({"epoch": epoch, "accuracy": repetition.accuracy(model), "nonzero": nonzero})

    repetition.fit(model, repetition.optimizer(model, arm, lam), after_epoch=after_epoch)
    return rows


def pruned(repetition: Repetition, arm: Arm, lam: float) -> list[Row]:
    """The rows of a network that is trained, and then pruned and retrained half as long in rounds.

    It is measured before and after every round.
    """
    model = repetition.network(arm.norm)
    optimizer = repetition.optimizer(model, arm, lam)
    repetition.fit(model, optimizer)
    rows: list[Row] = [{"density": 100.0, **repetition.measure(model)}]
    for density in density_schedule(DENSITY, ROUNDS):
        prune_to_density(model, density, optimizer=optimizer)
        repetition.fit(model, optimizer, epochs=-(-repetition.settings.epochs // 2), warmup=0)
        rows.append({"density": 100 * density, **repetition.measure(model)})
    return rows


def side_by_side(repetition: Repetition, arm: Arm, lam: float) -> list[Row]:
    """The rows of sequential mode, exact mode and the subgradient method, all from one network and order."""
    rows: list[Row] = []
    for mode in ("sequential", "exact"):
        model = repetition.train(arm, lam, prox_mode=mode)
        rows.append({"arm": mode, **repetition.measure(model)})
    model = repetition.network(arm.norm)
    fit_subgradient(repetition, model, arm, lam)
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


def fit_subgradient(repetition: Repetition, model: nn.Module, arm: Arm, lam: float) -> None:
    """Train with the penalty added to the loss and without a proximal step, for the same objective.

    The proximal step's objective is loss + (1 - momentum) * Omega (see ProxSGD).
    """
    settings = repetition.settings
    coefficients = repetition.optimizer(model, arm, lam)
    sgd = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum)

    def omega() -> Tensor:
        groups = coefficients.param_groups
        terms = [penalty(p, **{key: g[key] for key in PENALTY}) for g in groups for p in g["params"]]
        return (1 - settings.momentum) * torch.stack(terms).sum()

    repetition.fit(model, sgd, coefficients=coefficients, penalty=omega)


def on_layers(chosen: Callable[[nn.Parameter], bool]) -> ParamGroups:
    """CGES on the chosen layers only. Each has the mu that it would have if all were regularised."""

    def param_groups(model: nn.Module, lam: float) -> list[dict[str, object]]:
        weights = [layer.param for layer in regularised_weights(model)]
        mu = exclusivity_schedule(len(weights), 0.0)
        on = [lam * chosen(weight) for weight in weights]
        alpha, beta = [a * (1 - x) for a, x in zip(on, mu)], [a * x for a, x in zip(on, mu)]
        return sparsity_param_groups(model, group_lasso=alpha, exclusive_lasso=beta, scale="size")

    return param_groups


def slimming(model: nn.Module, lam: float) -> list[dict[str, object]]:
    """Network slimming (Liu et al. 2017): l1 on the batch-norm scales of convolutions, nothing on weights."""
    scales = {norm.weight for _, norm in scaled(model)}
    return sparsity_param_groups(model, l1=lam, include=lambda name, param: param in scales)


CGES = METHODS["cges"]
# What the TensorFlow code of the paper's authors multiplies a layer's group and exclusive part by.
FACTORS = {
    "conv1.weight": (1.0, 1.0),
    "conv2.weight": (1.0, 0.5),
    "fc1.weight": (1 / 15, 15.0),
    "fc2.weight": (1 / 144, 144.0),
}
AUTHORS = functools.partial(cges_param_groups, m=0.2, scale=FACTORS)
FIG3 = METHODS | {
    # The middle, 6e-4, is the authors' lambda: 6e-5 without momentum.
    "cges_authors": replace(
        CGES,
        label="CGES, authors' factors",
        weakest=9e-5,
        strongest=4e-3,
        param_groups=AUTHORS,
        nets=("lenet", "lenet_bn", "mnist"),
    ),
    # Batch norm undoes what shrinks the weights before it, so a filter is harder to bring to zero.
    "cges_norm": replace(CGES, label="CGES, net with batch norm", weakest=0.012, strongest=0.12, norm=True),
    "slimming": Arm("slimming, net with batch norm", 0.06, 0.6, slimming, norm=True, slimming=True),
}
# At these lambdas Figure 3's runs leave about 45% of the weights, so that methods differ in little else.
FIG4A = {
    arm: replace(METHODS[arm], weakest=lam, strongest=lam)
    for arm, lam in dict(l2=1e-3, l1=0.0095, gs_filter=0.027, gs_feature=0.0126, es=0.77, cges=0.0255).items()
}
FIG4B = {
    "conv": replace(CGES, label="convolutions only", param_groups=on_layers(lambda w: w.dim() > 2)),
    "fc": replace(CGES, label="fully connected only", param_groups=on_layers(lambda w: w.dim() == 2)),
    "both": replace(CGES, label="both"),
}
HALF = functools.partial(cges_param_groups, m=0.5, scale="size")
FIG4C = {
    "increasing": replace(CGES, label="mu from 0 to 1"),
    "constant": replace(CGES, label="mu = 0.5", param_groups=HALF),
}
# Retraining wants a mild penalty, as it is the pruning that makes the weights few.
TABLE2 = {
    "l2": replace(METHODS["l2"], label="l2 (Han et al.)"),
    "cges": replace(CGES, weakest=6e-4, strongest=6e-3),
}


@dataclass(frozen=True)
class Experiment:
    """``measure`` runs an arm at a lambda; ``labels`` holds the labels of the rows' arms, in order."""

    title: str
    arms: dict[str, Arm]
    measure: Measure = trained
    lambdas: int = 4
    measured: dict[str, str] | None = None  # {arm in the rows: its label}, if these are not ``arms``

    @property
    def labels(self) -> dict[str, str]:
        return self.measured or {key: arm.label for key, arm in self.arms.items()}


EXPERIMENTS = {
    "fig3": Experiment("Figure 3: accuracy over parameters and FLOPs", FIG3),
    "fig4a": Experiment("Figure 4 a: convergence", FIG4A, curve, lambdas=1),
    "fig4b": Experiment("Figure 4 b: which layers CGES is put on", FIG4B),
    "fig4c": Experiment("Figure 4 c: mu increasing or constant", FIG4C),
    "table2": Experiment("Table 2: iterative pruning to 10% of the weights", TABLE2, pruned, lambdas=3),
    "subgradient": Experiment(
        "Sequential mode, exact mode and the subgradient method",
        {"cges": CGES},
        side_by_side,
        measured={
            "sequential": "sequential (thesis)",
            "exact": "exact",
            "cut": "subgradient, cut to sequential's number",
            "threshold": f"subgradient, cut at {THRESHOLD:g}",
            "untouched": "subgradient, as trained",
        },
    ),
}


def left_out(name: str, settings: Settings) -> dict[str, str]:
    """The arms of an experiment that cannot be trained with these settings, each with the reason."""
    has_norm = NORMED.get(settings.net) == settings.net
    reasons = {}
    for key, arm in EXPERIMENTS[name].arms.items():
        if arm.nets and settings.net not in arm.nets:
            reasons[key] = f"it is for the networks {', '.join(arm.nets)}"
        elif key == "cges_norm" and has_norm:
            reasons[key] = "the network has batch norm anyway, so it would be CGES again"
        elif arm.norm and settings.net not in NORMED:
            reasons[key] = "the network has no variant with batch norm"
        elif arm.norm and not has_norm and settings.pretrain_epochs:
            reasons[key] = "the network with batch norm would need a pretraining of its own"
    return reasons


def jobs(name: str, settings: Settings, seeds: int, lambdas: int | None) -> list[Job]:
    """The jobs of an experiment."""
    experiment, without = EXPERIMENTS[name], left_out(name, settings)
    arms = {key: arm for key, arm in experiment.arms.items() if key not in without}
    return jobs_of(arms, lambdas or experiment.lambdas, seeds)


def work(name: str, dataset: Dataset, settings: Settings, job: Job) -> list[Row]:
    """The rows of a job."""
    experiment = EXPERIMENTS[name]
    repetition = Repetition(dataset, settings, job.seed)
    rows = experiment.measure(repetition, experiment.arms[job.arm], job.lam)
    return [row_of(settings, job, row) for row in rows]


def pretrain(dataset: Dataset, settings: Settings, seed: int) -> None:
    """Makes the trained network from which the jobs of a seed start their fine-tuning."""
    Repetition(dataset, settings, seed).pretrain()
