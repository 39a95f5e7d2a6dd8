"""The CUDA executor's tiles: the same bits at any address, in any order and beside any neighbour; edge cases.

That results are right for all specs, modes and dtypes is tested in test_executors.py.
"""

import pytest
import torch
from helpers.cuda import (
    BACKEND,
    GENERAL,
    PENALTY,
    PLAIN,
    TILES,
    give_grads_at,
    model,
    needs_cuda,
    on_emulator,
    optimizer_of,
    parameter,
    parameters_of,
)
from helpers.right import DTYPES, MODES, check_step, fresh, training
from helpers.tiers import covering

from cges_kernels import ProxSGD

pytestmark = needs_cuda


# Bits


@on_emulator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [PLAIN, *GENERAL[1:]], ids=str)
def test_same_bits_whatever_is_resident_in_every_order(device, options, dtype):
    """The order of blocks, and how many run at once, change no bit."""
    start = [fresh(shape, dtype) for _, shape in TILES]
    grads = [[fresh(shape, dtype) for _, shape in TILES] for _ in range(2)]
    results = []
    for resident, in_flight in ((1, 1), (1, 7), (2, 16), (12, 3)):
        device["seed"], device["blocks_in_flight"] = resident, in_flight
        device["shared_memory_per_multiprocessor"] = 228 << 10
        device["multiprocessors"] = 4
        params = [torch.nn.Parameter(x.clone()) for x in start]
        groups = [{"params": [p], "group_by": spec} for p, (spec, _) in zip(params, TILES)]
        # The number of blocks that run at once is asked for when the plan is made, after tensors have been
        # cut.
        device["shared_memory_per_multiprocessor"] = resident * (228 << 10)
        optimizer = optimizer_of(groups, **options)
        for step in grads:
            for p, grad in zip(params, step):
                p.grad = grad.clone()
            optimizer.step()
        results.append([p.detach() for p in params])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))
    assert any(0 < x.count_nonzero() < x.numel() for x in results[0])


@pytest.mark.parametrize("options", [PLAIN, *GENERAL], ids=str)
def test_same_bits_at_any_address(options):
    """Vector accesses, which only aligned memory allows, change no bit."""
    for dtype in DTYPES:
        results = []
        start = [parameter(shape, dtype).detach() for _, shape in TILES]
        grads = [[fresh(shape, dtype) for _, shape in TILES] for _ in range(2)]
        for offset in (0, 1, 2, 3):
            groups = model(dtype, offset)
            params = parameters_of(groups)
            for p, x in zip(params, start):
                p.data.copy_(x)
            optimizer = optimizer_of(groups, **options)
            for step in grads:
                for p, grad in zip(params, step):
                    p.grad = parameter(p.shape, dtype, offset).detach().copy_(grad)
                optimizer.step()
            results.append([p.detach().clone() for p in params])
        for other in results[1:]:
            for x, y, (_, shape) in zip(results[0], other, TILES):
                assert torch.equal(x, y), shape


@pytest.mark.parametrize("neighbour", GENERAL, ids=str)
def test_same_bits_beside_whoever_takes_the_general_path(neighbour):
    """Neighbours that need the general kernel change no bit of others.

    Alone, these have a plain kernel of their own.

    Tiles of the neighbours come before, between and after the others'.
    """
    for dtype in DTYPES:
        start = [fresh(shape, dtype) for _, shape in TILES]
        grads = [[fresh(shape, dtype) for _, shape in TILES] for _ in range(2)]
        results = []
        for others in ([], [(40, 8), (64, 48), (20, 400)]):
            params = [torch.nn.Parameter(x.clone()) for x in start]
            groups = [{"params": [p], "group_by": spec} for p, (spec, _) in zip(params, TILES)]
            beside = [parameter(shape, dtype) for shape in others]
            more = [{"params": beside, "group_by": "feature", **neighbour}] if beside else []
            optimizer = optimizer_of([*groups, *more], **PLAIN)
            for step in grads:
                give_grads_at(beside, dtype)
                for p, grad in zip(params, step):
                    p.grad = grad.clone()
                optimizer.step()
            results.append([p.detach() for p in params])
        assert all(torch.equal(x, y) for x, y in zip(*results))


# Edge cases


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prox_mode", MODES)
def test_every_count_of_rows_and_columns(prox_mode, dtype):
    """Passes that end early and vectors that are not full are right."""
    shapes = [(rows, 20) for rows in (1, 2, 3, 25, 26, 49, 50, 51, 101)]
    shapes += [(12, columns) for columns in (*range(1, 18), 31, 33, 63, 65)]
    for shape in shapes:
        w, grad, buf = (fresh(shape, dtype) for _ in range(3))
        check_step(BACKEND, w, grad, buf, **training(w, "feature", prox_mode))


def test_tensors_without_a_gradient_keep_their_bits_between_others():
    """A parameter without a gradient is skipped, wherever it is in the list."""
    groups = model()
    optimizer = optimizer_of(groups, **PLAIN)
    params = parameters_of(groups)
    for skipped in (slice(0, None, 2), slice(1, None, 2), slice(0, None)):
        give_grads_at(params)
        for p in params[skipped]:
            p.grad = None
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for i, (p, x) in enumerate(zip(params, before)):
            assert torch.equal(p, x) == (i in range(*skipped.indices(len(params)))), p.shape


@covering(offset=[0, 1], momentum=[0.0, 0.9], dtype=DTYPES)
def test_frozen_groups_stay_dead_and_forget_their_buffer(offset, momentum, dtype):
    """A frozen group and its momentum are +0.0 even if its gradient is NaN."""
    for nan in (False, True):
        groups = [g for g in model(dtype, offset) if g["params"][0].dim() > 1]
        params = parameters_of(groups)
        optimizer = optimizer_of(groups, momentum=momentum, freeze_zeros="group", prox_mode="exact")
        dead = []
        for group, p in zip(groups, params):
            p.data += 1.0  # no weight is zero but those of one group
            index = {"feature": (..., 2), "channel": (slice(None), 2), "filter": (2,), "tensor": (...,)}
            at = index.get(group["group_by"], (slice(None), slice(None), 2))
            p.data[at] = 0.0
            dead.append(at)
        for _ in range(2):
            give_grads_at(params, dtype, offset)
            for p in params:
                p.grad.add_(float("nan") if nan else 1.0)
            optimizer.step()
        for p, at in zip(params, dead):
            assert not p[at].any() and not p[at].signbit().any(), p.shape
            if momentum:
                assert not optimizer.state[p]["momentum_buffer"][at].any(), p.shape
                if not nan and p[at].numel() < p.numel():
                    assert optimizer.state[p]["momentum_buffer"].count_nonzero() > 0.9 * (
                        p.numel() - p[at].numel()
                    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_coefficients_w_is_z_bit_for_bit(momentum, dtype):
    """With zero gradients and no penalty a step changes no bit, signs of zeros included."""
    options = dict(lr=0.1, momentum=momentum, backend=BACKEND)
    groups = model(dtype)
    params = parameters_of(groups)
    for p in params:
        p.data.view(-1)[::3] = -0.0
        p.data.view(-1)[1] = float("inf")
    optimizer = ProxSGD(groups, **options)
    before = [p.detach().clone() for p in params]
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for p, w in zip(params, before):
        assert torch.equal(p, w) and torch.equal(p.signbit(), w.signbit()), p.shape


def test_zeros_of_tensors_without_groups_keep_their_sign_where_there_is_no_l1():
    """A bias without l1 keeps -0.0, although its param group has a group lasso for other tensors."""
    results = []
    w, columns = torch.tensor([-0.0, 0.0, 1.0, -2.0] * 5), fresh((64, 48))
    for backend in (BACKEND, "reference"):
        params = [torch.nn.Parameter(x.clone()) for x in (w, columns)]
        optimizer = ProxSGD(params, lr=0.1, momentum=0.9, group_lasso=0.3, backend=backend)
        for _ in range(2):
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
        results.append(params[0].detach())
    assert torch.equal(*results) and torch.equal(*(x.signbit() for x in results))


@pytest.mark.parametrize("what", ["lr", "group_lasso", "exclusive_lasso", "l1"])
def test_numbers_in_device_memory(what):
    """Tensors as hyperparameters give the steps of plain numbers."""
    results = []
    for number in (lambda x: x, torch.tensor):
        torch.manual_seed(3)
        groups = model()
        options = {"lr": 0.1, **PENALTY}
        options[what] = number(options[what])
        optimizer = optimizer_of(groups, **PLAIN, **options, capturable=True)
        give_grads_at(parameters_of(groups))
        optimizer.step()
        optimizer.step()
        results.append([p.detach() for p in parameters_of(groups)])
    for x, y in zip(*results):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_an_overflow_of_the_loss_scale_changes_nothing():
    """A step with found_inf set leaves all weights as they are."""
    groups = model()
    params = parameters_of(groups)
    optimizer = optimizer_of(groups, **PLAIN)
    give_grads_at(params)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.grad_scale = torch.tensor(2.0)
    optimizer.step()
    assert all(torch.equal(p, x) for p, x in zip(params, before))
