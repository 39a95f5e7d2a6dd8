"""Gradient scalers: unscaling inside the step, and steps that overflow, which must change nothing at all."""

import copy
import io

import pytest
import torch
from helpers.refusals import snapshot
from helpers.right import MODES, device_of
from helpers.steps import assert_same_bits, copies, everything, parameters
from helpers.tiers import covering, fused_backends
from torch import nn

from cges_kernels import ProxSGD
from cges_kernels.core import reference

SCALE = 1024.0
OPTIONS = dict(
    lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.01, group_lasso=0.2, exclusive_lasso=0.003, l1=0.5
)
SHAPES = [(33, 7), (20,), (5, 3, 2, 2), ()]


def pair_of_optimizers(backend, **options):
    """Equal parameters twice, and a fused optimizer for each."""
    params = parameters(SHAPES, torch.float32)
    twins = copies(params)
    made = [ProxSGD(x, backend=backend, fused=True, **OPTIONS, **options) for x in (params, twins)]
    return params, twins, *made


def backward(scaler, params, inputs):
    """Leaves gradients of sum(p * x), which are x, multiplied by the scaler's scale."""
    loss = sum((p * x).sum() for p, x in zip(params, inputs))
    (loss if scaler is None else scaler.scale(loss)).backward()


@pytest.mark.parametrize("prox_mode", MODES)
def test_a_scaler_leaves_unscaling_to_the_step(fused_backend, prox_mode):
    """A scaled step gives the bits of a plain one, and leaves the gradients scaled."""
    params, twins, ours, plain = pair_of_optimizers(fused_backend, prox_mode=prox_mode)
    scaler = torch.amp.GradScaler(device_of(fused_backend), init_scale=SCALE)
    for _ in range(4):
        inputs = [torch.randn_like(p) for p in params]
        for optimizer in (ours, plain):
            optimizer.zero_grad()
        backward(scaler, params, inputs)
        backward(None, twins, inputs)
        scaled = [p.grad.clone() for p in params]
        scaler.step(ours)
        plain.step()
        assert_same_bits(everything(ours), everything(plain))
        assert all(
            torch.equal(p.grad, g) for p, g in zip(params, scaled)
        )  # gradients are unscaled within the kernel, not in memory
        scaler.update()
    assert not hasattr(ours, "grad_scale") and any((p == 0).any() for p in params)


@covering(bad=[float("inf"), float("nan")], first=[True, False], executor=fused_backends())
def test_a_step_that_overflows_changes_nothing(executor, first, bad):
    """Weights, buffers and gradients stay, in a first step or a later one, and the scale is halved."""
    params, _, ours, _ = pair_of_optimizers(executor)
    scaler = torch.amp.GradScaler(device_of(executor), init_scale=SCALE)
    if not first:
        backward(scaler, params, [torch.randn_like(p) for p in params])
        scaler.step(ours)
        scaler.update()
        ours.zero_grad()
    inputs = [torch.randn_like(p) for p in params]
    inputs[1][3] = bad
    backward(scaler, params, inputs)
    before = snapshot(ours)
    scaler.step(ours)
    scaler.update()
    assert snapshot(ours) == before
    assert scaler.get_scale() == SCALE / 2
    assert not first or not any(ours.state.values())  # an overflow in the first step makes no momentum buffer


def test_after_an_overflow_steps_go_on_as_if_it_had_not_been(fused_backend):
    """Skipped steps leave no trace in the later ones."""
    params, twins, ours, plain = pair_of_optimizers(fused_backend)
    scaler = torch.amp.GradScaler(device_of(fused_backend), init_scale=SCALE)
    for overflows in (True, False, True, False):
        inputs = [torch.randn_like(p) for p in params]
        ours.zero_grad()
        backward(scaler, params, inputs)
        if overflows:
            params[0].grad[0, 0] = float("inf")
        else:
            plain.zero_grad()
            backward(None, twins, inputs)
            plain.step()
        scaler.step(ours)
        scaler.update()
    assert_same_bits(everything(ours), everything(plain))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_any_scale_divides(backend, shape):
    """A scale of 3, which is no power of two, gives the reference's step on the quotient."""
    params, scale = parameters(SHAPES, torch.float32), torch.full(shape, 3.0, device=device_of(backend))
    expected, buffers = [p.detach().clone() for p in params], [None] * len(params)
    optimizer = ProxSGD(params, backend=backend, **OPTIONS)
    optimizer.grad_scale, optimizer.found_inf = scale, torch.zeros_like(scale)
    for _ in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            new = reference.step(expected[i], p.grad / 3, buffers[i], **OPTIONS)
            expected[i], buffers[i] = new
        optimizer.step()
    for p, q in zip(params, expected):
        assert torch.equal(p == 0, q == 0)
        torch.testing.assert_close(p.detach(), q, rtol=1e-5, atol=1e-6)


def test_16_bit_gradients_are_unscaled_in_32_bits(fused_backend):
    """The division is done in fp32: its result, 2^-20, would lose bits in fp16."""
    p = nn.Parameter(torch.ones(64, dtype=torch.float16))
    optimizer = ProxSGD([p], lr=2.0**15, backend=fused_backend, fused=True)
    p.grad = torch.full_like(p, 2.0**-10)
    optimizer.grad_scale = torch.full((1,), SCALE)
    optimizer.found_inf = torch.zeros(1)
    optimizer.step()
    assert torch.equal(p.detach(), torch.full_like(p, 1 - 2.0**-5))


def test_steps_do_not_follow_the_default_dtype(fused_backend):
    """Under a default dtype of half precision the scale of 2^16 is not rounded to infinity."""
    p = nn.Parameter(torch.ones(4, 3, dtype=torch.float32))
    p.grad = torch.ones_like(p)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        optimizer = ProxSGD([p], lr=0.5, backend=fused_backend, fused=True)
        optimizer.grad_scale = torch.full((1,), 2.0**16, dtype=torch.float32)
        optimizer.found_inf = torch.zeros(1, dtype=torch.float32)
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        optimizer.step()
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(p.detach(), torch.full_like(p, 0.5 - 2.0**-17))


@pytest.mark.parametrize("fused", [True, None])
def test_unscale_then_clip(fused_backend, fused):
    """scaler.unscale_ and clipping before the step work as in plain training, with fused=True or None."""
    params = parameters(SHAPES, torch.float32)
    twins = copies(params)
    ours = ProxSGD(params, backend=fused_backend, fused=fused, **OPTIONS)
    plain = ProxSGD(twins, backend=fused_backend, **OPTIONS)
    scaler = torch.amp.GradScaler(device_of(fused_backend), init_scale=SCALE)
    for step in range(3):
        inputs = [torch.randn_like(p) for p in params]
        ours.zero_grad()
        backward(scaler, params, inputs)
        overflows = step == 1
        if overflows:
            params[0].grad[2, 2] = float("inf")
        scaler.unscale_(ours)
        nn.utils.clip_grad_norm_(params, 0.5)
        scaler.step(ours)
        scaler.update()
        if not overflows:
            plain.zero_grad()
            backward(None, twins, inputs)
            nn.utils.clip_grad_norm_(twins, 0.5)
            plain.step()
        assert_same_bits(everything(ours), everything(plain))


def test_only_fused_true_says_that_it_unscales(fused_backend):
    """GradScaler hands unscaling over by a flag, which only fused=True sets, as in torch."""
    params = parameters(SHAPES, torch.float32)
    flags = {
        fused: hasattr(ProxSGD(params, backend=backend, fused=fused), "_step_supports_amp_scaling")
        for fused, backend in ((True, fused_backend), (None, fused_backend), (False, "reference"))
    }
    assert flags == {True: True, None: False, False: False}


def test_the_flag_outlives_copies_and_files(fused_backend):
    """Deep copies and unpickled optimizers have the flag too."""
    optimizer = ProxSGD(parameters(), fused=True, backend=fused_backend)
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    for twin in (copy.deepcopy(optimizer), torch.load(file, weights_only=False)):
        assert twin._step_supports_amp_scaling


@pytest.mark.gpu
def test_overflow_is_decided_on_the_gpu(fused_backend):
    """Once there are momentum buffers, an overflow makes no step wait for the GPU."""
    if fused_backend == "cpu":
        pytest.skip("it has no GPU to wait for")
    params, _, ours, _ = pair_of_optimizers(fused_backend)
    scale = torch.full((), SCALE, device="cuda")
    for overflow in (0.0, 1.0, 0.0):
        for p in params:
            p.grad = torch.randn_like(p)
        ours.grad_scale, ours.found_inf = scale, torch.full((), overflow, device="cuda")
        before = snapshot(ours)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if ours.state else "default")
        try:
            ours.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if overflow:
            assert snapshot(ours) == before
