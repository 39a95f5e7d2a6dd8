"""Steps that autograd records, and learning rates that require a gradient."""

import pytest
import torch
from helpers.right import MODES
from helpers.steps import PENALTY, parameters

from cges_kernels import ProxSGD


@pytest.mark.parametrize("prox_mode", MODES)
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_differentiable_step_has_the_right_gradient(momentum, prox_mode):
    """gradcheck passes for the weights, the gradient and the momentum buffer that the step takes."""
    w, grad, buf = (p.detach().requires_grad_() for p in parameters([(4, 3)] * 3))

    def one_step(w, grad, buf):
        p = w.clone()
        p.grad = grad
        options = dict(lr=0.3, momentum=momentum, weight_decay=0.1, prox_mode=prox_mode, **PENALTY)
        optimizer = ProxSGD([p], differentiable=True, **options)
        if momentum:
            optimizer.state[p]["momentum_buffer"] = buf.clone()
        optimizer.step()
        return p

    assert torch.autograd.gradcheck(one_step, (w, grad, buf))


def test_differentiable_step_has_the_right_gradient_for_a_tensor_lr():
    """The learning rate is in the update and in the thresholds; its gradient has both parts."""
    w, grad = (p.detach() for p in parameters([(4, 3)] * 2))
    lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def one_step(lr):
        p = w.clone()
        p.grad = grad
        ProxSGD([p], lr=lr, differentiable=True, **PENALTY).step()
        return p

    assert torch.autograd.gradcheck(one_step, (lr,))


def test_a_learning_rate_that_requires_grad_is_read_at_each_step():
    """Its present value is used, whether or not the step is differentiable."""
    p, lr = torch.ones(3), torch.tensor(0.5, requires_grad=True)
    for differentiable in (False, True):
        x = p.clone()
        optimizer = ProxSGD([x], lr=lr, backend="reference", differentiable=differentiable)
        for rate in (0.5, 0.25, 0.0):
            with torch.no_grad():
                lr.fill_(rate)
            x.grad = torch.ones(3)
            before = x.detach().clone()
            optimizer.step()
            assert torch.equal(before - x.detach(), torch.full((3,), rate))


@pytest.mark.parametrize("key", ["lr", "group_lasso", "l1"])
def test_a_differentiable_step_checks_tensors_changed_in_place(key):
    """A tensor that became negative is an error."""
    p = torch.ones(4, 4)
    p.grad = torch.ones(4, 4)
    value = torch.tensor(0.1)
    optimizer = ProxSGD([p], differentiable=True, **{"lr": 0.1, key: value})
    optimizer.step()
    value.fill_(-5.0)
    with pytest.raises(ValueError, match="-5"):
        optimizer.step()
