"""reference.py, the truth of all other tests, against truths of its own: loops, CVXPY, sorting, bisection.

Everything is float64 unless it says so. Solutions are compared on the scale of the largest |z|: near a
group's death nothing finer is determined.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers.right import SPECS
from torch import nn

from cges_kernels.core import reference
from cges_kernels.core.hyperparameters import PROX_MODES
from cges_kernels.core.reference import MAX_SWEEPS, SORTED, Thresholds, shrink

SHAPES = [(9, 6), (1, 5), (5, 1), (4, 3, 2), (6, 4, 3, 3), (250, 2)]
KEPT = {
    "feature": lambda d: d > 0,
    "filter": lambda d: d == 0,
    "channel": lambda d: d == 1,
    "tensor": lambda d: False,
}
EPS = torch.finfo(torch.float64).eps
NAN, INF = float("nan"), float("inf")


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def soft_magnitude(z, t):
    return (z.abs() - t).clamp_min(0)


def by_loops(z, group_by, of_group):
    """Apply ``of_group`` (list of floats -> list of floats) to every group, found index by index."""
    groups = {}
    for index in np.ndindex(*z.shape):
        key = tuple(i for d, i in enumerate(index) if KEPT[group_by](d))
        groups.setdefault(key, []).append(index)
    result = torch.zeros_like(z)
    for indices in groups.values():
        for index, value in zip(indices, of_group([z[i].item() for i in indices])):
            result[index] = value
    return result


def thesis(z, a, b, c):
    """Eq. 7 (l1, then group soft-thresholding), then Eq. 8 (exclusive) of one group, as they are written."""
    w = [math.copysign(max(abs(x) - c, 0.0), x) for x in z]
    norm = math.sqrt(math.fsum(x * x for x in w))
    w = [max(1 - a / norm, 0.0) * x if norm > 0 else 0.0 for x in w]
    threshold = b * math.fsum(abs(x) for x in w)
    return [math.copysign(max(abs(x) - threshold, 0.0), x) for x in w]


def solve_group(z, a, b, c, prox_mode="exact"):
    """shrink of one group, given and returned as a vector."""
    return shrink(z, Thresholds(a, b, c), (0,), prox_mode=prox_mode)


# Sequential mode


@pytest.mark.parametrize(
    "coefficients", [(0.4, 0.02, 0.1), (0.4, 0, 0), (0, 0.05, 0), (0, 0, 0.2), (50, 1, 0)]
)
@pytest.mark.parametrize("group_by", SPECS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sequential_mode_is_the_thesis(shape, group_by, coefficients):
    z = normal(*shape)
    z.view(-1)[::7] = 0.0
    got = shrink(z, Thresholds(*coefficients), group_by)
    expected = by_loops(z, group_by, lambda group: thesis(group, *coefficients))
    # a sum of n terms rounds by n/2 ulp at the very worst; n = 500 here, and far less in practice
    torch.testing.assert_close(got, expected, rtol=0, atol=64 * EPS * z.abs().max().item())
    assert torch.equal(got == 0, expected == 0)


# Exact mode: the proximal operator of Omega


def coefficients_for(z):
    """(a, b, c) from nothing to too much for the group ``z``: alive, nearly dead and dead."""
    n = z.numel()
    for c in (0.0, 0.3):
        norm = soft_magnitude(z, c).norm().item()
        for share in (0.0, 0.5, 0.95, 1.2):
            for b in (0.0, 0.1 / n, 1.0, 30.0):
                yield share * norm, b, c


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_exact_mode_is_the_optimum_that_cvxpy_finds(n):
    cp = pytest.importorskip("cvxpy")
    z = normal(n)
    x, a, b, c = cp.Variable(n), *(cp.Parameter(nonneg=True) for _ in range(3))
    norm1 = cp.norm1(x)
    objective = cp.sum_squares(x - z.numpy()) / 2 + a * cp.norm2(x) + b * cp.square(norm1) / 2 + c * norm1
    problem = cp.Problem(cp.Minimize(objective))
    for a.value, b.value, c.value in coefficients_for(z):
        problem.solve(solver=cp.CLARABEL)
        got = solve_group(z, a.value, b.value, c.value)
        # the solver's own tolerance is 1e-8 on the objective, so 1e-4 on x (the objective is curved by 1)
        np.testing.assert_allclose(got.numpy(), x.value, rtol=0, atol=1e-4)
        optimum = problem.value
        x.value = got.numpy()
        assert objective.value <= optimum + 1e-12 * (1 + abs(optimum))


def violation(x, z, a, b, c):
    """How far x is from 0 in x - z + the subdifferential of Omega, for one group."""
    if not x.any():
        return max(soft_magnitude(z, c).norm().item() - a, 0.0)
    t = c + b * x.abs().sum()
    alive = x != 0
    balance = (x - z + a * x / x.norm() + t * x.sign())[alive].abs().max().item()
    return max(balance, soft_magnitude(z, t)[~alive].sum().item())


@pytest.mark.parametrize("n", [1, 2, 7, 40, 400])
def test_exact_mode_meets_the_optimality_conditions(n):
    z = normal(n)
    worst_of_sequential = 0.0
    for a, b, c in coefficients_for(z):
        x = solve_group(z, a, b, c)
        # x is right to a few eps*|z|, which the terms a*x/||x|| and b*||x||_1 magnify
        magnified = 1 + (a / x.norm().item() if x.any() else 0.0) + b * n
        assert violation(x, z, a, b, c) <= 16 * EPS * z.abs().max().item() * magnified
        sequential = solve_group(z, a, b, c, "sequential")
        worst_of_sequential = max(worst_of_sequential, violation(sequential, z, a, b, c))
    assert worst_of_sequential > 0.1  # the conditions can fail


def threshold_by_sorting(z, b, c):
    """t = c + b*||soft(z, t)||_1 in closed form: where the k largest |z| stay, (c + b*sum_k) / (1 + b*k)."""
    largest = np.sort(np.abs(z))[::-1]
    t = c
    for k, total in enumerate(np.cumsum(largest), start=1):
        candidate = (c + b * total) / (1 + b * k)
        if largest[k - 1] <= candidate:
            break
        t = candidate
    return t


@pytest.mark.parametrize("b", [1e-8, 1e-3, 0.1, 1.0, 1e3, 1e8])
@pytest.mark.parametrize("n", [1, 2, 50, 3000])
def test_exact_mode_without_group_lasso_is_the_sort_formula(n, b):
    for c in (0.0, 0.4):
        z = normal(n)
        _, t = reference.solve_shrinkage(z, (0,), Thresholds(0.0, b, c), "exact")
        # the solver stops at 4 eps; the cumulative sum is good to a few more
        assert t.item() == pytest.approx(threshold_by_sorting(z.numpy(), b, c), rel=1e-14, abs=0)


def by_bisection(z, a, b, c):
    """(s, t) of one group by plain bisection on t, in extended precision where there is one."""
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
    """Groups of every kind of trouble as (share of a in the norm, z, a, b, c)."""
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
    for _, z, a, b, c in hard_groups():
        s, t = by_bisection(z, a, b, c)
        got_s, got_t = reference.solve_shrinkage(z, (0,), Thresholds(a, b, c), "exact")
        largest = z.abs().max().item()
        assert abs(got_t.item() - t) <= 1e-14 * max(t, largest)
        expected = s * np.maximum(np.abs(z.numpy().astype(np.longdouble)) - t, 0)
        np.testing.assert_allclose(
            reference.apply_shrinkage(z, got_s, got_t).abs().numpy(), expected, rtol=0, atol=1e-14 * largest
        )


def test_the_exact_threshold_lies_in_its_bracket():
    for _, z, a, b, c in hard_groups():
        _, t = reference.solve_shrinkage(z, (0,), Thresholds(a, b, c), "exact")
        highest = c + b * soft_magnitude(z, c).sum().item()
        assert c <= t.item() <= highest * (1 + 4 * EPS)


def test_exact_mode_takes_few_sweeps(monkeypatch):
    group_stats, counts = reference.group_stats, {}

    def counted(*args, **options):
        counts[share][-1] += 1
        return group_stats(*args, **options)

    monkeypatch.setattr(reference, "group_stats", counted)
    for share, z, a, b, c in hard_groups():
        counts.setdefault(share, []).append(0)
        reference.solve_shrinkage(z, (0,), Thresholds(a, b, c), "exact")
    barely_alive = [n for share, of_share in counts.items() for n in of_share if share > 0.99]
    others = [n for share, of_share in counts.items() for n in of_share if share < 0.99]
    assert max(others) <= 13 and np.mean(others) <= 4.5
    # one read of the group before the first sweep, and one after each
    assert max(barely_alive) <= MAX_SWEEPS + 1 and np.mean(barely_alive) <= 11


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("a", [0.0, 1e-8])
def test_a_weak_exclusive_lasso_takes_few_sweeps(monkeypatch, a, dtype):
    """The root is the sequential t then, to rounding: an end of the bracket where a = 0."""
    counts = []

    def counted(*args, **options):
        counts[-1] += 1
        return group_stats(*args, **options)

    group_stats = reference.group_stats
    monkeypatch.setattr(reference, "group_stats", counted)
    for n in (SORTED + 1, 100):
        for exponent in range(-4, -24, -2):
            counts.append(0)
            reference.solve_shrinkage(
                normal(n, 50).to(dtype), (0,), Thresholds(a, 10.0**exponent, 0.0), "exact"
            )
    assert max(counts) <= 4


@pytest.mark.parametrize("c", [0.0, 0.3])
@pytest.mark.parametrize("b", [1e-6, 0.1, 10.0, 1e6])
def test_sorting_finds_the_root(b, c):
    for n in range(2, SORTED + 1):
        z = normal(n, 5, 2) * torch.logspace(-2, 2, 5, dtype=torch.float64)[:, None]
        z[0, 0] = z[1, 0] = 0.5  # neighbours in order, one root
        s, t = reference.solve_shrinkage(z, (0,), Thresholds(0.0, b, c), "exact")
        assert s.shape == t.shape == (1, 5, 2) and (s == 1).all()
        for i, j in itertools.product(range(5), range(2)):
            assert t[0, i, j].item() == pytest.approx(
                float(by_bisection(z[:, i, j], 0.0, b, c)[1]), rel=1e-14
            )


@pytest.mark.parametrize("n", [2, SORTED, SORTED + 1])
def test_a_weak_exclusive_lasso_has_its_gradient(n):
    """In float32 t is c to rounding."""
    z = normal(n, 100).float()
    b = torch.tensor(1e-8, requires_grad=True)
    shrink(z, Thresholds(0.0, b, 0.3), prox_mode="exact").abs().sum().backward()
    above = (z.abs().double() - 0.3).relu()
    expected = -((above > 0).sum(0) * above.sum(0)).sum()  # dt/db = sum(max(|z| - c, 0))
    assert b.grad.item() == pytest.approx(expected.item(), rel=1e-5)


def test_groups_are_solved_independently_of_each_other():
    """One that needs many sweeps does not disturb one that needs few."""
    scale = torch.logspace(-3, 3, 30, dtype=torch.float64)
    z = normal(40, 30) * scale
    thresholds = Thresholds(2.0, 0.01, 0.05)
    together = shrink(z, thresholds, prox_mode="exact")
    alone = torch.cat([shrink(column, thresholds, prox_mode="exact") for column in z.split(1, dim=1)], dim=1)
    # not bit for bit: torch adds a lone column up in another order
    assert ((together - alone).abs() <= 16 * EPS * scale).all()


# Where the two modes agree and where they do not


@pytest.mark.parametrize(("a", "order"), [(0.0, 2), (3.0, 1)])
def test_sequential_mode_approaches_exact_mode_as_bn_vanishes(a, order):
    """At second order in b*n without group lasso, at first order with it."""
    z = normal(200)
    differences = []
    for bn in (1e-2, 1e-3, 1e-4):
        sequential, exact = (solve_group(z, a, bn / 200, 0.1, mode) for mode in PROX_MODES)
        differences.append((sequential - exact).abs().max().item())
    ratios = [x / y for x, y in itertools.pairwise(differences)]
    assert ratios == pytest.approx([10.0**order] * 2, rel=0.2)
    assert torch.equal(*(solve_group(z, a, 0.0, 0.1, mode) for mode in PROX_MODES))


def fractions_of_an_endless_normal_group(bn):
    """Nonzero fractions (sequential, exact) at a = c = 0: P(|z| > t), t = bn*E|z| and t = bn*E(|z| - t)_+."""

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
    n, groups = 4096, 100
    z = normal(n, groups)
    fractions = [
        (shrink(z, Thresholds(0.0, bn / n, 0.0), prox_mode=mode) != 0).double().mean().item()
        for mode in PROX_MODES
    ]
    # 400,000 samples: a standard error of at most .0008, four of them
    assert fractions == pytest.approx(fractions_of_an_endless_normal_group(bn), abs=0.0032)
    assert fractions == pytest.approx(documented, abs=0.012)  # two digits, seen in shorter groups


def test_the_documented_1024_entries_at_b_of_a_hundredth():
    z = normal(1024, 100)
    kept = [
        (shrink(z, Thresholds(0.0, 1e-2, 0.0), prox_mode=mode) != 0).sum().item() / 100 for mode in PROX_MODES
    ]
    assert kept[0] == 0 and kept[1] == pytest.approx(245, abs=10)


# Edges


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prox_mode", PROX_MODES)
def test_without_coefficients_every_bit_of_z_stays(prox_mode, dtype):
    z = normal(6, 5).to(dtype)
    z[0] = torch.tensor([-0.0, 0.0, NAN, INF, -INF])
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    got = shrink(z, Thresholds(0.0, 0.0, 0.0), prox_mode=prox_mode)
    assert torch.equal(got.view(bits), z.view(bits))
    bias = z[0]  # a named spec makes no groups of one dimension: only l1 would apply
    assert torch.equal(
        shrink(bias, Thresholds(1.0, 1.0, 0.0), prox_mode=prox_mode).view(bits), bias.view(bits)
    )


@pytest.mark.parametrize(
    "thresholds", [(1e9, 0, 0), (1e9, 0.1, 0), (1e9, 0.1, 0.1), (0, 0, 1e9), (0, 1e-3, 9)]
)
@pytest.mark.parametrize("prox_mode", PROX_MODES)
@pytest.mark.parametrize("group_by", SPECS)
def test_zeros_are_exact_and_positive(group_by, prox_mode, thresholds):
    got = shrink(normal(5, 4, 3), Thresholds(*thresholds), group_by, prox_mode=prox_mode)
    assert not got.any() and not torch.signbit(got).any()


@pytest.mark.parametrize("prox_mode", PROX_MODES)
@pytest.mark.parametrize("thresholds", [(0.3, 0, 0), (0, 0.3, 0), (0, 0, 0.3), (0.3, 0.3, 0.3)])
def test_zero_groups_stay_zero(prox_mode, thresholds):
    z = normal(6, 5)
    z[:, 2], z[::2, 2] = 0.0, -0.0
    got = shrink(z, Thresholds(*thresholds), prox_mode=prox_mode)
    assert not got[:, 2].any() and not torch.signbit(got[got == 0]).any()
    assert got.isfinite().all() and got.any()


def test_a_group_whose_norm_is_exactly_a_dies():
    z = torch.tensor([[3.0], [4.0]], dtype=torch.float64)
    for mode in PROX_MODES:
        assert not shrink(z, Thresholds(5.0, 0.1, 0.0), prox_mode=mode).any()
        assert shrink(z, Thresholds(5.0 * (1 - EPS), 0.0, 0.0), prox_mode=mode).all()


@pytest.mark.parametrize("prox_mode", PROX_MODES)
@pytest.mark.parametrize(
    ("thresholds", "of_group"),
    [((1, 0, 0), NAN), ((0, 0.1, 0), NAN), ((1, 0.1, 0.1), NAN), ((0, 0, 0.1), None)],
)
def test_nan_takes_its_group_and_nothing_else(prox_mode, thresholds, of_group):
    z = normal(6, 5)
    clean = shrink(z, Thresholds(*thresholds), prox_mode=prox_mode)
    z[3, 2] = NAN
    got = shrink(z, Thresholds(*thresholds), prox_mode=prox_mode)
    clean[:, 2] = clean[:, 2] if of_group is None else of_group
    clean[3, 2] = NAN
    torch.testing.assert_close(got, clean, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("prox_mode", PROX_MODES)
@pytest.mark.parametrize("infinity", [INF, -INF])
def test_infinity_survives_group_lasso_and_l1_and_is_nan_under_exclusive_lasso(prox_mode, infinity):
    z = normal(6, 5)
    z[3, 2] = infinity
    got = shrink(z, Thresholds(0.5, 0.0, 0.1), prox_mode=prox_mode)
    assert got[3, 2] == infinity and got.isfinite().sum() == 29
    assert torch.equal(got[:3, 2], shrink(z[:3, 2], Thresholds(0.0, 0.0, 0.1)))  # an infinite norm: s = 1
    got = shrink(z, Thresholds(0.0, 0.1, 0.0), prox_mode=prox_mode)
    assert got[3, 2].isnan() and got.isfinite().sum() == 29
    assert got[:, 2].nan_to_num().eq(0).all()  # the others of the group: soft(z, inf)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prox_mode", PROX_MODES)
@pytest.mark.parametrize("group_by", SPECS)
def test_16_bit_types_compute_in_float32(group_by, prox_mode, dtype):
    z = (100 * normal(40, 30)).to(dtype)  # in float16, sums of squares overflow
    thresholds = Thresholds(60.0, 1e-3, 5.0)
    got = shrink(z, thresholds, group_by, prox_mode=prox_mode)
    expected = shrink(z.float(), thresholds, group_by, prox_mode=prox_mode)
    assert got.dtype == dtype and torch.equal(got, expected.to(dtype))
    assert got.any() and (got == 0).any()


# Gradients


COMBINATIONS = [(0.5, 0.1, 0.05), (0.5, 0.3, 0), (0.5, 0, 0.05), (0, 0.3, 0.05), (0, 0.1, 0), (0.5, 0, 0)]


@pytest.mark.parametrize("thresholds", COMBINATIONS, ids=str)
@pytest.mark.parametrize("group_by", [*SPECS, ()])
@pytest.mark.parametrize("prox_mode", PROX_MODES)
def test_shrink_has_the_right_gradient(prox_mode, group_by, thresholds):
    z = normal(4, 3, 2)
    z[:, 0, 0] /= 50  # a dead feature group
    inputs = (z.requires_grad_(),)
    assert torch.autograd.gradcheck(
        lambda z: shrink(z, Thresholds(*thresholds), group_by, None, prox_mode), inputs
    )


@pytest.mark.parametrize("prox_mode", PROX_MODES)
@pytest.mark.parametrize("thresholds", COMBINATIONS, ids=str)
def test_gradients_are_zero_at_dead_and_zero_groups(prox_mode, thresholds):
    z = normal(5, 4)
    z[:, 1] = 0.0
    z[:, 2] *= 1e-3
    z.requires_grad_()
    (grad,) = torch.autograd.grad(shrink(z, Thresholds(*thresholds), "feature", None, prox_mode).sum(), z)
    assert grad.isfinite().all() and grad[:, 3].any()
    assert not grad[:, 1].any()
    assert thresholds[0] == 0 or not grad[:, 2].any()


@pytest.mark.parametrize("group_by", [*SPECS, ()])
def test_omega_has_the_right_gradient_and_zero_at_zero_groups(group_by):
    def omega(w):
        return reference.omega(w, group_lasso=0.7, exclusive_lasso=0.3, l1=0.2, group_by=group_by)

    w = normal(4, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(omega, (w,))
    zero = torch.zeros(4, 3, 2, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(omega(zero), zero)
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("prox_mode", PROX_MODES)
@pytest.mark.parametrize(
    "coefficients", [{}, {"l1": 0.2}, {"group_lasso": 0.9, "exclusive_lasso": 0.4, "l1": 0.1}]
)
def test_step_has_the_right_gradient_with_respect_to_a_tensor_lr(coefficients, prox_mode):
    w, grad = normal(5, 4), normal(5, 4)
    lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    options = {"momentum": 0.9, "weight_decay": 0.1, "prox_mode": prox_mode, **coefficients}
    assert torch.autograd.gradcheck(lambda lr: reference.step(w, grad, lr=lr, **options)[0], (lr,))


# The update, and the step as a whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True}],
    ids=str,
)
def test_sgd_update_is_torch_sgd_bit_for_bit(options, maximize, dtype):
    options = {"lr": 0.1, "weight_decay": 0.01, "maximize": maximize, **options}
    w, buf = normal(7, 5).to(dtype), None
    p = nn.Parameter(w.clone())
    sgd = torch.optim.SGD([p], foreach=False, **options)
    for _ in range(4):
        grad = normal(7, 5).to(dtype)
        p.grad = grad.clone()
        sgd.step()
        w, buf = reference.sgd_update(w, grad, buf, **options)
        assert torch.equal(w, p)
        assert buf is None or torch.equal(buf, sgd.state[p]["momentum_buffer"])


@pytest.mark.parametrize("prox_mode", PROX_MODES)
def test_a_step_is_the_update_and_then_the_prox_at_lr_times_the_coefficients(prox_mode):
    w, grad, buf = normal(7, 5), normal(7, 5), normal(7, 5)
    before = [x.clone() for x in (w, grad, buf)]
    sgd = {"lr": 0.25, "momentum": 0.9, "weight_decay": 0.01}
    got, got_buf = reference.step(
        w,
        grad,
        buf,
        group_lasso=2.0,
        exclusive_lasso=0.1,
        l1=0.4,
        group_by="filter",
        prox_mode=prox_mode,
        **sgd,
    )
    z, new_buf = reference.sgd_update(w, grad, buf, **sgd)
    assert torch.equal(got, shrink(z, Thresholds(0.5, 0.025, 0.1), "filter", None, prox_mode))
    assert torch.equal(got_buf, new_buf)
    assert all(torch.equal(x, y) for x, y in zip(before, (w, grad, buf)))  # nothing in place


def test_a_step_accumulates_where_it_is_told_to():
    w, grad, buf = (normal(7, 5).float() for _ in range(3))
    options = {"lr": 0.1, "momentum": 0.9, "group_lasso": 1.0, "exclusive_lasso": 0.1, "l1": 0.1}
    got, got_buf = reference.step(w, grad, buf, accumulate=torch.float64, **options)
    expected, expected_buf = reference.step(w.double(), grad.double(), buf.double(), **options)
    assert got.dtype == got_buf.dtype == torch.float64
    assert torch.equal(got, expected) and torch.equal(got_buf, expected_buf)
