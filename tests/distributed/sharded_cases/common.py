"""What the cases share: their table, parameters placed on meshes, and steps judged by the reference.

The other files hold the cases, one subject each. Meshes are of torch's default device.
"""

import traceback
from collections.abc import Callable
from functools import cache
from unittest import mock

import torch
import torch.distributed as dist
from helpers.right import assert_right, threshold_margin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from cges_kernels import ProxSGD
from cges_kernels.core import reference

R, S = Replicate(), Shard
# Uneven shards, and empty ones where there are fewer rows than ranks; one tap per rank; a single row; a bias.
SHAPES = ((7, 5, 3, 3), (3, 8), (16, 12), (1, 6, 2), (5,))
STRONG = dict(lr=0.1, momentum=0.9, weight_decay=0.01, group_lasso=12.0, exclusive_lasso=0.1, l1=0.5)
# {number of ranks: {name: case}}. Each rank runs its cases in this order.
CASES: dict[int, dict[str, Callable[[], None]]] = {1: {}, 2: {}, 4: {}}


def case(*worlds):
    """Adds a case for these numbers of ranks."""

    def add(function):
        for world in worlds:
            CASES[world][function.__name__.replace("_", "-")] = function
        return function

    return add


def device():
    return torch.get_default_device().type


@cache
def mesh_of(*shape):
    return init_device_mesh(device(), shape, mesh_dim_names=tuple("abc"[: len(shape)]))


def placed(x, mesh, placements):
    """A DTensor of ``x``, which all ranks have. Placements on dims that it lacks become replicas."""
    placements = [R if getattr(p, "dim", 0) >= x.dim() else p for p in placements]
    return distribute_tensor(x.clone(), mesh, placements, src_data_rank=None)


def local(x):
    """This rank's part."""
    with torch.no_grad():
        return x.to_local() if isinstance(x, DTensor) else x


def whole(x):
    """The unsharded tensor."""
    if isinstance(x, DTensor) and device() == "cuda" and dist.get_backend() == "gloo":
        return all_whole([x])[0]  # gloo may not be able to gather CUDA tensors
    return x.full_tensor().clone() if isinstance(x, DTensor) else x.clone()


@cache
def indices(shape, mesh, placements):
    """The elements of a tensor that this rank holds."""
    return local(placed(torch.arange(shape.numel()).view(shape), mesh, placements)).flatten()


def all_whole(tensors):
    """``whole`` of each, by one collective. Ranks that hold the same element must hold the same bits."""
    full = [torch.full((x.numel(),), -torch.inf, dtype=torch.float64) for x in tensors]
    for x, elements in zip(tensors, full):
        elements[indices(x.shape, x.device_mesh, x.placements)] = local(x).detach().flatten().double()
    packed = torch.cat(full)
    dist.all_reduce(packed, dist.ReduceOp.MAX)
    result = [
        e.view(x.shape).to(x.dtype) for x, e in zip(tensors, packed.split([x.numel() for x in tensors]))
    ]
    for x, w in zip(tensors, result):
        assert torch.equal(w.flatten()[indices(x.shape, x.device_mesh, x.placements)], local(x).flatten())
    return result


def buffer(optimizer, p):
    """The parameter's momentum buffer, if it has one."""
    return optimizer.state.get(p, {}).get("momentum_buffer")


def parameters(mesh, placements, dtype=torch.float32, shapes=SHAPES):
    """Random parameters of these shapes, with gradients."""
    params = [nn.Parameter(placed(torch.randn(n).to(dtype), mesh, placements)) for n in shapes]
    give_gradients(params)
    return params


def give_gradients(params):
    """Gives new gradients; returns them unsharded."""
    grads = [torch.randn(p.shape).to(p.dtype) for p in params]
    for p, grad in zip(params, grads):
        p.grad = placed(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
    return grads


def check_steps(params, steps=2, checker=0, **options):
    """Checks steps as those of an executor, zeros included; each is judged from what the one before left.

    The rule, twice the error of the same formulas, is meant for large samples. A few groups may by luck have
    sums without an error. So these formulas are taken to err by at least two roundings of the largest weight.
    One rank, ``checker``, checks for all. Returns the number of zeros.
    """
    optimizer, seen = ProxSGD(params, **options), []
    weights, buffers = all_whole(params), [None] * len(params)
    for _ in range(steps):
        inputs = list(zip(weights, give_gradients(params), buffers))
        optimizer.step()
        weights = all_whole(params)
        if options["momentum"] != 0:
            new = [buffer(optimizer, p) for p in params]
            assert all(buf.placements == p.placements for p, buf in zip(params, new))
            buffers = all_whole(new)
        seen += [(*x, w, buf) for x, w, buf in zip(inputs, weights, buffers)]

    def check():
        rows, buffer_rows = [], []
        for *x, w, buf in seen:
            truth, truth_buf = reference.step(*x, accumulate=torch.float64, **options)
            same, same_buf = reference.step(*x, accumulate=torch.float32, **options)
            least = 2 * torch.finfo(torch.float32).eps * x[0].abs().max().double()
            same = torch.where((same - truth).abs() < least, truth + least, same.double())
            rows.append((w, truth, same, threshold_margin(*x, **options)))
            if buf is not None:
                buffer_rows.append((buf + 0.0, truth_buf, same_buf, torch.zeros_like(truth_buf)))
        for columns in (zip(*table) for table in (rows, buffer_rows) if table):
            assert_right(
                *(torch.cat([x.flatten().cpu() for x in column]) for column in columns), params[0].dtype
            )

    together(check if dist.get_rank() == checker % dist.get_world_size() else lambda: None)
    return sum(int((w == 0).sum()) for *_, w, _ in seen)


def gathered(x):
    """What each rank has, as a list on every rank."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, x)
    return everyone


def together(function):
    """Calls it. An error on one rank is raised on all, so that none waits for a rank that has failed."""
    error = None
    try:
        function()
    except Exception:
        error = traceback.format_exc()
    if errors := list(filter(None, gathered(error))):
        raise AssertionError("\n".join(errors))


class counted:
    """Within it, a list of the numbers of elements that dist.all_reduce is called with."""

    def __enter__(self):
        self.sizes, all_reduce = [], dist.all_reduce

        def counting(tensor, *args, **kwargs):
            self.sizes.append(tensor.numel())
            return all_reduce(tensor, *args, **kwargs)

        self.patch = mock.patch.object(dist, "all_reduce", counting)
        self.patch.__enter__()
        return self.sizes

    def __exit__(self, *error):
        self.patch.__exit__(*error)


def raised(kind, function):
    """The text of the error that ``function`` has to raise."""
    try:
        function()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")
