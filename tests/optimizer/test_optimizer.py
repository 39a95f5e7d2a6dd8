"""What an optimizer does beside its arithmetic: mixed dtypes, autograd's versions, devices, warnings."""

import pytest
import torch
from helpers.steps import PENALTY, assert_same_bits, everything, give_grads, parameters, train
from torch import nn

from cges_kernels import ProxSGD, prox_


def test_bfloat16_and_float64_beside_float32_in_one_optimizer(backend):
    """Parameters get the same bits together with other dtypes as alone."""
    dtypes = (torch.bfloat16, torch.float32, torch.float64, torch.float16)
    params = [p for dtype in dtypes for p in parameters([(6, 5), (4,)], dtype)]
    optimizer = ProxSGD(params, lr=0.1, momentum=0.9, **PENALTY, backend=backend)
    train(optimizer, params, range(4))
    for i, dtype in enumerate(dtypes):
        alone = parameters([(6, 5), (4,)], dtype)
        single = ProxSGD(alone, lr=0.1, momentum=0.9, **PENALTY, backend=backend)
        for step in range(4):
            give_grads([*parameters([()] * 2 * i), *alone], step)
            single.step()
        assert_same_bits([p.detach() for p in params[2 * i : 2 * i + 2]], [p.detach() for p in alone])
        assert all(optimizer.state[p]["momentum_buffer"].dtype == p.dtype for p in params)


def test_step_moves_version_counters(backend):
    """autograd notices that the parameter and its buffer were changed in place."""
    p = parameters([(6, 5)])[0]
    optimizer = ProxSGD([p], lr=0.1, momentum=0.9, backend=backend)
    loss = p.square().sum()
    give_grads([p], 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    buf = optimizer.state[p]["momentum_buffer"]
    version = buf._version
    optimizer.step()
    assert buf._version > version


def test_the_default_device_is_no_concern(backend):
    """A step makes nothing on torch's default device, which is "meta" here."""
    params, others = parameters([(6, 5), (9,)]), parameters([(6, 5), (9,)])
    optimizer, other = (ProxSGD(ps, momentum=0.9, **PENALTY, backend=backend) for ps in (params, others))
    for step in range(2):
        for ps in (params, others):
            give_grads(ps, step)
        with torch.device("meta"):
            optimizer.step()
            prox_([p.detach() for p in params], l1=0.1, backend=backend)
        other.step()
        prox_([p.detach() for p in others], l1=0.1, backend=backend)
    assert_same_bits(everything(optimizer), everything(other))


def test_penalty_is_the_sum_over_the_param_groups(checked_backend):
    """optimizer.penalty() is Omega by each param group's coefficients and spec."""
    params = parameters([(6, 5), (4, 3, 3, 3), (9,)])
    groups = [
        dict(params=params[:1], group_lasso=0.5, group_by="filter"),
        dict(params=params[1:], exclusive_lasso=0.25, l1=0.125),
    ]
    optimizer = ProxSGD(groups, backend=checked_backend)
    w, conv, bias = (p.detach() for p in params)
    wanted = 0.5 * w.square().sum(1).sqrt().sum()
    wanted += 0.25 / 2 * conv.abs().sum(0).square().sum() + 0.125 * (conv.abs().sum() + bias.abs().sum())
    penalty = optimizer.penalty()
    assert penalty.dim() == 0 and not penalty.requires_grad
    torch.testing.assert_close(penalty, wanted)


def test_warns_once_where_sequential_mode_zeroes_too_much(checked_backend, recwarn):
    """One warning at b*n >= 1, naming the value and exact mode, with the caller as its place."""
    params = parameters([(10, 5), (300,)])
    optimizer = ProxSGD(params, lr=0.1, exclusive_lasso=0.99, backend=checked_backend)
    give_grads(params, 0)
    for lr in (0.1, 0.2, 0.3):
        optimizer.param_groups[0]["lr"] = lr
        for _ in range(2):
            optimizer.step()
        assert len(recwarn.list) == (lr > 0.1)  # b*n is 0.99 at first; the bias has no groups
    (warning,) = recwarn.list
    assert "1.98 >= 1" in str(warning.message) and "exact" in str(warning.message)
    assert warning.filename == __file__


def test_exact_mode_does_not_warn(checked_backend, recwarn):
    """The warning is for sequential mode only."""
    params = parameters([(10, 5)])
    optimizer = ProxSGD(params, lr=0.1, exclusive_lasso=9, prox_mode="exact", backend=checked_backend)
    train(optimizer, params, range(2))
    assert not recwarn.list


def test_a_list_changed_in_place_is_noticed(checked_backend):
    """A view given as a list takes effect, and is checked, when it is changed in place."""
    p = nn.Parameter(torch.randn(4, 4))
    p.grad = torch.zeros(4, 4)
    other = nn.Parameter(p.detach().clone())
    other.grad = torch.zeros(4, 4)
    options = dict(lr=1.0, group_lasso=0.1, group_by=(1,), backend=checked_backend)
    optimizer = ProxSGD([p], view=[2, 8], **options)
    optimizer.step()
    other.data.copy_(p.data)
    optimizer.param_groups[0]["view"][:] = [16, 1]
    optimizer.step()
    ProxSGD([other], view=[16, 1], **options).step()
    assert_same_bits([p], [other])
    optimizer.param_groups[0]["view"][:] = [3, 3]
    with pytest.raises(ValueError, match=r"view: expected .* got \(3, 3\)"):
        optimizer.step()
