"""Structured-sparse training at close to the cost of the plain optimizer.

`ProxSGD` and `ProxAdamW` do the update of torch.optim.SGD or torch.optim.AdamW and the proximal step of the
combined group and exclusive sparsity regulariser in one fused pass. The other functions choose what is
regularised, report what became zero, and make the sparse network smaller. `__all__` is the public interface.
"""

from importlib import metadata as _metadata

from .backends.registry import available_backends
from .compaction.compact import compact
from .compaction.saving import load_compacted, save_compacted
from .functional import penalty, prox, prox_
from .optimizer import ProxAdamW, ProxSGD
from .reporting.explain import explain
from .reporting.figures import plot_filters, plot_weights
from .reporting.history import SparsityHistory
from .reporting.report import sparsity_report
from .training.prune import density_schedule, prune_to_density
from .training.recipes import cges_param_groups, exclusivity_schedule, sparsity_param_groups
from .training.schedules import CoefficientWarmup, CubicRamp
from .training.target_density import TargetDensity

try:
    __version__ = _metadata.version("cges_kernels")  # the version is kept in pyproject.toml alone
except _metadata.PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "ProxAdamW",
    "ProxSGD",
    "prox",
    "prox_",
    "penalty",
    "explain",
    "sparsity_report",
    "SparsityHistory",
    "plot_weights",
    "plot_filters",
    "available_backends",
    "prune_to_density",
    "density_schedule",
    "compact",
    "save_compacted",
    "load_compacted",
    "sparsity_param_groups",
    "cges_param_groups",
    "exclusivity_schedule",
    "CoefficientWarmup",
    "CubicRamp",
    "TargetDensity",
]
