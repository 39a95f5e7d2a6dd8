"""Executors that are not available, or that cannot serve what is asked of them."""

import pytest
import torch
from helpers.refusals import as_bytes, assert_recovers, parameters, rejected, started
from helpers.steps import needs_cpu

from cges_kernels import ProxSGD, available_backends, prox, prox_


@pytest.mark.parametrize("absent", ["cpu", "triton", "cuda"])
def test_a_backend_that_cannot_serve_says_why(absent):
    """Every public function raises an error with a reason, even for an empty list, and writes nothing."""
    params = parameters()
    before = [as_bytes(p) for p in params]
    if absent in available_backends():
        pytest.skip(f"{absent} serves here")
    for call in (
        lambda: ProxSGD(params, backend=absent),
        lambda: prox(params[0].detach(), l1=0.1, backend=absent),
        lambda: prox(params[0], l1=0.1, backend=absent),
        lambda: prox_([p.detach() for p in params], l1=0.1, backend=absent),
        lambda: prox_([], l1=0.1, backend=absent),
    ):
        with pytest.raises(RuntimeError, match=rf"{absent}.* cannot (serve|be served)[:.] .+"):
            call()
    assert [as_bytes(p) for p in params] == before


def test_an_unknown_backend_is_refused():
    """An unknown name is an error that lists the names."""
    for call in (
        lambda: ProxSGD(parameters(), backend="gpu"),
        lambda: prox(torch.ones(3), backend="gpu"),
        lambda: prox_([torch.ones(3)], backend="gpu"),
    ):
        with pytest.raises(ValueError, match=r"backend: expected 'auto' or one of .*'reference'.* got 'gpu'"):
            call()


def test_fused_cannot_be_the_reference():
    """fused=True with the reference is refused by the constructor, in a new param group and in a step."""
    with pytest.raises(RuntimeError, match=r"fused=True cannot be served.*reference.*not fused"):
        ProxSGD(parameters(), fused=True, backend="reference")
    optimizer, params = started("reference")
    with rejected(optimizer, RuntimeError, "fused=True cannot be served"):
        optimizer.add_param_group({"params": parameters(seed=1), "fused": True})
    optimizer.param_groups[0]["fused"] = True
    with rejected(optimizer, RuntimeError, "fused=True cannot be served"):
        optimizer.step()
    optimizer.param_groups[0]["fused"] = None
    assert_recovers(optimizer, params, "reference")


@needs_cpu
@pytest.mark.parametrize(
    "option", [dict(foreach=True), dict(differentiable=True), dict(fused=False)], ids=str
)
def test_a_fused_backend_cannot_be_the_reference(option):
    """Options that mean the reference contradict another backend."""
    with pytest.raises(RuntimeError, match="takes the reference executor, got backend='cpu'"):
        ProxSGD(parameters(), backend="cpu", **option)


def test_prox_in_place_needs_no_grad(checked_backend):
    """prox_ names the tensor that requires grad."""
    p = parameters()[0]
    with pytest.raises(RuntimeError, match=r"tensors\[1\].*no_grad"):
        prox_([torch.ones(3), p], l1=0.1, backend=checked_backend)
