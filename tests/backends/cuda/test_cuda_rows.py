"""The CUDA executor's rows: what its kernels read and write, their bits, their launches, their edges.

That they are right, over all specs, modes and dtypes, is in test_executors.py.
"""

import itertools

import pytest
import torch
from helpers import emulated
from helpers.cuda import GENERAL, PENALTY, PLAIN, on_emulator, optimizer_of, parameter, path_of
from helpers.right import DTYPES, INTERPRETED, MODES, MOMENTA, check_step, coefficients, fresh, one_step
from helpers.tiers import covering

from cges_kernels import ProxSGD, prox
from cges_kernels.backends.extension import BUILT
from cges_kernels.core import reference

BACKEND = "cuda"
pytestmark = pytest.mark.skipif(
    "cuda" not in BUILT, reason="the extension is built without the CUDA executor"
)
# Groups of whole accesses, of a part of a warp to all of a block, and of odd lengths; of one; none at all.
ROWS = [
    (70, 8),
    (9, 48),
    (33, 136),
    (5, 512),
    (3, 1024),
    (40, 9),
    (70, 3),
    (7, 147),
    (3, 701),
    (300, 1),
    (77,),
]


def most(dtype):
    """The longest row that a block's registers hold."""
    return (emulated.THREADS if INTERPRETED else 256) * (8 if dtype == torch.float64 else 16)


def rows(dtype):
    return [shape for shape in ROWS if shape[-1] <= most(dtype)]


# What is read and written


@on_emulator
@covering(offset=[0, 1], options=[PLAIN, *GENERAL], dtype=DTYPES)
def test_each_byte_is_read_once_and_written_once(device, options, dtype, offset):
    params = [parameter(shape, dtype, offset) for shape in rows(dtype)]
    assert set.union(*(path_of(p.shape, dtype=dtype) for p in params)) == {"rows"}
    optimizer = optimizer_of(params, **options)
    for step in range(2):
        for p in params:
            p.grad = parameter(p.shape, dtype, offset).detach()
        accesses = device.accesses(optimizer.step)
        for p in params:
            buf = optimizer.state[p].get("momentum_buffer") if options["momentum"] else None
            expected = [(p, 1, 1), (p.grad, 1, 0)]
            expected += [] if buf is None else [(buf, int(step > 0), 1)]
            for x, reads, writes in expected:
                got_reads, got_writes = emulated.traffic(accesses, x.detach())
                assert (got_reads == reads).all() and (got_writes == writes).all(), (p.shape, step)


@on_emulator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_prox_alone_reads_and_writes_weights_alone(device, dtype):
    w = parameter((33, 136), dtype).detach()
    options = dict(group_lasso=0.3, group_by="filter", backend=BACKEND)
    read, written = (x.sum() for x in emulated.traffic(device.accesses(lambda: prox(w, **options)), w))
    assert (read, written) == (0, 0)  # it works on a copy
    accesses = device.accesses(lambda: prox(w, **options))
    size = w.numel() * w.itemsize
    for write in (0, 1):
        assert accesses[accesses[:, 2] == write, 1].sum() == size


@on_emulator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [PLAIN, GENERAL[0]], ids=str)
def test_accesses_are_of_16_bytes_wherever_groups_are(device, options, dtype):
    params = [parameter(shape, dtype) for shape in ((70, 8), (9, 48), (5, 512), (80,))]
    optimizer = optimizer_of(params, **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        accesses = device.accesses(optimizer.step)
        assert (accesses[:, 1] == 16).all() and (accesses[:, 0] % 16 == 0).all()


@on_emulator
def test_lanes_side_by_side_touch_neighbours(device):
    """What a warp reads at once lies together: 128 bytes of a group at least, where it has them."""
    p = parameter((4, 512))
    optimizer = optimizer_of([p], **PLAIN)
    p.grad = torch.randn_like(p)
    accesses = device.accesses(optimizer.step)
    of_w = accesses[(accesses[:, 0] >= p.data_ptr()) & (accesses[:, 0] < p.data_ptr() + 4 * p.numel())]
    first = of_w[(of_w[:, 3] == 0) & (of_w[:, 4] == 0) & (of_w[:, 2] == 0)][0, 0]
    for thread in range(8):
        mine = of_w[(of_w[:, 3] == 0) & (of_w[:, 4] == thread) & (of_w[:, 2] == 0)]
        assert mine[0, 0] == first + 16 * thread


@on_emulator
@pytest.mark.parametrize("options", [PLAIN, GENERAL[0]], ids=str)
@pytest.mark.parametrize("odd", ["w", "grad", "buf"])
def test_whichever_tensor_is_off_16_bytes_no_access_is_misaligned(device, odd, options):
    p, grad, buf = (parameter((9, 48), offset=int(odd == name)) for name in ("w", "grad", "buf"))
    optimizer = optimizer_of([p], **options)
    optimizer.state[p]["momentum_buffer"] = buf.detach()
    p.grad = grad.detach()
    accesses = device.accesses(optimizer.step)
    assert len(accesses) and (accesses[:, 0] % accesses[:, 1] == 0).all()


# Bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [PLAIN, *GENERAL], ids=str)
def test_same_bits_at_any_address(options, dtype):
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("neighbour", GENERAL, ids=str)
def test_same_bits_beside_whoever_takes_the_general_path(neighbour, dtype):
    """Alone, a plain step has a kernel of its own."""
    w, grads = [fresh(shape, dtype) for shape in ROWS], [[fresh(s, dtype) for s in ROWS] for _ in range(3)]
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


# Launches and paths


@on_emulator
@pytest.mark.parametrize("options", [PLAIN, GENERAL[1]], ids=str)
def test_one_launch_for_a_model_of_rows_and_elements(device, options):
    params = [parameter(shape) for shape in [*ROWS, (3, 5), (1000,), (1,)]]
    optimizer = optimizer_of(params, **options)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        device["launches"] = 0
        optimizer.step()
        assert device["launches"] == 1


@on_emulator
def test_few_arguments_or_many_the_same_steps(device):
    """The launch of a few tensors carries less; a launch of 200 does not fit into that."""
    shapes = [(3, 8)] * 200
    w, grad = [fresh(shape) for shape in shapes], [fresh(shape) for shape in shapes]
    together = [torch.nn.Parameter(x.clone()) for x in w]
    alone = [torch.nn.Parameter(x.clone()) for x in w]
    for params in (together, *([p] for p in alone)):
        optimizer = optimizer_of(params, **PLAIN)
        for _ in range(2):
            for p in params:
                i = next(i for i, x in enumerate([*together, *alone]) if x is p) % 200
                p.grad = grad[i].clone()
            device["launches"] = 0
            optimizer.step()
            assert device["launches"] == 1
    assert all(torch.equal(x, y) for x, y in zip(together, alone))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_taken_up_to_what_registers_hold(dtype):
    longest = most(dtype)
    for n in (1, 2, longest - 1, longest):
        assert path_of((3, n), dtype=dtype) == {"rows"}
    assert "rows" not in path_of((3, longest + 1), dtype=dtype)
    for n in (longest - 1, longest, longest + 1):
        w, grad, buf = (fresh((3, n), dtype) for _ in range(3))
        options = dict(lr=0.5, momentum=0.9, **coefficients(w, "filter"))
        check_step(BACKEND, w, grad, buf, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prox_mode", MODES)
def test_every_length_of_short_rows(prox_mode, dtype):
    for n in (*range(1, 35), 63, 64, 65, 127, 128, 129, 255, 257, 511, 513):
        w, grad, buf = (fresh((5, n), dtype) for _ in range(3))
        options = dict(lr=0.5, momentum=0.9, prox_mode=prox_mode, **coefficients(w, "filter"))
        check_step(BACKEND, w, grad, buf, **options)


@covering(
    shape=[(9, 48), (7, 9), (300, 1), (77,)], rule=MOMENTA, weight_decay=[0.0, 0.1], maximize=[False, True]
)
def test_update_rules(shape, rule, weight_decay, maximize):
    momentum, dampening, nesterov = rule
    w, grad, buf = (fresh(shape) for _ in range(3))
    options = dict(lr=0.3, momentum=momentum, dampening=dampening, nesterov=nesterov)
    options |= dict(weight_decay=weight_decay, maximize=maximize, **coefficients(w, "filter"))
    check_step(BACKEND, w, grad, buf if momentum else None, **options)


@on_emulator
def test_a_plain_step_has_all_loads_under_way_before_it_writes(device):
    """So it is the plain path that is taken: the general one reads and writes by turns."""
    p = parameter((3, 1024))
    for options, plain in ((PLAIN, True), (GENERAL[0], False)):
        optimizer = optimizer_of([p], **options)
        for _ in range(2):
            p.grad = torch.randn_like(p)
            accesses = device.accesses(optimizer.step)
        for thread in range(emulated.THREADS):
            writes = accesses[(accesses[:, 3] == 0) & (accesses[:, 4] == thread), 2]
            assert len(writes) == 20 and (writes.diff() >= 0).all() == plain  # all of w, gradient, buffer


@on_emulator
@pytest.mark.full(
    "blocks as on a GPU: of several groups, of several warps each; builds the kernels once more"
)
@pytest.mark.parametrize("prox_mode", MODES)
@pytest.mark.parametrize("freeze_zeros", [None, "group"])
def test_blocks_of_256_threads(monkeypatch, freeze_zeros, prox_mode):
    """As on a GPU; only there a block holds several groups of several warps each."""
    monkeypatch.setitem(BUILT, "cuda", emulated.load(256))
    assert path_of((3, 4096)) == {"rows"}
    for shape in ((5, 512), (9, 1024), (3, 2048), (2, 4096), (130, 64)):
        w, grad, buf = (fresh(shape) for _ in range(3))
        w[::2] = 0.0
        options = dict(lr=0.5, momentum=0.9, prox_mode=prox_mode, **coefficients(w, "filter"))
        check_step(BACKEND, w, grad, buf, freeze_zeros=freeze_zeros, **options)


# Edges


@covering(momentum=[0.0, 0.9], shape=[(9, 48), (7, 9), (300, 1), (77,)], dtype=DTYPES)
def test_without_coefficients_w_is_z_bit_for_bit(momentum, shape, dtype):
    w, zeros = fresh(shape, dtype), torch.zeros(shape, dtype=dtype)
    w.view(-1)[::3] = -0.0
    w.view(-1)[1] = float("inf")
    options = dict(lr=0.1, momentum=momentum, group_by="filter")
    got, _ = one_step(BACKEND, w, zeros, zeros.clone() if momentum else None, **options)
    w = w.cpu()
    assert torch.equal(got, w) and torch.equal(torch.signbit(got), torch.signbit(w))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_zeros_of_tensors_without_groups_keep_their_sign_where_there_is_no_l1(momentum):
    """Beside tensors with groups, whose coefficients are in the same param group."""
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
    """A plain step knows only what the host has told it."""
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
    """With a running momentum too: that is the plain path."""
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
    """s shrinks all of a group until 16 bits hold nothing of its small entries."""
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
    """The reference searches for what shrink_one knows; here on both sides of every threshold."""
    z = torch.linspace(-2, 2, 4001, dtype=dtype)[:, None]
    for a, b, c in itertools.product((0.0, 0.3, 5.0), (0.0, 0.2, 30.0), (0.0, 0.1)):
        penalty = dict(group_lasso=a, exclusive_lasso=b, l1=c, group_by="filter")
        check_step(BACKEND, z, torch.zeros_like(z), None, lr=1.0, prox_mode=prox_mode, **penalty)


@pytest.mark.parametrize("shape", [(9, 48), (7, 9), (300, 1), (2, 1024)], ids=str)
@pytest.mark.parametrize("freeze_zeros", ["group", "element"])
def test_frozen_zeros_and_their_buffers(freeze_zeros, shape):
    w, grad, buf = fresh(shape), fresh(shape), fresh(shape)
    w.view(-1)[::3] = 0.0
    w[-1] = 0.0
    options = dict(lr=0.5, momentum=0.9, freeze_zeros=freeze_zeros, **coefficients(w, "filter", strength=0.5))
    got, got_buf = check_step(BACKEND, w, grad, buf, **options)
    frozen = reference.frozen_mask(w, freeze_zeros, "filter").cpu()
    assert not got[frozen].any() and not got_buf[frozen].any() and got[~frozen].any()
