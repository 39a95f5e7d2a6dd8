"""shrinkage.py's exact mode against independent truths: CVXPY, optimality conditions, sorting, bisection.

Everything is float64 unless it says so. Solutions are compared on the scale of the largest |z|, because near
a group's death nothing finer is determined.
"""

import itertools

import numpy as np
import pytest
import torch
from helpers.shrinkage import EPS, normal, soft_magnitude, solve_group

from cges_kernels.core import shrinkage
from cges_kernels.core.shrinkage import MAX_SWEEPS, SORTED, Thresholds, shrink


def coefficients_for(z):
    """(a, b, c) from nothing to too much for the group ``z``: it stays alive, nearly dies, or dies."""
    n = z.numel()
    for c in (0.0, 0.3):
        norm = soft_magnitude(z, c).norm().item()
        for share in (0.0, 0.5, 0.95, 1.2):
            for b in (0.0, 0.1 / n, 1.0, 30.0):
                yield share * norm, b, c


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_exact_mode_is_the_optimum_that_cvxpy_finds(n):
    """A solver that knows only the objective finds the same minimiser, and no lower value."""
    cp = pytest.importorskip("cvxpy")
    z = normal(n)
    x, a, b, c = cp.Variable(n), *(cp.Parameter(nonneg=True) for _ in range(3))
    norm1 = cp.norm1(x)
    objective = cp.sum_squares(x - z.numpy()) / 2 + a * cp.norm2(x) + b * cp.square(norm1) / 2 + c * norm1
    problem = cp.Problem(cp.Minimize(objective))
    for a.value, b.value, c.value in coefficients_for(z):
        problem.solve(solver=cp.CLARABEL)
        got = solve_group(z, a.value, b.value, c.value)
        # The solver reaches 1e-8 on the objective, whose curvature is 1. That is 1e-4 on x.
        np.testing.assert_allclose(got.numpy(), x.value, rtol=0, atol=1e-4)
        optimum = problem.value
        x.value = got.numpy()
        assert objective.value <= optimum + 1e-12 * (1 + abs(optimum))


def violation(x, z, a, b, c):
    """How far 0 is from the set x - z + subdifferential of Omega(x), for one group."""
    if not x.any():
        return max(soft_magnitude(z, c).norm().item() - a, 0.0)
    t = c + b * x.abs().sum()
    alive = x != 0
    balance = (x - z + a * x / x.norm() + t * x.sign())[alive].abs().max().item()
    return max(balance, soft_magnitude(z, t)[~alive].sum().item())


@pytest.mark.parametrize("n", [1, 2, 7, 40, 400])
def test_exact_mode_meets_the_optimality_conditions(n):
    """To rounding, 0 is in the subdifferential at the solution; for sequential mode it is not."""
    z = normal(n)
    worst_of_sequential = 0.0
    for a, b, c in coefficients_for(z):
        x = solve_group(z, a, b, c)
        # x is right to a few eps*|z|. The terms a*x/||x|| and b*||x||_1 magnify this error.
        magnified = 1 + (a / x.norm().item() if x.any() else 0.0) + b * n
        assert violation(x, z, a, b, c) <= 16 * EPS * z.abs().max().item() * magnified
        sequential = solve_group(z, a, b, c, "sequential")
        worst_of_sequential = max(worst_of_sequential, violation(sequential, z, a, b, c))
    assert worst_of_sequential > 0.1  # shows that the conditions can fail


def threshold_by_sorting(z, b, c):
    """The root of t = c + b*||soft(z, t)||_1: where the k largest |z| stay, (c + b*sum_k) / (1 + b*k)."""
    largest = np.sort(np.abs(z))[::-1]
    t = c
    for k, total in enumerate(np.cumsum(largest), start=1):
        candidate = (c + b * total) / (1 + b * k)
        if largest[k - 1] <= candidate:
            break
        t = candidate
    return t


@pytest.mark.parametrize("n", [1, 2, 50, 3000])
def test_exact_mode_without_group_lasso_is_the_sort_formula(n):
    """With a = 0 the threshold has a closed form, which holds for b over sixteen orders of magnitude."""
    for b in (1e-8, 1e-3, 0.1, 1.0, 1e3, 1e8):
        for c in (0.0, 0.4):
            z = normal(n)
            _, t = shrinkage.solve_shrinkage(z, (0,), Thresholds(0.0, b, c), "exact")
            # The solver stops at 4 eps. The cumulative sum is right to a few more.
            assert t.item() == pytest.approx(threshold_by_sorting(z.numpy(), b, c), rel=1e-14, abs=0)


def by_bisection(z, a, b, c):
    """(s, t) of one group by plain bisection on t, in extended precision where the machine has one."""
    z = np.abs(z.numpy().astype(np.longdouble))
    a, b, c = map(np.longdouble, (a, b, c))

    def stats(t):
        u = np.maximum(z - t, 0)
        norm = np.sqrt((u * u).sum())
        return (1 - a / norm if norm > a else np.longdouble(0)), u.sum()

    low, high = c, c + b * stats(c)[1]
    while True:
        t = low + (high - low) / 2
        if not low < t < high:
            return stats(low)[0] if a else np.longdouble(1), low
        s, norm1 = stats(t)
        low, high = (t, high) if t <= c + b * (s if a else 1) * norm1 else (low, t)


def hard_groups():
    """Groups that are hard to solve, as (a's share of the norm, z, a, b, c).

    They have heavy tails, equal or nearly equal magnitudes, scales and values of b over many orders, and
    shares of a down to a hair from the group's death.
    """
    generator = torch.Generator().manual_seed(5)
    for i in range(60):
        n = int(torch.randint(1, 300, (), generator=generator))
        z = torch.randn(n, dtype=torch.float64, generator=generator)
        z = (z, z.sign() * z.abs() ** 5, torch.full_like(z, -0.7), z.sign() * (z.abs() + 10))[i % 4]
        z = z * 10.0 ** (i % 5 - 2)
        b = 10.0 ** (i % 13 - 6)
        for share_of_c in (0.0, 0.5):
            c = share_of_c * z.abs().max().item()
            norm = soft_magnitude(z, c).norm().item()
            for share in (0.0, 0.1, 0.9, 1 - 1e-6, 1 - 1e-12):
                yield share, z, share * norm, b, c


def test_exact_mode_is_plain_bisection_on_hard_groups():
    """On groups that are hard to solve, s and t are those of bisection to 1e-14."""
    for _, z, a, b, c in hard_groups():
        s, t = by_bisection(z, a, b, c)
        got_s, got_t = shrinkage.solve_shrinkage(z, (0,), Thresholds(a, b, c), "exact")
        largest = z.abs().max().item()
        assert abs(got_t.item() - t) <= 1e-14 * max(t, largest)
        expected = s * np.maximum(np.abs(z.numpy().astype(np.longdouble)) - t, 0)
        np.testing.assert_allclose(
            shrinkage.apply_shrinkage(z, got_s, got_t).abs().numpy(), expected, rtol=0, atol=1e-14 * largest
        )


def test_the_exact_threshold_lies_in_its_bracket():
    """t is never below c, nor above sequential mode's threshold."""
    for _, z, a, b, c in hard_groups():
        _, t = shrinkage.solve_shrinkage(z, (0,), Thresholds(a, b, c), "exact")
        highest = c + b * soft_magnitude(z, c).sum().item()
        assert c <= t.item() <= highest * (1 + 4 * EPS)


def test_exact_mode_takes_few_sweeps(monkeypatch):
    """Newton's method takes few sweeps. Bisection, or a wrong slope, would take far more."""
    group_stats, counts = shrinkage.group_stats, {}

    def counted(*args, **options):
        counts[share][-1] += 1
        return group_stats(*args, **options)

    monkeypatch.setattr(shrinkage, "group_stats", counted)
    for share, z, a, b, c in hard_groups():
        counts.setdefault(share, []).append(0)
        shrinkage.solve_shrinkage(z, (0,), Thresholds(a, b, c), "exact")
    barely_alive = [n for share, of_share in counts.items() for n in of_share if share > 0.99]
    others = [n for share, of_share in counts.items() for n in of_share if share < 0.99]
    assert max(others) <= 13 and np.mean(others) <= 4.5
    # The group is read once before the first sweep and once after each.
    assert max(barely_alive) <= MAX_SWEEPS + 1 and np.mean(barely_alive) <= 11


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("a", [0.0, 1e-8])
def test_a_weak_exclusive_lasso_takes_few_sweeps(monkeypatch, a, dtype):
    """A tiny b converges at once: the root is sequential mode's t to rounding.

    Where a = 0 as well, that is an end of the bracket, where a careless search would go on bisecting.
    """
    counts = []

    def counted(*args, **options):
        counts[-1] += 1
        return group_stats(*args, **options)

    group_stats = shrinkage.group_stats
    monkeypatch.setattr(shrinkage, "group_stats", counted)
    for n in (SORTED + 1, 100):
        for exponent in range(-4, -24, -2):
            counts.append(0)
            shrinkage.solve_shrinkage(
                normal(n, 50).to(dtype), (0,), Thresholds(a, 10.0**exponent, 0.0), "exact"
            )
    assert max(counts) <= 4


@pytest.mark.parametrize("b", [1e-6, 0.1, 10.0, 1e6])
def test_sorting_finds_the_root(b):
    """Short groups are solved by sorting, and each gets the root that bisection finds."""
    for c in (0.0, 0.3):
        for n in range(2, SORTED + 1):
            z = normal(n, 5, 2) * torch.logspace(-2, 2, 5, dtype=torch.float64)[:, None]
            z[0, 0] = z[1, 0] = 0.5  # equal magnitudes: neighbours when sorted
            s, t = shrinkage.solve_shrinkage(z, (0,), Thresholds(0.0, b, c), "exact")
            assert s.shape == t.shape == (1, 5, 2) and (s == 1).all()
            for i, j in itertools.product(range(5), range(2)):
                assert t[0, i, j].item() == pytest.approx(
                    float(by_bisection(z[:, i, j], 0.0, b, c)[1]), rel=1e-14
                )


@pytest.mark.parametrize("n", [2, SORTED, SORTED + 1])
def test_a_weak_exclusive_lasso_has_its_gradient(n):
    """The gradient by b is right even where float32 rounds t to c, in sorted and longer groups."""
    z = normal(n, 100).float()
    b = torch.tensor(1e-8, requires_grad=True)
    shrink(z, Thresholds(0.0, b, 0.3), prox_mode="exact").abs().sum().backward()
    above = (z.abs().double() - 0.3).relu()
    expected = -((above > 0).sum(0) * above.sum(0)).sum()  # dt/db = sum(max(|z| - c, 0))
    assert b.grad.item() == pytest.approx(expected.item(), rel=1e-5)


def test_groups_are_solved_independently_of_each_other():
    """A group that needs many sweeps does not change the result of one that needs few."""
    scale = torch.logspace(-3, 3, 30, dtype=torch.float64)
    z = normal(40, 30) * scale
    thresholds = Thresholds(2.0, 0.01, 0.05)
    together = shrink(z, thresholds, prox_mode="exact")
    alone = torch.cat([shrink(column, thresholds, prox_mode="exact") for column in z.split(1, dim=1)], dim=1)
    # Not bit for bit, because torch adds a lone column up in another order.
    assert ((together - alone).abs() <= 16 * EPS * scale).all()
