"""Every executor against the float64 reference: specs, modes, dtypes, shapes and edge cases."""

import itertools

import pytest
import torch
from helpers.right import (
    DTYPES,
    MODES,
    MOMENTA,
    OPTIMIZERS,
    SPECS,
    as_large_as_may_be,
    check_step,
    coefficients,
    fresh,
    inputs,
    one_step,
    states_of,
    training,
)
from helpers.tiers import TILES, covering, fused_backends

from cges_kernels import available_backends, prox, prox_
from cges_kernels.backends.extension import BUILT
from cges_kernels.core import reference, shrinkage

# Multiples of a vector's width, one column, one row, odd sizes, more dims, and tall and long groups.
SHAPES = [(64, 48), (37, 1), (1, 29), (131, 67), (16, 8, 3, 3), (5, 6, 7), (300, 70), (20, 2500)]
# groups larger than any tile, of odd sizes
LARGE = [(17000, 19), (5, 300_000), (2, 5, 70_001), (300, 4, 300)]
# tensors of small matrices: reduced are all dims but the first and third
MATRICES = [(900, 3, 2), (40, 5, 300), (3, 2, 90, 70)]
RULES = list(OPTIMIZERS)
TERMS = ("group_lasso", "exclusive_lasso", "l1")
NAN, INF = float("nan"), float("inf")


@pytest.mark.usefixtures("poisoned_memory", "tiles")
@covering(
    executor=fused_backends(),
    rule=RULES,
    shape=SHAPES,
    group_by=SPECS,
    prox_mode=MODES,
    dtype=DTYPES,
    tiles=TILES,
)
def test_matrix(executor, rule, shape, group_by, prox_mode, dtype):
    """First and later steps are right for each rule, shape, spec, mode and dtype, whole and in pieces."""
    shape = as_large_as_may_be(executor, shape)
    w, grad = inputs(shape, dtype, 2)
    for states in (states_of(rule, shape, dtype), None):
        check_step(executor, w, grad, states, steps=7, **training(w, group_by, prox_mode, rule))


@covering(executor=fused_backends(), rule=RULES, shape=LARGE, group_by=SPECS, prox_mode=MODES, dtype=DTYPES)
def test_groups_longer_than_any_tile(executor, rule, shape, group_by, prox_mode, dtype):
    """Groups that have to be cut because of their size are right."""
    shape = as_large_as_may_be(executor, shape)
    w, grad = inputs(shape, dtype, 2)
    states = states_of(rule, shape, dtype)
    check_step(executor, w, grad, states, steps=3, **training(w, group_by, prox_mode, rule))


@pytest.mark.usefixtures("tiles")
@covering(executor=fused_backends(), view=MATRICES, prox_mode=MODES, tiles=TILES)
def test_many_small_matrices(executor, prox_mode, view):
    """Kept dims on both sides of the reduced ones are right, as in grouped convolutions."""
    w, grad, buf = inputs(as_large_as_may_be(executor, view), torch.float32)
    dims = (1,) if len(view) == 3 else (1, 3)
    check_step(executor, w, grad, buf, **training(w, dims, prox_mode))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_nothing_underflows_to_negative_zero(fused_backend, dtype):
    """Entries that a group's scale takes below the least number become +0.0."""
    w = fresh((50, 60), dtype, scale=1e-3 if dtype == torch.float16 else 1e-18)
    if dtype == torch.float32:
        w[1:] *= 1e-25  # denormal numbers beside an entry whose square is not denormal
    norms = w.double().norm(dim=0)
    for backend in (fused_backend, "reference"):
        got = prox(w, group_lasso=float(norms.median()) * (1 - 1e-3), backend=backend)
        assert got.any() and not torch.signbit(got[got == 0]).any()


@covering(
    executor=fused_backends(), rule=MOMENTA, weight_decay=(0.0, 0.1), maximize=(False, True), dtype=DTYPES
)
def test_update_rules(executor, rule, weight_decay, maximize, dtype):
    """Each combination of SGD's options is right, with and without a buffer."""
    momentum, dampening, nesterov = rule
    w, grad, buf = inputs((45, 130), dtype)
    options = dict(
        lr=0.3, momentum=momentum, dampening=dampening, nesterov=nesterov, weight_decay=weight_decay
    )
    options |= {"maximize": maximize, **coefficients(w, "feature")}
    check_step(executor, w, grad, buf if momentum else None, **options)
    check_step(executor, w, grad, None, **options)


@covering(
    executor=fused_backends(),
    terms=[*TERMS, "group_lasso exclusive_lasso", ""],
    prox_mode=MODES,
    group_by=SPECS,
)
def test_each_term_alone(executor, group_by, prox_mode, terms):
    """Each penalty alone, two of them, and none are right."""
    w, grad, _ = inputs((60, 40, 3), torch.float32)
    options = coefficients(w, group_by)
    options |= {name: 0.0 for name in TERMS if name not in terms.split()}
    if not terms:
        got, _ = one_step(executor, w, grad, lr=0.5, prox_mode=prox_mode, **options)
        truth = torch.addcmul(w.double(), grad.double(), torch.tensor(-0.5, dtype=torch.float64)).cpu()
        assert (got.double() - truth).abs().max() <= torch.finfo(torch.float32).eps * truth.abs().max()
    else:
        check_step(executor, w, grad, None, lr=0.5, prox_mode=prox_mode, **options)


@covering(executor=fused_backends(), group_by=[*SPECS, (0, 1), (1, 2, 3)], prox_mode=MODES)
def test_memory_formats(executor, group_by, prox_mode):
    """channels_last and transposed tensors are right in the layout of their memory."""
    for format_ in (torch.channels_last, torch.contiguous_format):
        w, grad, buf = (x.to(memory_format=format_) for x in inputs((24, 10, 3, 5), torch.float32))
        options = training(w, group_by, prox_mode)
        check_step(executor, w, grad, buf, **options)
    w, grad, buf = (x.t() for x in inputs((70, 50), torch.float32))
    if max(d for d in (0, *group_by) if isinstance(d, int)) == 0:
        options = training(w, group_by, prox_mode)
        check_step(executor, w, grad, buf, **options)


@pytest.mark.parametrize(
    ("shape", "group_by", "view"),
    [
        ((64, 8, 3, 3), (1,), (4, 16, 8, 3, 3)),
        ((32, 24), (1, 2), (4, 8, 24)),
        ((80, 30), (0, 2), (4, 20, 30)),
    ],
    ids=["grouped-convolution", "heads", "lstm-units"],
)
@pytest.mark.parametrize("prox_mode", MODES)
def test_views(fused_backend, shape, group_by, view, prox_mode):
    """The view options of grouped convolutions, attention heads and LSTM units are right."""
    w, grad, _ = inputs(shape, torch.float32)
    check_step(fused_backend, w, grad, None, lr=0.5, prox_mode=prox_mode, **coefficients(w, group_by, view))


@covering(executor=fused_backends(), offset=[1, 3], dtype=DTYPES)
def test_misaligned_storage(executor, offset, dtype):
    """Tensors that begin at odd addresses are right, and have the same bits as aligned ones.

    Triton's bits may differ: there the order of sums follows the width of a vector.
    """

    def misaligned(x):
        return torch.empty(x.numel() + offset, dtype=dtype)[offset:].view(x.shape).copy_(x)

    for group_by in SPECS:
        w, grad, buf = inputs((50, 77), dtype)
        options = training(w, group_by, "sequential")
        check_step(executor, w, grad, buf, misaligned, **options)
        if executor != "triton":
            steps = [
                one_step(executor, w, grad, buf, place, **options) for place in (misaligned, torch.clone)
            ]
            assert torch.equal(steps[0][0], steps[1][0])


@pytest.mark.usefixtures("tiles")
@covering(
    executor=fused_backends(),
    shape=[(64, 48), (16, 8, 3, 3), (3, 90), (70, 2000)],
    group_by=SPECS,
    freeze_zeros=("group", "element"),
    prox_mode=MODES,
    tiles=TILES,
)
def test_freeze_zeros(executor, shape, group_by, freeze_zeros, prox_mode):
    """Frozen weights and their momentum become 0 and others do not, with and without penalties."""
    shape = as_large_as_may_be(executor, shape)
    w, grad, buf = inputs(shape, torch.float32)
    w[torch.rand(shape) < 0.3] = 0.0
    w[:, 1::2] = 0.0
    w[1::2] = 0.0
    options = {"lr": 0.5, "momentum": 0.9, "freeze_zeros": freeze_zeros, "prox_mode": prox_mode}
    for penalty in ({"group_by": group_by}, coefficients(w, group_by, strength=0.5)):
        got, got_buf = check_step(executor, w, grad, buf, **options, **penalty)
        frozen = reference.frozen_mask(w, freeze_zeros, group_by).cpu()
        assert not got[frozen].any() and not got_buf[frozen].any()
        assert got[~frozen].any()


@pytest.mark.usefixtures("tiles")
@covering(
    executor=fused_backends(),
    share=(0.0, 0.9, 0.999),
    exclusive_lasso=(0.1, 10.0),
    tiles=TILES,
)
def test_exact_mode_where_newton_leaves_the_bracket(executor, exclusive_lasso, share):
    """Groups that are hard to solve are solved as by the reference.

    They have heavy tails, equal entries, and norms barely above the threshold.
    """
    z = fresh((100, 32), torch.float64)
    z[:, 1::4] **= 5
    z[:, 2::4] = -0.7
    z[:, 3::4] += 10 * z[:, 3::4].sign()
    z /= z.norm(dim=0)
    options = dict(group_lasso=share, exclusive_lasso=exclusive_lasso, prox_mode="exact")
    got, expected = (prox(z, **options, backend=name) for name in (executor, "reference"))
    assert expected.any() and (got - expected).abs().max() <= 8 * torch.finfo(z.dtype).eps


@pytest.mark.usefixtures("tiles")
@covering(executor=fused_backends(), group_by=SPECS, prox_mode=MODES, tiles=TILES)
def test_zero_groups_come_to_life(executor, group_by, prox_mode):
    """Without freezing, a group of zeros with a large gradient comes to life: z decides, not w."""
    w, grad, _ = inputs((40, 30), torch.float32)
    w[:, :7] = w[:5] = 0.0
    got, _ = check_step(executor, w, grad, None, lr=0.5, prox_mode=prox_mode, **coefficients(w, group_by))
    assert got[:, :7].any() and got[:5].any()


@pytest.mark.usefixtures("tiles")
@covering(
    executor=fused_backends(),
    terms=[*TERMS, "all"],
    group_by=SPECS,
    prox_mode=MODES,
    poison=(NAN, INF, -INF),
    tiles=TILES,
)
def test_nan_and_inf_spread_as_in_the_reference(executor, terms, group_by, prox_mode, poison):
    """NaN and infinities show where the reference has them, and zeros elsewhere are its zeros."""
    w = fresh((40, 50))
    w[7, 11] = poison
    options = coefficients(w, group_by)
    if terms != "all":
        options |= {name: 0.0 for name in TERMS if name != terms}
    got = prox(w, backend=executor, prox_mode=prox_mode, **options)
    expected = prox(w, backend="reference", prox_mode=prox_mode, **options)
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())
    assert not got.isfinite().all()
    fine = expected.isfinite()
    assert torch.equal(got[fine] == 0, expected[fine] == 0)


def test_zero_group_stays_zero_and_huge_alpha_kills(backend):
    """A zero group gives no NaN, and a huge group lasso gives +0.0."""
    w = fresh((30, 20))
    w[:, 3] = 0.0
    assert not prox(w, group_lasso=0.1, exclusive_lasso=0.1, backend=backend)[:, 3].any()
    killed = prox(w, group_lasso=1e9, backend=backend)
    assert not killed.any() and not torch.signbit(killed).any()


def test_denormals_and_negative_zeros(fused_backend):
    """No executor flushes denormal numbers, and l1 writes +0.0."""
    tiny = torch.finfo(torch.float32).tiny
    w = fresh((40, 40)) * tiny
    w[0] = -0.0
    # Without a penalty every bit stays, and without groups group lasso is none.
    for same, of in (
        (prox(w, backend=fused_backend), w),
        (prox(w[0], group_lasso=1.0, backend=fused_backend), w[0]),
    ):
        assert torch.equal(same, of) and torch.equal(torch.signbit(same), torch.signbit(of))
    got, expected = (prox(w, l1=tiny / 2, backend=name) for name in (fused_backend, "reference"))
    assert torch.equal(got, expected) and got.any()
    assert not torch.signbit(got[got == 0]).any()


def test_lr_zero_is_a_no_op(backend):
    """A step with lr = 0 changes no weight, penalties or not."""
    w, grad, buf = inputs((30, 40), torch.float32)
    got, _ = one_step(backend, w, grad, buf, lr=0.0, momentum=0.9, **coefficients(w, "feature"))
    assert torch.equal(got, w.cpu())


def test_many_tensors_at_once(fused_backend):
    """500 tensors in one call each get the bits that they get alone."""
    tensors = [fresh((i % 37 + 1, i % 11 + 1)) for i in range(500)]
    options = dict(group_lasso=0.3, exclusive_lasso=0.01, l1=0.1, backend=fused_backend)
    alone = {i: prox(tensors[i], **options) for i in range(0, 500, 7)}
    prox_(tensors, **options)
    assert all(torch.equal(tensors[i], w) for i, w in alone.items())


def test_two_threads_really_run(threads):
    """The CPU executor uses the threads that torch.set_num_threads allows."""
    threads(2)
    assert BUILT["cpu"].parallel_threads() == 2


def test_empty_and_single_element_tensors(backend):
    """Tensors of no or one element are right."""
    for shape in [(0,), (0, 5), (5, 0), (), (1,), (1, 1)]:
        w = fresh(shape)
        got = prox(w, group_lasso=0.1, exclusive_lasso=0.1, l1=0.01, backend=backend)
        truth = shrinkage.shrink(w.double(), shrinkage.Thresholds(0.1, 0.1, 0.01))
        assert got.shape == w.shape
        torch.testing.assert_close(got.double(), truth, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("tiles")
@covering(
    executor=fused_backends(),
    exponent=[-30, -23, -20, -18, 16, 18, 20, 35],
    group_by=("feature", "filter"),
    prox_mode=MODES,
    tiles=TILES,
)
def test_very_small_and_very_large_weights(executor, exponent, group_by, prox_mode):
    """Where squares leave float32's range norms are 0 or infinite, for all executors alike, and never NaN.

    The exponents lie on both sides of that range's ends, 1e-19 and 1e18, and far beyond.
    """
    scale, w = 10.0**exponent, torch.randn(40, 48).clamp(-1, 1)
    given = dict(group_lasso=3 * scale, exclusive_lasso=0.002, l1=0.01 * scale)
    for names in (["group_lasso"], ["exclusive_lasso"], list(given)):
        options = dict({name: given[name] for name in names}, group_by=group_by, prox_mode=prox_mode)
        found, expected = (prox(w * scale, **options, backend=b) for b in (executor, "reference"))
        assert not found.isnan().any()
        torch.testing.assert_close(found / scale, expected / scale)
        assert torch.equal(found == 0, expected == 0)
        truth = prox(w.double() * scale, **options, backend="reference") / scale
        if -19 < exponent < 18 or names == ["exclusive_lasso"]:  # the range that the docstring of prox gives
            torch.testing.assert_close((found.double() / scale), truth, rtol=1e-4, atol=1e-6)
        elif exponent in (-30, 20):
            killed, kept = (group.all() for group in (found == 0, found != 0))
            assert names != ["group_lasso"] or (killed if exponent < 0 else kept)


# All combinations with a group lasso or an exclusive lasso: without both there are no groups.
PENALTIES = [
    dict(zip(("group_lasso", "exclusive_lasso", "l1"), values))
    for values in itertools.product((0.0, 0.4), (0.0, 0.3), (0.0, 0.2))
    if any(values[:2])
]


@covering(executor=available_backends(), penalty=PENALTIES, prox_mode=MODES, dtype=DTYPES)
def test_a_group_of_one_is_a_group_with_zeros(executor, penalty, prox_mode, dtype):
    """The formula for groups of one agrees with the search, on the same groups with a zero added."""
    edges = torch.tensor([0.0, -0.0, 0.2, -0.4, 0.6, NAN, INF, -INF, 1e-30, 1e30])
    z = torch.cat([edges, torch.randn(1000)]).to(dtype)
    wide = torch.stack([z, torch.zeros_like(z)], 1)
    options = dict(penalty, prox_mode=prox_mode, group_by="filter", backend=executor)
    one, two = prox(z[:, None], **options)[:, 0], prox(wide, **options)[:, 0]
    whole = wide.isfinite().all(1)
    torch.testing.assert_close(one[whole], two[whole])
    assert torch.equal(one[whole] == 0, two[whole] == 0)
    truth = prox(z[:, None], **{**options, "backend": "reference"})[:, 0]
    assert torch.equal(one.isnan(), truth.isnan()) and torch.equal(one.isinf(), truth.isinf())


@covering(executor=fused_backends(), prox_mode=MODES, freeze_zeros=("group", "element"))
def test_groups_of_one_stay_zero(executor, prox_mode, freeze_zeros):
    """Frozen groups of one element stay 0, and so does their momentum."""
    w, grad, buf = inputs((300, 1), torch.float32)
    w[::3] = 0
    options = dict(training(w, "filter", prox_mode), freeze_zeros=freeze_zeros)
    check_step(executor, w, grad, buf, **options)
    new, new_buf = one_step(executor, w, grad, buf, **options)
    assert not new[::3].any() and not new_buf[::3].any() and new.any()
