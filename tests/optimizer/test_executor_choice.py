"""Which executor serves a param group: by its options, its parameters and its gradients."""

from functools import partial

import pytest
import torch
from helpers.steps import (
    FASTEST,
    PENALTY,
    assert_as_near_as,
    assert_same_bits,
    needs_cpu,
    parameters,
    train,
)
from torch import nn
from torch.optim import SGD
from torch.testing._internal.two_tensor import TwoTensor

from cges_kernels import ProxSGD, available_backends, prox

# (options, the executor that serves them)
SERVED_BY = [
    (dict(), FASTEST),
    (dict(fused=None), FASTEST),
    (dict(fused=True), "cpu"),
    (dict(fused=True, backend="cpu"), "cpu"),
    (dict(backend="cpu"), "cpu"),
    (dict(fused=False), "reference"),
    (dict(foreach=True), "reference"),
    (dict(foreach=False), FASTEST),
    (dict(differentiable=True), "reference"),
    (dict(backend="reference"), "reference"),
    (dict(backend="reference", foreach=True), "reference"),
]


@pytest.mark.parametrize("options,executor", SERVED_BY, ids=str)
def test_options_select_the_executor(options, executor):
    """Flags that a compiled executor cannot serve take the reference; otherwise the fastest serves."""
    if executor not in available_backends():
        pytest.skip("the C++ extension is not built")
    params = parameters()
    optimizer = ProxSGD(params, **options)
    if options.get("differentiable"):
        params = optimizer.param_groups[0]["params"] = [p.detach() for p in params]
    train(optimizer, params, range(1))
    assert optimizer._planner.executors == [executor]


@needs_cpu
def test_param_groups_select_the_executor_each_and_may_change_their_mind():
    """Each param group has its own executor, and a flag changed between steps changes it."""
    params = parameters()
    groups = [{"params": params[:2]}, {"params": params[2:4], "foreach": True}, {"params": params[4:]}]
    optimizer = ProxSGD(groups, lr=0.1, momentum=0.9, **PENALTY)
    other = parameters()
    reference = ProxSGD(other, lr=0.1, momentum=0.9, **PENALTY, backend="reference")
    for steps, changed, executors in (
        (range(3), {}, ["cpu", "reference", "cpu"]),
        (range(3, 6), {"foreach": False}, ["cpu", "cpu", "cpu"]),
        (range(6, 9), {"fused": False}, ["cpu", "reference", "cpu"]),
    ):
        optimizer.param_groups[1].update(changed)
        train(optimizer, params, steps)
        train(reference, other, steps)
        assert optimizer._planner.executors == executors
    assert_as_near_as("cpu", [p.detach() for p in params], [p.detach() for p in other])


def test_param_group_without_parameters_has_an_executor_that_is_there():
    """An empty param group is given an executor that can run here."""
    params = parameters()
    optimizer = ProxSGD([{"params": []}, {"params": params}])
    train(optimizer, params, range(1))
    assert set(optimizer._planner.executors) <= set(available_backends())


@needs_cpu
def test_a_replaced_parameter_may_need_another_executor():
    """A wrapped tensor put into a param group is stepped correctly, by the reference.

    FSDP2 and accelerate replace parameters in this way, and only the reference serves wrapped tensors.
    """
    params = [nn.Parameter(torch.randn(6, 5)) for _ in range(2)]
    optimizer = ProxSGD([{"params": [p]} for p in params], lr=0.1, l1=0.01)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert set(optimizer._planner.executors) == {"cpu"}
    plain = params[0].detach().clone()
    wrapped = nn.Parameter(TwoTensor(plain.clone(), plain.clone()))
    wrapped.grad = TwoTensor(torch.ones(6, 5), torch.ones(6, 5))
    optimizer.param_groups[0]["params"][0] = wrapped
    optimizer.step()
    assert optimizer._planner.executors == ["reference", "cpu"]
    torch.testing.assert_close(wrapped.a.detach(), prox(plain - 0.1, l1=0.001))


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("declared", [torch.float32, None])
def test_gradients_of_another_dtype_are_stepped_as_in_torch(momentum, declared):
    """float32 gradients of bfloat16 parameters give torch's bits, by the reference."""

    def trained(make):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(5, 3, dtype=torch.bfloat16))
        p.grad_dtype = declared
        p.grad = torch.randn(5, 3)
        optimizer = make([p], lr=0.1, momentum=momentum, weight_decay=0.01)
        for _ in range(3):
            optimizer.step()
            p.grad = torch.randn(5, 3)
        return p, optimizer

    (p, ours), (q, theirs) = trained(ProxSGD), trained(partial(SGD, foreach=False))
    assert_same_bits([p], [q])
    assert ours._planner.executors == ["reference"]
    if momentum:
        assert_same_bits([ours.state[p]["momentum_buffer"]], [theirs.state[q]["momentum_buffer"]])
    (p, _), (q, _) = trained(partial(ProxSGD, group_lasso=100.0)), trained(partial(ProxSGD, l1=3.0))
    assert not p.any() and (q == 0).any() and q.any()


@pytest.mark.parametrize("options", [dict(), dict(fused=True)])
def test_a_gradient_of_another_dtype_may_come_later(options):
    """The step that first meets such a gradient takes the reference, or refuses with fused=True."""
    p, q = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    q.grad_dtype = None
    optimizer = ProxSGD([p, q], lr=0.1, momentum=0.9, backend="auto", **options)
    p.grad = torch.ones(4, 4)
    optimizer.step()
    q.grad = torch.ones(4, 4, dtype=torch.bfloat16)
    if options:
        with pytest.raises(
            RuntimeError, match=r"fused=True cannot .*\[1\]: expected a gradient of its own dtype"
        ):
            optimizer.step()
        return
    optimizer.step()
    assert optimizer._planner.executors == ["reference"] and (q == 0.9).all()
    q.grad = torch.ones(4, 4)
    optimizer.state[q]["momentum_buffer"] = optimizer.state[q]["momentum_buffer"].float()
    optimizer.step()
    assert optimizer._planner.executors != ["reference"]
