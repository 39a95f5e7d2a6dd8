"""The operators of torch.library that torch.compile sees, and the functions that become them."""

import pytest
import torch
from helpers.compiled import COMPILES, PENALTY, SGD, SHAPES
from helpers.right import device_of

from cges_kernels import penalty, prox, prox_
from cges_kernels.backends.operators import OPTIONS, numbers_of
from cges_kernels.backends.planner import SCALARS
from cges_kernels.core.rules import SGD as RULE

pytestmark = COMPILES


def sample_step(backend, momentum=0.9, sources=True):
    """Arguments of the step's operator, with two param groups of which the second has no momentum."""
    device = device_of(backend)
    params = [torch.randn(shape, device=device) for shape in SHAPES]
    numbers = [dict(RULE.options) | SGD | PENALTY | dict(momentum=m) for m in (momentum, 0.0)]
    given = [torch.tensor(x[k], device=device) if sources else None for x in numbers for k in SCALARS]
    options = {
        "backend": backend,
        "fused": "",
        "group_by": "feature",
        "view": "",
        "prox_mode": "exact",
        "freeze_zeros": "",
    }
    return (
        params,
        [torch.randn_like(p) for p in params],
        [torch.randn_like(p) for p in params[:2]] if momentum else [],
        [],
        [False, False] if momentum else [],
        [0, 0, 1],
        RULE.name,
        [x for group in numbers for x in numbers_of(RULE, group)],
        given,
        [options[k] for k in OPTIONS] * 2,
    )


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_opcheck_of_the_step(checked_backend, momentum):
    """torch.library.opcheck accepts the schema, the fake implementation and the declared mutations."""
    torch.library.opcheck(torch.ops.cges_kernels.step_.default, sample_step(checked_backend, momentum))
    scaler = {"grad_scale": torch.full((1,), 8.0), "found_inf": torch.zeros(1)}
    args = sample_step(checked_backend, momentum, sources=False)
    torch.library.opcheck(torch.ops.cges_kernels.step_.default, args, scaler)


def test_opcheck_of_the_proximal_map(checked_backend):
    """The same for the operator of prox_."""
    tensors = [torch.randn(shape) for shape in SHAPES]
    args = (tensors, 0.3, 0.05, 0.1, "feature", None, "exact", checked_backend)
    torch.library.opcheck(torch.ops.cges_kernels.prox_.default, args)


def test_the_operator_itself_moves_versions_on(checked_backend):
    """The operator bumps the versions of all tensors that it writes."""
    args = sample_step(checked_backend)
    written = [*args[0], *args[2]]
    before = [x._version for x in written]
    torch.ops.cges_kernels.step_(*args)
    assert all(x._version > version for x, version in zip(written, before))


def test_the_proximal_map_compiles(checked_backend):
    """prox and prox_ within a compiled function give their usual bits."""
    w = torch.randn(9, 7)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(w):
        shrunk = prox(w * 2, **PENALTY, backend=checked_backend)
        prox_([shrunk], l1=0.05, backend=checked_backend)
        return shrunk + 1

    expected = prox(w * 2, **PENALTY, backend=checked_backend)
    prox_([expected], l1=0.05, backend=checked_backend)
    assert torch.equal(f(w), expected + 1) and (expected == 0).any()


def test_the_penalty_compiles():
    """The gradient of a compiled penalty is the plain one."""
    w = torch.randn(9, 7, requires_grad=True)
    gradients = []
    for f in (penalty, torch.compile(penalty, fullgraph=True, backend="aot_eager")):
        gradients += torch.autograd.grad(f(w, **PENALTY), w)
    torch.testing.assert_close(*gradients)


def test_the_exact_proximal_map_compiles_with_gradients():
    """So is the gradient of a compiled prox in exact mode."""
    w = torch.randn(9, 7, requires_grad=True)
    options = dict(PENALTY, prox_mode="exact")
    compiled = torch.compile(prox, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(f(w, **options).square().sum(), w)[0] for f in (prox, compiled)]
    torch.testing.assert_close(*gradients)
