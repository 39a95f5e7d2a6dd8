"""Defines when an executor's result is right, as functions that tests share.

The truth is reference.py in float64. An executor passes when its error is at most twice that of the same
formulas in PyTorch at the executor's own compute dtype, plus one rounding to the output dtype. Its zeros must
be those of the truth, except where |z| or the group's norm is within a few roundings of its threshold.
"""

from functools import partial

import torch

from cges_kernels import ProxAdamW, ProxSGD
from cges_kernels.core import reference, shrinkage
from cges_kernels.core.groups import canonical_layout, has_groups, reduced_dims, viewed
from cges_kernels.core.rules import ADAMW, SGD, STEP
from cges_kernels.core.shrinkage import Thresholds, compute_dtype
from cges_kernels.core.updates import sgd_update

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MODES = ("sequential", "exact")
# momentum, dampening, nesterov
MOMENTA = [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.5, False), (0.9, 0.0, True)]
SPECS = ("feature", "filter", "channel", "tensor")
INTERPRETED = not torch.cuda.is_available()  # without a GPU: kernels run on the CPU and slowly
OPTIMIZERS = {SGD: ProxSGD, ADAMW: ProxAdamW}
BAND = 16  # in roundings of the compute dtype, relative to the larger of the two numbers compared
# Smaller stand-ins for shapes that take Triton's interpreter too long. Those of the last two dicts still
# exceed any tile.
MODEST = {
    **{(300, 70): (70, 7), (20, 2500): (7, 130), (70, 2000): (70, 130)},
    **{(900, 3, 2): (90, 3, 2), (40, 5, 300): (4, 5, 300)},
    **{
        (17000, 19): (1030, 5),
        (5, 300_000): (1, 17_000),
        (2, 5, 70_001): (2, 5, 700),
        (300, 4, 300): (40, 4, 40),
    },
    **{(2, 600_000): (2, 17_000), (40_000, 16): (1100, 16)},
}


def as_large_as_may_be(backend, shape):
    """``shape``, or its smaller stand-in for Triton's interpreter."""
    return MODEST.get(shape, shape) if INTERPRETED and backend == "triton" else shape


def device_of(backend):
    """The device on which ``backend`` serves tensors here."""
    return "cpu" if INTERPRETED or backend not in ("triton", "cuda") else "cuda"


def tuple_of(states):
    """A rule's states as a tuple. None stands for states that do not exist yet."""
    return () if states is None else states if isinstance(states, tuple) else (states,)


def one_step(backend, w, grad, states=None, place=torch.clone, *, rule=SGD, steps=0, **options):
    """(w, *states) on the CPU after one step of the rule's optimizer, on copies made by ``place``.

    ``steps`` is the number of steps that a tensor with states has already had.
    """
    p, grad, *states = (place(x.to(device_of(backend))) for x in (w, grad, *tuple_of(states)))
    optimizer = OPTIMIZERS[rule]([p], backend=backend, **options)
    if states:
        counted = {STEP: torch.tensor(float(steps), device="cpu")} if rule.counts else {}
        optimizer.state[p] = {**counted, **dict(zip(rule.states, states))}
    p.grad = grad
    optimizer.step()
    names = rule.states_with(optimizer.param_groups[0])
    if rule.counts:
        assert float(optimizer.state[p][STEP]) == 1 + (steps if states else 0)
    return p.cpu(), *([optimizer.state[p][name].cpu() for name in names] or [None])


def relative_distance(x, threshold):
    """(x - threshold) relative to the larger of the two."""
    return (x - threshold) / torch.maximum(x, threshold).clamp_min(torch.finfo(x.dtype).tiny)


def assert_right(got, truth, same, margin, dtype):
    """Compares ``got`` with the float64 ``truth``, as the module's docstring says.

    ``same`` is the result of the same formulas at the compute dtype, not yet rounded to ``dtype``, and
    ``margin`` is threshold_margin of the truth. For float64 there is no better truth. Then ``same`` is taken
    at float32, and its error is scaled by the ratio of the two epsilons.
    """
    compute = compute_dtype(dtype)
    eps, out_eps = torch.finfo(compute).eps, torch.finfo(dtype).eps
    same_error = (same.double() - truth).abs().max() if truth.numel() else torch.tensor(0.0)
    if dtype == torch.float64:
        same_error = same_error * (eps / torch.finfo(torch.float32).eps)
    one_rounding = out_eps * truth.abs() + torch.finfo(dtype).smallest_normal * out_eps
    error, bound = (got.double() - truth).abs(), 2 * same_error + one_rounding
    assert (error <= bound).all(), (
        f"error {error.max():.3g} exceeds the bound of {2 * same_error:.3g} + one rounding"
    )
    vanishes = truth.abs() <= torch.finfo(dtype).smallest_normal * out_eps  # too small for the dtype to hold
    flips = ((got == 0) != (truth == 0)) & (margin.abs() > BAND * eps) & ~vanishes
    assert not flips.any(), f"{int(flips.sum())} zeros differ outside the band"
    assert not (torch.signbit(got) & (got == 0)).any(), "a zero is written -0.0"


def check_step(backend, w, grad, states=None, place=torch.clone, *, rule=SGD, steps=0, **options):
    """Makes one step by ``backend``, checks that weights and states are right, and returns them."""
    got, *got_states = one_step(backend, w, grad, states, place, rule=rule, steps=steps, **options)
    w, grad, *states = (x.cpu() for x in (w, grad, *tuple_of(states)))
    update = partial(rule.update, step=1 + (steps if states else 0)) if rule.counts else rule.update
    told = dict(options, update=update)
    low = torch.float32  # the dtype of `same`; for float64 assert_right scales its error
    truth, *true_states = reference.step(w, grad, *states, accumulate=torch.float64, **told)
    same, *same_states = reference.step(w, grad, *states, accumulate=low, **told)
    margin = threshold_margin(w, grad, *states, **told)
    assert got.dtype == w.dtype and got.stride() == w.stride()
    assert_right(got, truth, same, margin, w.dtype)
    for mine, true_state, same_state in zip(got_states, true_states, same_states, strict=True):
        if true_state is not None:
            anywhere = torch.zeros_like(true_state)  # states have no threshold, so no zero is checked
            assert_right(mine + 0.0, true_state, same_state, anywhere, w.dtype)
    return got, *got_states


def threshold_margin(
    w, grad, *states, lr, update=sgd_update, group_by="feature", view=None, prox_mode="sequential", **options
):
    """The distance of each element from changing between zero and nonzero, in float64.

    That is the relative distance of |z| from t, or of its group's norm from a, whichever is smaller.
    """
    options.pop("freeze_zeros", None)
    a, b, c = (lr * options.pop(name, 0.0) for name in ("group_lasso", "exclusive_lasso", "l1"))
    given = (None if x is None else x.double() for x in (w, grad, *states))
    z, *_ = update(*given, lr=lr, **options)
    v = viewed(z, view)
    if not (has_groups(v.dim(), group_by) and z.numel() and (a or b)):
        return relative_distance(z.abs(), torch.full_like(z, c))
    dims = reduced_dims(v.dim(), group_by)
    t = shrinkage.solve_shrinkage(v, dims, Thresholds(a, b, c), prox_mode)[1]
    margin = relative_distance(v.abs(), t.expand(v.shape))
    if a:
        norm = shrinkage.group_stats(v, t if prox_mode == "exact" else c, dims).l2
        death = relative_distance(norm, torch.full_like(norm, a)).expand(v.shape)
        margin = torch.where(death.abs() < margin.abs(), death, margin)
    return margin.reshape(z.shape)


def fresh(shape, dtype=torch.float32, generator=None, scale=1.0):
    """Normal random values, drawn in float32 on the CPU so that every executor sees the same numbers."""
    w = scale * torch.randn(shape, generator=generator, device="cpu")
    return w.to(torch.get_default_device(), dtype)


def coefficients(w, group_by, view=None, strength=1.0):
    """Coefficients that leave most, but not all, of a normal random tensor nonzero."""
    n = max(1, canonical_layout(w, group_by, view).group_size)
    return {
        "group_lasso": 0.3 * strength * n**0.5,
        "exclusive_lasso": 0.25 * strength / n,
        "l1": 0.05 * strength,
        "group_by": group_by,
        "view": view,
    }


def training(w, group_by, prox_mode, rule=SGD):
    """Options of a step that has states and all three penalties."""
    momentum = {"momentum": 0.9} if rule is SGD else {}
    return {"rule": rule, "lr": 0.5, "prox_mode": prox_mode, **momentum, **coefficients(w, group_by)}


def inputs(shape, dtype, count=3):
    """``count`` random tensors of one shape: by default a weight, a gradient and a momentum buffer."""
    return [fresh(shape, dtype) for _ in range(count)]


def states_of(rule, shape, dtype):
    """Random states that a step of this rule may find."""
    return fresh(shape, dtype) if rule is SGD else moments(shape, dtype)


def moments(shape, dtype):
    """exp_avg and exp_avg_sq as some steps might leave them: the second is nowhere negative."""
    first, noise = inputs(shape, dtype, 2)
    return first, first.square() * 0.5 + noise.square()
