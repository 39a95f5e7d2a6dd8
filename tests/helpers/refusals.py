"""Bad input in the middle of training: the optimizer refuses it, writes nothing, and goes on afterwards."""

import contextlib

import pytest
import torch
from helpers import steps

from cges_kernels import ProxSGD

SHAPES = [(4, 3), (5, 2, 3, 3), (6,)]
OPTIONS = dict(lr=0.1, momentum=0.9, group_lasso=0.1, exclusive_lasso=0.01, l1=0.01)


def parameters(seed=0, dtype=torch.float32):
    return steps.parameters(SHAPES, dtype, seed)


def started(backend, **options):
    """An optimizer in the middle of training: it has momentum buffers and the gradients of its next step."""
    params = parameters()
    optimizer = ProxSGD(params, **{**OPTIONS, **options}, backend=backend)
    steps.give_grads(params, 0)
    optimizer.step()
    steps.give_grads(params, 1)
    return optimizer, params


def as_bytes(x):
    """A tensor's bits, dtype and strides, to compare; the repr of anything else."""
    if not isinstance(x, torch.Tensor):
        return repr(x)
    if x.layout != torch.strided or x.device.type == "meta":
        return str(x)
    x = x.detach()
    return x.dtype, x.shape, x.stride(), x.resolve_neg().contiguous().flatten().view(torch.uint8).tolist()


def snapshot(optimizer):
    """Everything that a refused step must leave unchanged, to compare."""
    groups = [{k: repr(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    buffers = {id(p): {k: as_bytes(v) for k, v in s.items()} for p, s in optimizer.state.items() if s}
    return groups, [(id(p), as_bytes(p), as_bytes(p.grad)) for p in params], buffers


@contextlib.contextmanager
def rejected(optimizer, error, *words):
    """Expects an ``error`` that matches each of ``words`` (regular expressions), and nothing written."""
    before = snapshot(optimizer)
    with pytest.raises(error) as caught:
        yield
    for word in words:
        caught.match(word)
    assert snapshot(optimizer) == before


def assert_recovers(optimizer, params, backend, **options):
    """Once the cause is gone, the next step gives the bits of an optimizer that never failed."""
    twin, others = started(backend, **options)
    optimizer.step()
    twin.step()
    assert [as_bytes(p) for p in params] == [as_bytes(p) for p in others]
