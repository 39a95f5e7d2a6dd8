"""Gradients and momentum buffers that a step cannot take are refused, and nothing has been written."""

import pytest
import torch
from helpers.refusals import OPTIONS, assert_recovers, parameters, rejected, started
from helpers.steps import give_grads, needs_cpu
from torch import nn

from cges_kernels import ProxSGD


def shorter(p):
    p.data = p.data[:2].clone()


def transposed(p):
    p.data = p.data.t().contiguous()


def double(p):
    p.data = p.data.double()


def sparse_grad(p):
    p.grad = p.grad.to_sparse()


def other_dtype_of_grad(p):
    grad, p.grad = p.grad, None
    p.grad_dtype = torch.bfloat16
    p.grad = grad.bfloat16()


BAD_GRADS = [
    (shorter, [r"\[?\(?2, 3", r"got [\[(]4, 3"]),
    (transposed, ["3, 4", r"got [\[(]4, 3"]),
    (double, ["expected a gradient", "(?i)(float64|double)", "(?i)got.* (torch.float32|float)"]),
    (sparse_grad, ["expected a dense gradient", "(?i)got .*layout .*sparse", "not supported"]),
    (other_dtype_of_grad, ["expected a gradient", "(?i)float", "(?i)got.*bfloat16"]),
]


@pytest.mark.parametrize("spoil,words", BAD_GRADS, ids=[case[0].__name__ for case in BAD_GRADS])
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_step_refuses_a_gradient(checked_backend, momentum, spoil, words):
    """A gradient that does not fit is refused in every attempt.

    The faulty parameter is the last of several, so that the others could have been stepped before it. The
    first has its first gradient here, so that its buffer could have been made.
    """
    if checked_backend == "reference" and spoil in (double, other_dtype_of_grad):
        pytest.skip("it steps these, as torch's for-loop SGD does: test_executor_choice.py")
    params = [nn.Parameter(p.detach()) for p in (*parameters(), torch.randn(4, 3))]
    optimizer = ProxSGD(params, **{**OPTIONS, "momentum": momentum}, backend=checked_backend)
    give_grads(params[1:], 0)
    optimizer.step()
    give_grads(params, 1)
    spoil(params[-1])
    for _ in range(2):
        with rejected(optimizer, RuntimeError, r"params'\]\[3\]", *words):
            optimizer.step()


@needs_cpu
@pytest.mark.parametrize("faulty", [0, 1])
def test_step_writes_neither_fused_nor_reference_groups_when_one_is_faulty(faulty):
    """A fault in a group of one executor stops the groups of the other as well, in either order."""
    params = parameters()
    groups = [{"params": params[:1]}, {"params": params[1:], "foreach": True}]
    optimizer = ProxSGD(groups, **OPTIONS)
    give_grads(params, 0)
    optimizer.step()
    assert optimizer._planner.executors == ["cpu", "reference"]
    sparse_grad(params[faulty])
    with rejected(optimizer, RuntimeError, "expected a dense gradient"):
        optimizer.step()


@pytest.mark.parametrize("options", [dict(fused=True), dict(backend="cpu")])
def test_a_gradient_of_another_dtype_is_refused_where_the_reference_may_not_step(options):
    """Such gradients need the reference; where options exclude it, the constructor says so."""
    p = nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16))
    p.grad_dtype = torch.float32
    with pytest.raises(
        RuntimeError,
        match=r"params'\]\[0\]: expected a gradient of its own dtype, torch.bfloat16, got torch.float32",
    ):
        ProxSGD([p], **options)


BAD_BUFFERS = {
    "shape": (lambda p: torch.zeros(7), RuntimeError, ["expected a momentum_buffer", "6", r"got .*7"]),
    "broadcastable": (lambda p: torch.zeros(1), RuntimeError, ["expected a momentum_buffer", r"got [\[(]1"]),
    "sparse": (lambda p: torch.zeros(6).to_sparse(), RuntimeError, ["momentum_buffer", "(?i)got .*sparse"]),
    "meta": (lambda p: torch.zeros(6, device="meta"), RuntimeError, ["momentum_buffer", "got .*meta"]),
    "a list": (lambda p: [0.0] * 6, TypeError, ["expected a tensor as its momentum_buffer", "got list"]),
}


@pytest.mark.parametrize("case", BAD_BUFFERS.values(), ids=BAD_BUFFERS)
def test_step_refuses_a_momentum_buffer(checked_backend, case):
    """A buffer of another shape, layout, device or type is refused in every attempt."""
    make, error, words = case
    optimizer, params = started(checked_backend)
    good = optimizer.state[params[2]]["momentum_buffer"]
    optimizer.state[params[2]]["momentum_buffer"] = make(params[2])
    for _ in range(2):  # the second attempt has to look again
        with rejected(optimizer, error, r"params'\]\[2\]", *words):
            optimizer.step()
    optimizer.state[params[2]]["momentum_buffer"] = good
    assert_recovers(optimizer, params, checked_backend)


@pytest.mark.parametrize("spoil", [lambda b: torch.zeros(7), lambda b: b.double()], ids=["shape", "dtype"])
@needs_cpu
def test_step_refuses_a_momentum_buffer_changed_in_place(spoil):
    """A buffer that is the same object with other memory is checked again.

    `buf.data = buf.data.to(...)` makes one.
    """
    optimizer, params = started("cpu")
    buf = optimizer.state[params[2]]["momentum_buffer"]
    good = buf.data
    buf.data = spoil(buf.data)
    for _ in range(2):
        with rejected(optimizer, RuntimeError, r"params'\]\[2\]", "expected a momentum_buffer", "got"):
            optimizer.step()
    buf.data = good
    assert_recovers(optimizer, params, "cpu")


@pytest.mark.parametrize("which", ["parameter", "gradient", "momentum_buffer"])
def test_a_step_of_freed_memory_is_refused(checked_backend, which):
    """Memory that was freed behind a tensor is an error instead of a crash."""
    optimizer, params = started(checked_backend)
    p = params[0]
    freed = {"parameter": p, "gradient": p.grad, "momentum_buffer": optimizer.state[p]["momentum_buffer"]}
    freed[which].untyped_storage().resize_(0)
    with pytest.raises((ValueError, RuntimeError), match=r"\[0\]: expected .*memory, got .*(freed|none)"):
        optimizer.step()
