"""Where training ends: the fixed point of ProxSGD on a convex problem is the optimum that it claims.

The problem is least squares, f(W) = ||X W' - Y||^2 / (2m), plus Omega(W), in float64. At momentum mu and
dampening d the claim is the optimum of f + (1-mu)/(1-d) * Omega, with weight decay as an l2 term of f.
"""

import numpy as np
import pytest
import torch
from helpers.tiers import covering

from cges_kernels import ProxSGD, available_backends

EXECUTORS = [name for name in available_backends() if name in ("reference", "cpu")]
OMEGA = {"group_lasso": 0.3, "exclusive_lasso": 0.08, "l1": 0.05}
# Momentum and dampening scale the penalty by 1, .1, 1, .625 and .1.
RULES = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.9},
    {"momentum": 0.5, "dampening": 0.2},
    {"momentum": 0.9, "nesterov": True},
]


@pytest.fixture(autouse=True)
def one_thread(threads):
    """The problem is too small for a second thread."""
    threads(1)


@pytest.fixture(scope="module")
def problem():
    """(X, Y): 40 samples, 8 unequal inputs, 6 outputs. X'X/m lies in [1, 2], so that SGD is quick."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    samples, inputs, outputs = 40, 8, 6
    left, right = torch.linalg.qr(normal(samples, inputs))[0], torch.linalg.qr(normal(inputs, inputs))[0]
    X = samples**0.5 * left * torch.linspace(1, 2, inputs, dtype=torch.float64).sqrt() @ right
    true = normal(outputs, inputs) * torch.tensor([2.0, 1.5, 0.7, 0.2, 0.1, 0.1, 0.0, 0.0])
    return X, X @ true.T + 0.1 * normal(samples, outputs)


def gradient(W, problem):
    """The gradient of f at W."""
    X, Y = problem
    return (X @ W.T - Y).T @ X / len(X)


def scale_of_omega(momentum=0.0, dampening=0.0, nesterov=False):
    """The factor of Omega in the objective that is minimised."""
    return (1 - momentum) / (1 - dampening)


def train(problem, steps=2000, **options):
    """W after full-batch steps from 0 until it no longer moves, which it must reach."""
    W = torch.nn.Parameter(torch.zeros(problem[1].shape[1], problem[0].shape[1], dtype=torch.float64))
    optimizer = ProxSGD([W], lr=0.3, **options)
    for step in range(steps):
        before = W.detach().clone()
        W.grad = gradient(W.detach(), problem)
        optimizer.step()
        moved = (W.detach() - before).abs().max().item()
        if moved < 1e-15 and step > 100:  # momentum may need some steps to lift a group from 0
            return W.detach()
    raise AssertionError(f"still moving by {moved:.3g} after {steps} steps")


def violation(W, grad, scale, group_by, group_lasso=0.0, exclusive_lasso=0.0, l1=0.0):
    """The distance of 0 from grad + the subdifferential of scale*Omega: the largest over the groups."""
    a, b, c = (scale * x for x in (group_lasso, exclusive_lasso, l1))
    columns = zip(W.T, grad.T) if group_by == "feature" else zip(W, grad)
    worst = 0.0
    for w, g in columns:
        if not w.any():
            worst = max(worst, (g.abs() - c).clamp_min(0).norm().item() - a)
            continue
        t = c + b * w.abs().sum()
        alive = w != 0
        balance = g + a * w / w.norm() + t * w.sign()
        worst = max(worst, balance[alive].abs().max().item())
        if not alive.all():
            worst = max(worst, (g.abs() - t)[~alive].max().item())
    return worst


def optimum(problem, scale, group_by, weight_decay=0.0, group_lasso=0.0, exclusive_lasso=0.0, l1=0.0):
    """The optimum that CVXPY finds."""
    cp = pytest.importorskip("cvxpy")
    X, Y = (x.numpy() for x in problem)
    W = cp.Variable((Y.shape[1], X.shape[1]))
    f = cp.sum_squares(X @ W.T - Y) / (2 * len(X)) + weight_decay / 2 * cp.sum_squares(W)
    columns = range(X.shape[1]) if group_by == "feature" else range(Y.shape[1])
    groups = [W[:, i] if group_by == "feature" else W[i] for i in columns]
    omega = sum(
        group_lasso * cp.norm2(w) + exclusive_lasso / 2 * cp.square(cp.norm1(w)) + l1 * cp.norm1(w)
        for w in groups
    )
    cp.Problem(cp.Minimize(f + scale * omega)).solve(solver=cp.CLARABEL)
    return W.value


@covering(rule=RULES, group_by=["feature", "filter"], executor=EXECUTORS)
def test_exact_mode_ends_at_the_optimum_of_the_scaled_objective(problem, executor, group_by, rule):
    """Whatever the update rule, training ends where 0 is in the subdifferential, and where CVXPY ends."""
    scale = scale_of_omega(**rule)
    # scaled so that every rule ends equally sparse
    omega = {name: value / scale for name, value in OMEGA.items()}
    W = train(problem, group_by=group_by, prox_mode="exact", backend=executor, **omega, **rule)
    grad = gradient(W, problem)
    # W moves less than 1e-15 a step at lr .3, and momentum adds up ten gradients: some 1e-14.
    assert violation(W, grad, scale, group_by, **omega) <= 1e-13
    # the solver's tolerance of 1e-8 on the objective is 1e-4 on W
    np.testing.assert_allclose(W.numpy(), optimum(problem, scale, group_by, **omega), rtol=0, atol=1e-4)
    assert 0.2 < (W != 0).double().mean() < 0.8
    if group_by == "feature":
        dead = (W == 0).all(dim=0)
        assert dead.any() and not dead.all() and (W[:, ~dead] == 0).any()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_at_momentum_it_is_not_the_optimum_of_the_plain_objective(problem, executor):
    """At momentum .9 the penalty counts a tenth; dampening = momentum makes it count once."""
    options = {"group_by": "feature", "prox_mode": "exact", "backend": executor, **OMEGA}
    plain = train(problem, **options)
    with_momentum = train(problem, momentum=0.9, **options)
    dampened = train(problem, momentum=0.9, dampening=0.9, **options)
    assert violation(with_momentum, gradient(with_momentum, problem), 1.0, "feature", **OMEGA) > 0.1
    assert violation(with_momentum, gradient(with_momentum, problem), 0.1, "feature", **OMEGA) <= 1e-13
    torch.testing.assert_close(dampened, plain, rtol=0, atol=1e-13)
    assert (with_momentum != 0).sum() > (plain != 0).sum()


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("rule", RULES[:2], ids=str)
def test_weight_decay_with_l1_is_the_elastic_net(problem, rule, executor):
    """Weight decay acts as an l2 term of the objective, which momentum does not rescale."""
    scale, weight_decay, l1 = scale_of_omega(**rule), 0.3, 0.2
    W = train(problem, l1=l1 / scale, weight_decay=weight_decay, backend=executor, **rule)
    grad = gradient(W, problem) + weight_decay * W
    assert violation(W, grad, 1.0, "feature", l1=l1) <= 1e-13
    assert violation(W, grad - weight_decay * W, 1.0, "feature", l1=l1) > 0.1
    expected = optimum(problem, 1.0, "feature", weight_decay, l1=l1)
    np.testing.assert_allclose(W.numpy(), expected, rtol=0, atol=1e-4)
    assert (W == 0).any() and (W != 0).any()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_modes_end_at_one_point_without_group_and_exclusive_lasso_only(problem, executor):
    """Without exclusive lasso both modes end at the same bits.

    With it, only exact mode ends at the optimum.
    """
    for omega, same in [({"l1": 0.1}, True), ({"group_lasso": 0.3, "l1": 0.1}, True), (OMEGA, False)]:
        ends = [train(problem, prox_mode=mode, backend=executor, **omega) for mode in ("sequential", "exact")]
        assert torch.equal(*ends) == same
        violations = [violation(W, gradient(W, problem), 1.0, "feature", **omega) for W in ends]
        assert violations[1] <= 1e-13 and (violations[0] <= 1e-13) == same
