"""Small things that are no error: empty and tiny tensors, and steps with nothing to do."""

import torch
from helpers.refusals import as_bytes, started
from helpers.right import MODES, SPECS
from helpers.tiers import covering
from torch import nn

from cges_kernels import ProxSGD, available_backends, prox, prox_

# No dims, a dim without elements, dims of size 1, and a bias.
TINY = [(), (0,), (1,), (5,), (0, 3), (3, 0), (1, 1), (1, 4), (4, 1), (2, 0, 3, 3)]


@covering(
    shape=TINY,
    group_by=[*SPECS, ()],
    prox_mode=MODES,
    executor=available_backends(),
)
def test_empty_and_tiny_tensors_work(executor, prox_mode, group_by, shape):
    """prox, prox_ and a step agree with formulas by hand.

    These are l1 alone where there are no groups, and the formula for one number where a group is one element.
    """
    w = torch.randn(shape, dtype=torch.float64)
    alpha, beta, gamma = 0.125, 0.25, 0.0625
    options = dict(group_lasso=alpha, exclusive_lasso=beta, l1=gamma, group_by=group_by, prox_mode=prox_mode)
    result = prox(w, **options, backend=executor)
    assert result.shape == w.shape and result.dtype == w.dtype

    u = (w.abs() - gamma).clamp(min=0)
    reduced = {"feature": shape[:1], "filter": shape[1:], "channel": shape[:1] + shape[2:], "tensor": shape}
    one_element_each = all(n == 1 for n in reduced.get(group_by, ()))
    if len(shape) < 2 and group_by != ():
        torch.testing.assert_close(result, u * w.sign())
    elif one_element_each and prox_mode == "exact":
        torch.testing.assert_close(result, (u - alpha).clamp(min=0) / (1 + beta) * w.sign())
    elif one_element_each:
        s = torch.where(u > alpha, 1 - alpha / u, 0.0)
        torch.testing.assert_close(result, s * (u - beta * u) * w.sign())

    in_place = w.clone()
    prox_([in_place], **options, backend=executor)
    assert torch.equal(in_place, result)
    p = nn.Parameter(w.clone())
    p.grad = torch.zeros_like(p)
    ProxSGD([p], lr=1.0, momentum=0.9, **options, backend=executor).step()
    assert torch.equal(p, result)


def test_nothing_to_do_is_no_error(backend):
    """An empty list, a lone tensor and a step without gradients are fine."""
    prox_([], l1=0.1, backend=backend)
    prox_(torch.ones(3), l1=0.1, backend=backend)  # a single tensor instead of a list
    optimizer, params = started(backend)
    before = [as_bytes(p) for p in params]
    optimizer.zero_grad()
    optimizer.step()
    assert [as_bytes(p) for p in params] == before
    assert prox(torch.ones(1, 1), l1=0.5, view=(), backend=backend).item() == 0.5
