"""The CUDA executor's rows: the same bits at any address, in any order, beside any neighbour; edge cases.

That their results are right for all specs, modes and dtypes is tested in test_executors.py.
"""

import itertools

import pytest
import torch
from helpers.cuda import (
    BACKEND,
    GENERAL,
    PENALTY,
    PLAIN,
    ROWS,
    needs_cuda,
    on_emulator,
    optimizer_of,
    parameter,
)
from helpers.right import DTYPES, MODES, check_step, coefficients, fresh, one_step
from helpers.tiers import covering

from cges_kernels import ProxSGD
from cges_kernels.core import reference

pytestmark = needs_cuda

# Bits


@pytest.mark.parametrize("options", [PLAIN, *GENERAL], ids=str)
def test_same_bits_at_any_address(options):
    """Vector accesses, which only aligned memory allows, change no bit."""
    for dtype in DTYPES:
        for shape in ROWS:
            results = []
            w, grads = parameter(shape, dtype).detach(), [fresh(shape, dtype) for _ in range(3)]
            for offset in (0, 1, 3):
                p = parameter(shape, dtype, offset)
                p.data.copy_(w)
                optimizer = optimizer_of([p], **options)
                for grad in grads:
                    p.grad = parameter(shape, dtype, offset).detach().copy_(grad)
                    optimizer.step()
                results.append(p.detach().clone())
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2]), shape


@pytest.mark.parametrize("neighbour", GENERAL, ids=str)
def test_same_bits_beside_whoever_takes_the_general_path(neighbour):
    """A neighbour that needs the general kernel changes no bit of others.

    Alone, these have a plain kernel of their own.
    """
    for dtype in DTYPES:
        w, grads = (
            [fresh(shape, dtype) for shape in ROWS],
            [[fresh(s, dtype) for s in ROWS] for _ in range(3)],
        )
        results = []
        for groups in ([], [{"params": [parameter((9, 48), dtype)], **neighbour}]):
            params = [torch.nn.Parameter(x.clone()) for x in w]
            optimizer = optimizer_of([{"params": params}, *groups], **PLAIN)
            for step in grads:
                for p, grad in zip(params, step):
                    p.grad = grad.clone()
                for group in groups:
                    group["params"][0].grad = fresh((9, 48), dtype)
                optimizer.step()
            results.append([p.detach() for p in params])
        assert all(torch.equal(x, y) for x, y in zip(*results))
        assert any(0 < x.count_nonzero() < x.numel() for x in results[0])


@on_emulator
@pytest.mark.parametrize("options", [PLAIN, GENERAL[1]], ids=str)
def test_same_bits_in_every_order_of_blocks(device, options):
    """The order of blocks, and how many run at once, change no bit."""
    w, grads = [fresh(shape) for shape in ROWS], [[fresh(shape) for shape in ROWS] for _ in range(2)]
    results = []
    for seed, in_flight in itertools.product((1, 2, 3), (1, 16)):
        device["seed"], device["blocks_in_flight"] = seed, in_flight
        params = [torch.nn.Parameter(x.clone()) for x in w]
        optimizer = optimizer_of(params, **options)
        for step in grads:
            for p, grad in zip(params, step):
                p.grad = grad.clone()
            optimizer.step()
        results.append([p.detach() for p in params])
    device.reset()
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))


# Edge cases


@covering(momentum=[0.0, 0.9], shape=[(9, 48), (7, 9), (300, 1), (77,)], dtype=DTYPES)
def test_without_coefficients_w_is_z_bit_for_bit(momentum, shape, dtype):
    """With zero gradients and no penalty a step changes no bit, signs of zeros included."""
    w, zeros = fresh(shape, dtype), torch.zeros(shape, dtype=dtype)
    w.view(-1)[::3] = -0.0
    w.view(-1)[1] = float("inf")
    options = dict(lr=0.1, momentum=momentum, group_by="filter")
    got, _ = one_step(BACKEND, w, zeros, zeros.clone() if momentum else None, **options)
    w = w.cpu()
    assert torch.equal(got, w) and torch.equal(torch.signbit(got), torch.signbit(w))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_zeros_of_tensors_without_groups_keep_their_sign_where_there_is_no_l1(momentum):
    """A bias without l1 keeps -0.0, although its param group has a group lasso for other tensors."""
    results = []
    w, rows = torch.tensor([-0.0, 0.0, 1.0, -2.0] * 5), fresh((9, 48))
    for backend in (BACKEND, "reference"):
        params = [torch.nn.Parameter(x.clone()) for x in (w, rows)]
        options = dict(lr=0.1, momentum=momentum, group_lasso=0.3, group_by="filter", backend=backend)
        optimizer = ProxSGD(params, **options)
        for _ in range(2):
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
        results.append(params[0].detach())
    assert torch.equal(*results) and torch.equal(*(x.signbit() for x in results))


@pytest.mark.parametrize("what", ["lr", "group_lasso", "exclusive_lasso", "l1", "grad_scale"])
def test_numbers_in_device_memory_take_no_plain_step(what):
    """Hyperparameters and loss scales in device memory take effect; the plain path would miss them."""
    w, grads, got = fresh((9, 48)), [fresh((9, 48)) for _ in range(3)], []
    for backend in (BACKEND, "reference"):
        p = torch.nn.Parameter(w.clone())
        options = dict(lr=0.1, group_by="filter", backend=backend, **{**PENALTY, "l1": 0.3}, **PLAIN)
        if what != "grad_scale":
            options[what] = torch.tensor(options[what])
        optimizer = ProxSGD([p], **options)
        for grad in grads:
            p.grad = grad.clone() if what != "grad_scale" or backend == BACKEND else grad / 4
            if what == "grad_scale" and backend == BACKEND:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
            optimizer.step()
        got.append(p.detach())
    torch.testing.assert_close(*got, rtol=1e-5, atol=1e-6)


@covering(
    shape=[(9, 48), (7, 9), (300, 1), (2, 1024), (77,)],
    terms=["group_lasso", "exclusive_lasso", "l1", "all"],
    prox_mode=MODES,
    poison=[float("nan"), float("inf"), -float("inf")],
)
def test_nan_and_inf_spread_as_in_the_reference(shape, terms, prox_mode, poison):
    """NaN and infinities show where the reference has them, on the plain path with momentum."""
    w, grad, buf = fresh(shape), fresh(shape), fresh(shape)
    w.view(-1)[7] = poison
    options = {"lr": 0.5, "momentum": 0.9, "prox_mode": prox_mode, **coefficients(w, "filter")}
    if terms != "all":
        options |= {name: 0.0 for name in ("group_lasso", "exclusive_lasso", "l1") if name != terms}
    got, expected = (one_step(name, w, grad, buf, **options)[0] for name in (BACKEND, "reference"))
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())
    fine = expected.isfinite()
    assert torch.equal(got[fine] == 0, expected[fine] == 0) and not got.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_rounds_to_zero_is_positive(dtype):
    """Small entries that a group's scale takes below what 16 bits hold become +0.0."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    w = torch.full((4, 64), -3 * smallest, dtype=dtype)
    w[:, 0] = 1.0
    grad, buf = torch.zeros_like(w), torch.zeros_like(w)
    for options in ({"momentum": 0.9}, {"momentum": 0.0}):
        held = buf if options["momentum"] else None
        norm = float(w.double().norm(dim=1)[0])
        got, _ = one_step(
            BACKEND, w, grad, held, lr=1.0, group_lasso=0.9 * norm, group_by="filter", **options
        )
        assert got[:, 0].all() and not got[:, 1:].any() and not torch.signbit(got).any()


@pytest.mark.filterwarnings("ignore:.*sequential mode zeroes far more")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("prox_mode", MODES)
def test_groups_of_one_have_a_closed_form(prox_mode, dtype):
    """The formula for groups of one is the reference's search, on both sides of each threshold."""
    z = torch.linspace(-2, 2, 4001, dtype=dtype)[:, None]
    for a, b, c in itertools.product((0.0, 0.3, 5.0), (0.0, 0.2, 30.0), (0.0, 0.1)):
        penalty = dict(group_lasso=a, exclusive_lasso=b, l1=c, group_by="filter")
        check_step(BACKEND, z, torch.zeros_like(z), None, lr=1.0, prox_mode=prox_mode, **penalty)


@pytest.mark.parametrize("shape", [(9, 48), (7, 9), (300, 1), (2, 1024)], ids=str)
@pytest.mark.parametrize("freeze_zeros", ["group", "element"])
def test_frozen_zeros_and_their_buffers(freeze_zeros, shape):
    """Frozen weights and their momentum are 0, and others are not."""
    w, grad, buf = fresh(shape), fresh(shape), fresh(shape)
    w.view(-1)[::3] = 0.0
    w[-1] = 0.0
    options = dict(lr=0.5, momentum=0.9, freeze_zeros=freeze_zeros, **coefficients(w, "filter", strength=0.5))
    got, got_buf = check_step(BACKEND, w, grad, buf, **options)
    frozen = reference.frozen_mask(w, freeze_zeros, "filter").cpu()
    assert not got[frozen].any() and not got_buf[frozen].any() and got[~frozen].any()
