"""Structured-sparse training at the cost of plain SGD: fused proximal SGD for PyTorch."""

from .explain import explain
from .ops import available_backends, penalty, prox, prox_
from .optimizer import ProxSGD
from .recipes import CoefficientWarmup, cges_param_groups, exclusivity_schedule, sparsity_param_groups
from .report import sparsity_report

__all__ = [
    "ProxSGD",
    "prox",
    "prox_",
    "penalty",
    "explain",
    "sparsity_report",
    "available_backends",
    "sparsity_param_groups",
    "cges_param_groups",
    "exclusivity_schedule",
    "CoefficientWarmup",
]
