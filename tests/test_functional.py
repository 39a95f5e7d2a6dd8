"""The public functions: prox, prox_, penalty, explain."""

import re

import pytest
import torch
from helpers.right import DTYPES, SPECS, fresh
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from cges_kernels import ProxSGD, explain, penalty, prox, prox_
from cges_kernels.core.hyperparameters import PROX_MODES

OPTIONS = {"group_lasso": 0.9, "exclusive_lasso": 0.02, "l1": 0.1}
FORMATS = {
    "contiguous": lambda: fresh((6, 4, 3, 3)),
    "channels_last": lambda: fresh((6, 4, 3, 3)).to(memory_format=torch.channels_last),
    "transposed": lambda: fresh((7, 9)).t(),
    "size-1 dims": lambda: fresh((6,)).as_strided((6, 1, 1), (1, 50, 7)),
    "bias": lambda: fresh((9,)),
    "0-d": lambda: fresh(()),
}


# prox


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prox_mode", PROX_MODES)
@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
def test_prox_returns_a_new_tensor_of_the_same_kind(backend, make, prox_mode, dtype):
    w = make().to(dtype)
    before, strides = w.clone(), w.stride()
    for options in (OPTIONS, {}):
        got = prox(w, prox_mode=prox_mode, backend=backend, **options)
        assert got.data_ptr() != w.data_ptr() and not got.requires_grad
        assert (got.dtype, got.shape, got.device) == (w.dtype, w.shape, w.device)
        assert [s for s, n in zip(got.stride(), w.shape) if n > 1] == [
            s for s, n in zip(strides, w.shape) if n > 1
        ]
        assert torch.equal(w, before) and w.stride() == strides
    assert torch.equal(got, w)  # no coefficients: a copy


@pytest.mark.parametrize("group_by", [*SPECS, (1,), (0, 1)])
def test_prox_in_exact_mode_is_a_minimum(backend, group_by):
    """No move away lowers ||x - w||^2 / 2 + penalty(x); sequential mode is no minimum."""
    w = fresh((12, 5), torch.float64)
    options = {**OPTIONS, "exclusive_lasso": 0.2, "group_by": group_by}

    def objective(x):
        return (x - w).square().sum() / 2 + penalty(x, **options)

    best = prox(w, prox_mode="exact", backend=backend, **options)
    assert best.any() and (best == 0).any()
    for size in (1e-3, 1e-1):
        for _ in range(50):
            move = size * fresh(w.shape, torch.float64)
            # convex, with curvature 1 from the first term
            assert objective(best + move) >= objective(best) + move.square().sum() / 2 - 1e-12
            move = torch.where(best == 0, 0.0, move)
            assert objective(best + move) >= objective(best) + move.square().sum() / 2 - 1e-12
    assert objective(prox(w, backend=backend, **options)) > objective(best) + 1e-3


@pytest.mark.parametrize("prox_mode", PROX_MODES)
@pytest.mark.parametrize("group_by", SPECS)
def test_prox_of_a_view_is_the_prox_of_the_viewed(backend, group_by, prox_mode):
    w = fresh((12, 10))
    options = {**OPTIONS, "group_by": group_by, "prox_mode": prox_mode, "backend": backend}
    assert torch.equal(prox(w, view=(3, 4, 10), **options), prox(w.view(3, 4, 10), **options).view(12, 10))


@pytest.mark.parametrize("prox_mode", PROX_MODES)
@pytest.mark.parametrize("group_by", [*SPECS, ()])
def test_prox_is_differentiable(backend, group_by, prox_mode):
    w = fresh((4, 3, 2), torch.float64).requires_grad_()

    def of(w):
        return prox(w, group_by=group_by, prox_mode=prox_mode, backend=backend, **OPTIONS)

    assert torch.autograd.gradcheck(of, (w,))
    torch.testing.assert_close(of(w).detach(), of(w.detach()), rtol=1e-13, atol=1e-15)


def test_prox_without_coefficients_is_differentiable_and_still_a_new_tensor(backend):
    w = fresh((4, 3)).requires_grad_()
    got = prox(w, backend=backend)
    assert got.data_ptr() != w.data_ptr() and torch.equal(got, w)
    (grad,) = torch.autograd.grad(got.sum(), w)
    assert torch.equal(grad, torch.ones_like(w))


def test_prox_without_grad_mode_is_cut_off(backend):
    w = fresh((4, 3)).requires_grad_()
    with torch.no_grad():
        got = prox(w, backend=backend, **OPTIONS)
    assert not got.requires_grad and torch.equal(got, prox(w.detach(), backend=backend, **OPTIONS))


# prox_


def mixed_list():
    """Tensors of every dtype, shape and memory format."""
    shapes = [(6, 5), (4, 3, 3, 3), (9,), (), (0, 3), (1, 1), (70, 33)]
    tensors = [fresh(shape, dtype) for dtype in DTYPES for shape in shapes]
    return [*tensors, fresh((8, 6)).t(), fresh((4, 5, 3, 3)).to(memory_format=torch.channels_last)]


@pytest.mark.parametrize("prox_mode", PROX_MODES)
@pytest.mark.parametrize("group_by", SPECS)
def test_prox_in_place_over_a_mixed_list(backend, group_by, prox_mode):
    tensors = mixed_list()
    options = {**OPTIONS, "group_by": group_by, "prox_mode": prox_mode, "backend": backend}
    expected = [prox(w, **options) for w in tensors]
    assert any(not torch.equal(w, x) for w, x in zip(tensors, expected))
    before = [(w.data_ptr(), w.stride(), w.dtype, w._version) for w in tensors]
    assert prox_(tensors, **options) is None
    for w, x, (pointer, strides, dtype, version) in zip(tensors, expected, before):
        assert (w.data_ptr(), w.stride(), w.dtype) == (pointer, strides, dtype)
        assert torch.equal(w, x)
        assert w._version > version or w.numel() == 0  # autograd is told of the change


def test_prox_in_place_takes_any_iterable_and_a_lone_tensor(backend):
    w = fresh((6, 5))
    expected = prox(w, backend=backend, **OPTIONS)
    one, two, three = w.clone(), w.clone(), w.clone()
    prox_(one, backend=backend, **OPTIONS)
    prox_((x for x in (two, three)), backend=backend, **OPTIONS)
    assert all(torch.equal(x, expected) for x in (one, two, three))


def test_prox_in_place_refuses_what_requires_grad_and_writes_nothing(backend):
    free, leaf = fresh((6, 5)), nn.Parameter(fresh((6, 5)))
    before = [free.clone(), leaf.detach().clone()]
    with pytest.raises(RuntimeError, match=r"tensors\[1\]: expected torch.no_grad\(\)"):
        prox_([free, leaf], backend=backend, **OPTIONS)
    assert torch.equal(free, before[0]) and torch.equal(leaf, before[1])
    with torch.no_grad():
        prox_([free, leaf], backend=backend, **OPTIONS)
    assert torch.equal(leaf, prox(before[1], backend=backend, **OPTIONS)) and leaf.requires_grad


def test_prox_in_place_serves_another_optimizer(backend):
    """torch.optim.SGD and then prox_ at lr times the coefficients is ProxSGD."""
    start = fresh((12, 7), torch.float64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {**OPTIONS, "l1": 1.0}
    prox_sgd = ProxSGD([ours], lr=0.1, momentum=0.9, backend=backend, **options)
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for _ in range(5):
        ours.grad = fresh((12, 7), torch.float64)
        theirs.grad = ours.grad.clone()
        prox_sgd.step()
        sgd.step()
        with torch.no_grad():
            prox_([theirs], backend=backend, **{name: 0.1 * value for name, value in options.items()})
    # the two round the update apart by an ulp a step where one fuses a multiply and an add
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    assert (ours == 0).any() and torch.equal(ours == 0, theirs == 0)


# penalty


def groups_of(w, group_by):
    """The groups as vectors, cut out by hand."""
    matrix = {
        "feature": lambda: w.flatten(1).T,
        "filter": lambda: w.flatten(1),
        "channel": lambda: w.transpose(0, 1).flatten(1),
        "tensor": lambda: w.flatten()[None],
    }[group_by]()
    return list(matrix)


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 2), (4, 3, 2, 2), (1, 5)], ids=str)
@pytest.mark.parametrize("group_by", SPECS)
def test_penalty_is_omega(group_by, shape):
    w = fresh(shape, torch.float64)
    a, b, c = 0.7, 0.3, 0.2
    expected = sum(
        a * g.square().sum().sqrt() + b / 2 * g.abs().sum() ** 2 + c * g.abs().sum()
        for g in groups_of(w, group_by)
    )
    got = penalty(w, group_lasso=a, exclusive_lasso=b, l1=c, group_by=group_by)
    assert got.shape == () and got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)
    flat = penalty(w.flatten(), group_lasso=a, exclusive_lasso=b, l1=c, group_by=group_by, view=shape)
    assert torch.equal(flat, got)


def test_penalty_of_a_known_matrix():
    w = torch.tensor([[3.0, 0.0], [-4.0, 0.0]])
    assert penalty(w, group_lasso=1.0) == 5
    assert penalty(w, exclusive_lasso=1.0) == 24.5
    assert penalty(w, l1=1.0) == 7
    assert penalty(w, group_lasso=1.0, group_by="filter") == 7
    assert penalty(w, exclusive_lasso=2.0, group_by=(1,)) == 25
    assert penalty(w) == 0


def test_penalty_of_a_bias_is_its_l1_alone_under_a_named_spec():
    w = torch.tensor([3.0, -4.0])
    assert penalty(w, group_lasso=1.0, exclusive_lasso=1.0, l1=0.5) == 3.5
    assert penalty(w, group_lasso=1.0, exclusive_lasso=1.0, l1=0.5, group_by=(0,)) == 5 + 24.5 + 3.5
    assert penalty(torch.empty(0, 3), **OPTIONS) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_penalty_of_16_bit_types_is_computed_in_float32(dtype):
    w = (100 * fresh((50, 40))).to(dtype)  # squares overflow float16
    got = penalty(w, **OPTIONS)
    assert got.dtype == torch.float32 and torch.equal(got, penalty(w.float(), **OPTIONS))


@pytest.mark.parametrize("group_by", [*SPECS, (1,), ()])
def test_penalty_is_differentiable(group_by):
    w = fresh((4, 3, 2), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: penalty(w, group_by=group_by, **OPTIONS), (w,))


def test_penalty_has_gradient_zero_at_zero_groups():
    w = fresh((5, 4))
    w[:, 2] = 0.0
    w.requires_grad_()
    (grad,) = torch.autograd.grad(penalty(w, **OPTIONS), w)
    assert grad.isfinite().all() and not grad[:, 2].any() and grad[:, 1].all()


# explain


def parsed(table):
    """The printed table as a list of {header: cell}."""
    header, *rows = [re.split(r"\s{2,}", line.strip()) for line in str(table).splitlines()]
    assert all(len(row) == len(header) for row in rows)
    return [dict(zip(header, row)) for row in rows]


def test_explain_shows_what_each_spec_amounts_to():
    fc = {
        "params": [nn.Parameter(fresh((64, 48))), nn.Parameter(fresh((64,)))],
        "group_lasso": 1e-3,
        "exclusive_lasso": 0.25,
        "l1": 1e-5,
    }
    conv = {
        "params": [nn.Parameter(fresh((16, 8, 3, 3)).to(memory_format=torch.channels_last))],
        "exclusive_lasso": 0.5,
        "group_by": "channel",
        "lr": 0.01,
        "prox_mode": "exact",
    }
    heads = {"params": [nn.Parameter(fresh((2048, 1)))], "group_by": (1, 2), "view": (1024, 2, 1)}
    first, bias, second, third = parsed(explain(ProxSGD([fc, conv, heads], lr=0.05)))
    assert first == {
        "parameter": "param_groups[0][0]",
        "shape": "64x48",
        "group_by": "feature",
        "layout": "(1, 64, 48, 1)",
        "groups": "48",
        "group size": "64",
        "group_lasso": "0.001",
        "exclusive_lasso": "0.25",
        "l1": "1e-05",
        "lr": "0.05",
        "mode": "sequential",
        "b*n": "0.8",
    }
    no_groups = ("layout", "groups", "group size", "group_lasso", "exclusive_lasso", "b*n")
    assert bias == {
        **first,
        "parameter": "param_groups[0][1]",
        "shape": "64",
        **dict.fromkeys(no_groups, "-"),
    }
    assert (second["layout"], second["groups"], second["group size"]) == ("(1, 144, 8, 1)", "8", "144")
    assert (second["mode"], second["lr"], second["b*n"]) == ("exact", "0.01", "0.72")
    assert (third["group_by"], third["groups"], third["group size"]) == ("(1, 2) of 1024x2x1", "1,024", "2")


def test_explain_names_parameters_and_follows_a_changed_lr():
    model = nn.Sequential(nn.Linear(8, 4), nn.Conv1d(4, 2, 3))
    optimizer = ProxSGD(model.named_parameters(), lr=torch.tensor(0.5), exclusive_lasso=0.1)
    table = parsed(explain(optimizer))
    assert [row["parameter"] for row in table] == [name for name, _ in model.named_parameters()]
    assert [row["b*n"] for row in table] == ["0.2", "-", "0.1", "-"]
    optimizer.param_groups[0]["lr"] = 0.05
    assert [row["b*n"] for row in parsed(explain(optimizer))] == ["0.02", "-", "0.01", "-"]


def test_explain_lines_its_columns_up():
    lines = str(explain(ProxSGD([nn.Parameter(fresh((6, 5))), nn.Parameter(fresh(()))], lr=0.1))).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert "scalar" in lines[2]


def test_explain_refuses_another_optimizer():
    with pytest.raises(TypeError, match="expected a ProxSGD, got SGD"):
        explain(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))


@pytest.mark.parametrize("prox_mode", PROX_MODES)
def test_transforms_and_fake_tensors(prox_mode):
    """Whatever follows PyTorch's operations is served, by the reference."""
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    options = dict(group_lasso=0.1, exclusive_lasso=0.2, prox_mode=prox_mode)
    wanted = torch.stack([prox(w, **options) for w in x])
    torch.testing.assert_close(torch.vmap(lambda w: prox(w, **options))(x), wanted)

    def in_place(w):
        w = w.clone()
        prox_([w], **options)
        return w

    torch.testing.assert_close(torch.vmap(in_place)(x), wanted)
    jacobian = torch.func.jacrev(lambda w: prox(w, **options))(x[0])
    _, along = torch.func.jvp(lambda w: prox(w, **options), (x[0],), (x[1],))
    torch.testing.assert_close(along, torch.tensordot(jacobian, x[1], 2))
    with FakeTensorMode():
        fake = torch.empty(3, 4)
        assert prox(fake, **options).shape == fake.shape
        p = torch.nn.Parameter(torch.empty(3, 4))
        p.grad = torch.empty(3, 4)
        optimizer = ProxSGD([p], lr=0.1, momentum=0.9, **options)
        optimizer.step()
        assert optimizer.state[p]["momentum_buffer"].shape == p.shape
    with pytest.raises(
        RuntimeError, match=r"'cpu' cannot .*it serves tensors that hold values, got one of Fake"
    ):
        torch.vmap(lambda w: prox(w, backend="cpu", **options))(x)


@pytest.mark.parametrize("prox_mode", PROX_MODES)
def test_derivatives_through_transforms(prox_mode):
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    options = dict(group_lasso=0.1, exclusive_lasso=0.2, l1=0.1, prox_mode=prox_mode)

    def total(x):
        return sum(prox(w, **options).square().sum() for w in x)

    def mapped(x):
        return torch.func.vmap(lambda w: prox(w, **options))(x).square().sum()

    wanted = torch.func.grad(total)(x)
    torch.testing.assert_close(torch.func.grad(mapped)(x), wanted)
    leaf = x.clone().requires_grad_()
    mapped(leaf).backward()
    torch.testing.assert_close(leaf.grad, wanted)

    def of_l1(c):
        return prox(x[0], **{**options, "l1": c}).square().sum()

    c, h = torch.tensor(0.1, dtype=torch.float64), 1e-6
    numeric = (of_l1(c + h) - of_l1(c - h)) / (2 * h)
    torch.testing.assert_close(torch.func.grad(of_l1)(c), numeric, rtol=1e-5, atol=1e-7)
    leaf = c.clone().requires_grad_()
    of_l1(leaf).backward()
    torch.testing.assert_close(leaf.grad, numeric, rtol=1e-5, atol=1e-7)
    _, along = torch.func.jvp(lambda w: prox(w, **options), (x[0],), (x[1],))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x[0], x[1])
        torch.testing.assert_close(forward_ad.unpack_dual(prox(dual, **options)).tangent, along)
        prox_([dual], **options)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, along)


def test_the_penalty_has_tangent_0_at_0():
    zeros, ones = torch.zeros(4, 3), torch.ones(4, 3)
    _, tangent = torch.func.jvp(lambda w: penalty(w, group_lasso=1.0), (zeros,), (ones,))
    assert tangent.isfinite()
    mapped = torch.func.vmap(lambda w: penalty(w, group_lasso=1.0))
    assert not torch.func.grad(lambda x: mapped(x).sum())(torch.zeros(2, 4, 3)).any()


def test_traces_hold_the_map():
    w = torch.randn(4, 3)
    traced = torch.jit.trace(lambda w: prox(w, l1=0.5), w)
    graph = make_fx(lambda w: prox(w, l1=0.5), tracing_mode="real")(w)
    other = torch.randn(4, 3)
    for found in (traced(other), graph(other)):
        torch.testing.assert_close(found, prox(other, l1=0.5))
