"""Structured-sparse training at the cost of plain SGD: fused proximal SGD for PyTorch."""

from .ops import available_backends, penalty, prox, prox_
from .optimizer import ProxSGD

__all__ = ["ProxSGD", "available_backends", "penalty", "prox", "prox_"]
