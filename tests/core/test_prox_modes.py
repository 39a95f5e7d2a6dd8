"""Where shrinkage.py's two modes agree and where they differ, with the documentation's numbers."""

import itertools
import math

import pytest
import torch
from helpers.shrinkage import normal, solve_group

from cges_kernels.core.hyperparameters import PROX_MODES
from cges_kernels.core.shrinkage import Thresholds, shrink


@pytest.mark.parametrize(("a", "order"), [(0.0, 2), (3.0, 1)])
def test_sequential_mode_approaches_exact_mode_as_bn_vanishes(a, order):
    """The modes differ at second order in b*n, or at first order with group lasso.

    At b = 0 they do not differ at all.
    """
    z = normal(200)
    differences = []
    for bn in (1e-2, 1e-3, 1e-4):
        sequential, exact = (solve_group(z, a, bn / 200, 0.1, mode) for mode in PROX_MODES)
        differences.append((sequential - exact).abs().max().item())
    ratios = [x / y for x, y in itertools.pairwise(differences)]
    assert ratios == pytest.approx([10.0**order] * 2, rel=0.2)
    assert torch.equal(*(solve_group(z, a, 0.0, 0.1, mode) for mode in PROX_MODES))


def fractions_of_an_endless_normal_group(bn):
    """Nonzero fractions (sequential, exact) of an infinite normal group at a = c = 0.

    They are P(|z| > t), with t = b*n*E|z| in sequential mode and t = b*n*E(|z| - t)_+ in exact mode.
    """

    def tail(t):
        return math.erfc(t / math.sqrt(2))

    def mean_excess(t):
        return math.sqrt(2 / math.pi) * math.exp(-t * t / 2) - t * tail(t)

    low, high = 0.0, 10.0
    for _ in range(60):
        t = (low + high) / 2
        low, high = (t, high) if t < bn * mean_excess(t) else (low, t)
    return tail(bn * mean_excess(0.0)), tail(low)


@pytest.mark.parametrize(
    ("bn", "documented"),
    [(0.1, (0.94, 0.94)), (0.3, (0.81, 0.85)), (1.0, (0.43, 0.67)), (3.0, (0.02, 0.44)), (10.0, (0.0, 0.25))],
)
def test_nonzero_fractions_over_bn(bn, documented):
    """The table in the documentation is right: measured, and from the normal distribution."""
    n, groups = 4096, 100
    z = normal(n, groups)
    fractions = [
        (shrink(z, Thresholds(0.0, bn / n, 0.0), prox_mode=mode) != 0).double().mean().item()
        for mode in PROX_MODES
    ]
    # 409,600 samples have a standard error of at most .0008. This is four of them.
    assert fractions == pytest.approx(fractions_of_an_endless_normal_group(bn), abs=0.0032)
    # documented to two digits, as measured in shorter groups
    assert fractions == pytest.approx(documented, abs=0.012)


def test_the_documented_1024_entries_at_b_of_a_hundredth():
    """Of 1024 weights, sequential mode keeps none and exact mode about 245, as documented."""
    z = normal(1024, 100)
    kept = [
        (shrink(z, Thresholds(0.0, 1e-2, 0.0), prox_mode=mode) != 0).sum().item() / 100 for mode in PROX_MODES
    ]
    assert kept[0] == 0 and kept[1] == pytest.approx(245, abs=10)
