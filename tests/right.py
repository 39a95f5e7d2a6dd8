"""What right means for an executor, as functions that tests share.

Truth is reference.py in float64. An executor passes when its error is at most twice that of the same formulas
in PyTorch at the executor's own compute dtype, plus one rounding to the output dtype; and when its zeros are
the truth's, except where |z| is within a few roundings of the threshold.
"""

import torch

from cges_kernels import ProxSGD, reference
from cges_kernels.groups import has_groups, reduced_dims, viewed
from cges_kernels.reference import Thresholds, compute_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SPECS = ("feature", "filter", "channel", "tensor")
BAND = 16  # roundings of the compute dtype, relative to max(|z|, t)


def one_step(backend, w, grad, buf=None, **options):
    """(w, buffer) after one ProxSGD step; the arguments are left alone."""
    p = torch.nn.Parameter(w.clone(memory_format=torch.preserve_format))
    optimizer = ProxSGD([p], backend=backend, **options)
    if buf is not None:
        optimizer.state[p]["momentum_buffer"] = buf.clone(memory_format=torch.preserve_format)
    p.grad = grad
    optimizer.step()
    return p.detach(), optimizer.state[p].get("momentum_buffer") if options.get("momentum") else None


def threshold_margin(z, t):
    """|z| - t in units of roundings of max(|z|, t) at float32 or, for float64 inputs, at float64."""
    return (z.abs() - t) / torch.maximum(z.abs(), t).clamp_min(torch.finfo(z.dtype).tiny)


def assert_right(got, truth, same, margin, dtype):
    """``got`` against float64 ``truth``; ``same`` is the same formulas at the compute dtype, unrounded.

    ``margin`` is threshold_margin of the truth. For float64 there is no better truth, so ``same`` is taken at
    float32 and its error scaled by the ratio of the two epsilons.
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
    vanishes = truth.abs() <= torch.finfo(dtype).smallest_normal * out_eps  # below what the dtype can hold
    flips = ((got == 0) != (truth == 0)) & (margin.abs() > BAND * eps) & ~vanishes
    assert not flips.any(), f"{int(flips.sum())} zeros differ outside the band"
    assert not (torch.signbit(got) & (got == 0)).any(), "a zero is written -0.0"


def check_step(backend, w, grad, buf, **options):
    """One step of ``backend`` is right, momentum buffer included."""
    got, got_buf = one_step(backend, w, grad, buf, **options)
    low = torch.float32  # of `same`; for float64 assert_right scales its error
    truth, truth_buf = reference.step(w, grad, buf, accumulate=torch.float64, **options)
    same, same_buf = reference.step(w, grad, buf, accumulate=low, **options)
    z, t = z_and_threshold(w, grad, buf, **options)
    assert got.dtype == w.dtype and got.stride() == w.stride()
    assert_right(got, truth, same, threshold_margin(z, t), w.dtype)
    if truth_buf is not None:
        anywhere = torch.zeros_like(truth_buf)  # no threshold: a zero may round either way
        assert_right(got_buf + 0.0, truth_buf, same_buf, anywhere, w.dtype)


def z_and_threshold(w, grad, buf, *, lr, group_by="feature", view=None, prox_mode="sequential", **options):
    """z and its elements' thresholds in float64, by the reference."""
    options.pop("freeze_zeros", None)
    coefficients = [options.pop(name, 0.0) for name in ("group_lasso", "exclusive_lasso", "l1")]
    a, b, c = (lr * x for x in coefficients)
    w, grad, buf = (None if x is None else x.double() for x in (w, grad, buf))
    z, _ = reference.sgd_update(w, grad, buf, lr=lr, **options)
    v = viewed(z, view)
    t = torch.full_like(v, c)
    if has_groups(v.dim(), group_by) and z.numel() and (a or b):
        t = reference.solve_shrinkage(v, reduced_dims(v.dim(), group_by), Thresholds(a, b, c), prox_mode)[
            1
        ].expand(v.shape)
    return z, t.reshape(z.shape)


def fresh(shape, dtype=torch.float32, generator=None, scale=1.0):
    """Normal random values, drawn in float32 so that every dtype sees the same numbers."""
    return (scale * torch.randn(shape, generator=generator)).to(dtype)
