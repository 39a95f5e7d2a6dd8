"""The rules for channels, one for each kind of operation (operations.py). Products are in products.py.

A rule takes the notes of the forward pass (`f`) and a call, and notes the channels of the results.
following.py calls the rule whose name is the operation's kind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..core.groups import is_dense
from . import operations as ops
from .beside import Beside, Call
from .channels import ANYBODY, NOBODY, Placed, aligned, varying


def _lead(ids: list[Tensor]) -> Tensor:
    """The ids to join all others to: those that vary along the fewest dims, then with the fewest NOBODYs."""
    return min(ids, key=lambda x: (len(varying(x)), int((x <= NOBODY).sum())))


def shaped(f: Beside, call: Call) -> None:
    """Operations whose values depend on a size alone.

    The result of a `_like` operation has its argument's channels, any other result has ANYBODY.
    """
    func, args, out = call.func, call.args, call.out
    like = args[0] if args and isinstance(args[0], Tensor) and "_like" in ops.name(func) else None
    f.note(out, torch.full([1] * out.dim(), ANYBODY) if like is None else f.ids(like))


def moved(f: Beside, call: Call) -> None:
    """Views, slices, gathers and the like: the same operation moves the integers."""
    func, args, kwargs, out = call.func, call.args, call.kwargs, call.out
    x = args[0]
    ids = f.ids(x)
    indices = ops.tensors(args[1:], kwargs)
    chosen = any(i in f.given for i in indices) and ops.indexed_dims(func, args, kwargs) & set(varying(ids))
    if chosen or any(bool((f.ids(i) > NOBODY).any()) for i in indices):  # other inputs choose other elements
        f.take(func, x, *indices)
        ids = torch.full([1] * x.dim(), NOBODY)
    if not varying(ids):  # the copies of one repeated element have ANYBODY, because their number may change
        value = int(ids.flatten()[0]) if ids.numel() else NOBODY
        repeated = value == NOBODY and ops.name(func) == "expand" and out.numel() > x.numel()
        for y in call.outs:
            f.note(y, torch.full([1] * y.dim(), ANYBODY if repeated else value))
        return
    if ops.name(func) in ops.BY_NUMBERS:
        module, mine = f.stack[-1] if f.stack else "", ids.unique()
        what = "memory" if f.channels.are_loose(mine) else mine.tolist()  # loose ids differ from pass to pass
        text = f"{module} {ops.name(func)} {args[1:]} {kwargs} {what}"
        chooses = "view" not in ops.name(func) and ops.name(func) != "reshape"
        f.channels.by_numbers.append(Placed(module, text, mine, chooses))
    rest, named = tree_map(lambda i: i.cpu() if isinstance(i, Tensor) else i, (args[1:], kwargs))
    moved = ops.on_ids(func)(ids.expand(x.shape), *rest, **named)
    for y, line in zip(call.outs, moved if isinstance(out, (list, tuple)) else [moved]):
        f.note(y, line)


def turned(f: Beside, call: Call) -> None:
    """Operations that move dims in place. The channels from before the call are moved the same way."""
    f.note(call.out, getattr(torch.ops.aten, ops.name(call.func)[:-1])(call.before, *call.args[1:]))


def pointwise(f: Beside, call: Call) -> None:
    """Elementwise operations: channels of elements that are combined are joined."""
    func, args, kwargs, *_ = call
    meet(f, func, ops.tensors(args, kwargs), call.outs[0], written=args[0] if ops.writes(func) else None)


def meet(f: Beside, func: Any, given: list[Tensor], out: Any, written: Any = None) -> None:
    """Join the channels of elements that are combined, with broadcasting, and note them for `out`.

    `written` is the argument that the operation writes to, if it writes to one.
    """
    dims = max((x.dim() for x in given), default=0)
    if written is not None and bool((f.ids(written) == ANYBODY).all()):
        _give_lines(f, written, [f.ids(x) for x in given if x is not written])
    known = [(x, f.ids(x)) for x in given]
    known = [(x, ids.reshape(aligned(ids.shape, dims))) for x, ids in known]
    varied = {dim for _, ids in known for dim in varying(ids)}
    real = []
    for x, ids in known:
        sizes = aligned(x.shape, dims)
        free = bool((ids == ANYBODY).all()) or (
            bool((ids == NOBODY).all()) and all(sizes[dim] == 1 for dim in varied)
        )
        if not free:
            real.append(ids.clamp(min=NOBODY))
    if not real:
        anybody = bool(known) and all(bool((ids == ANYBODY).all()) for _, ids in known)
        return f.note(out, torch.full([1] * out.dim(), ANYBODY if anybody else NOBODY))
    fixed = [ids for ids in real if not f.channels.are_loose(ids) and bool((ids > NOBODY).any())]
    lead = _lead(fixed or real)
    for ids in real:
        if ids is not lead:
            why = f"in {f.where(ops.name(func))} they meet what cannot be cut"
            f.channels.join(lead, ids, why)
    f.note(out, lead)


def _give_lines(f: Beside, x: Tensor, by: list[Tensor]) -> None:
    """Called before an in-place write to `x`: gives channels to the tensor of which `x` is a view.

    Each line gets its own channel, along the dim in which the channels of the written values vary.
    """
    whole = x if x._base is None else x._base
    if x.numel() == 1 or whole.dim() != x.dim() or not is_dense(whole):
        return
    dims = [dim + x.dim() - ids.dim() for ids in by for dim in varying(ids)]
    dim = dims[0] if dims else min(1, x.dim() - 1)
    lines = f.channels.new_loose(whole.shape[dim]).expand(whole.shape[dim])
    shape = [1] * dim + [len(lines)] + [1] * (x.dim() - dim - 1)
    elements = torch.empty_strided(whole.shape, whole.stride(), dtype=torch.long)
    elements.copy_(lines.reshape(shape).expand(whole.shape))
    f.written[whole.untyped_storage()._cdata] = whole, elements


def joined(f: Beside, call: Call) -> None:
    """cat and stack. Along dims other than the joined one, the pieces' channels are joined."""
    func, args, kwargs, out = call.func, call.args, call.kwargs, call.out
    dim = ops.bound(func, args, kwargs).get("dim", 0) % out.dim()
    pieces = [x for x in args[0] if x.dim() == args[0][-1].dim() and x.numel()]
    known = [(f.ids(x), x.shape) for x in pieces]
    if ops.name(func) == "stack":
        known = [(ids.unsqueeze(dim), (*s[:dim], 1, *s[dim:])) for ids, s in known]
    across = [ids for ids, _ in known if any(d != dim for d in varying(ids))]
    fixed = [ids for ids in across if not f.channels.are_loose(ids)]
    if not fixed:
        f.note(out, torch.cat([ids.expand(shape) for ids, shape in known], dim))
        return
    lead = _lead(fixed)
    dims = {d for ids in across for d in varying(ids)}
    for ids, shape in known:
        broadcasts = all(shape[d] == 1 for d in dims if d != dim)
        if ids is not lead and not (broadcasts and bool((ids == NOBODY).all())):
            f.channels.join(lead, ids, f"in {f.where('cat')} they meet what cannot be cut")
    f.note(out, lead.narrow(dim, 0, 1))


def padded(f: Beside, call: Call) -> None:
    """Padding with a constant: elements that are added along a dim of channels have NOBODY."""
    args, out = call.args, call.out
    ids = f.ids(args[0])
    sides = list(args[1])
    for i in range(len(sides) // 2):
        if ids.shape[-1 - i] == 1:
            sides[2 * i : 2 * i + 2] = 0, 0  # along this dim the padding belongs to the channel inside
    f.note(out, torch.constant_pad_nd(ids, sides, NOBODY))


def packed(f: Beside, call: Call) -> None:
    """Packing of padded sequences, which makes one dim of the batch and the length."""
    ids = f.ids(call.args[0])
    if any(dim < 2 for dim in varying(ids)):
        return f.take_all(call)
    f.note(call.outs[0], ids[0])


def spatial(f: Beside, call: Call) -> None:
    """Pooling, interpolation and padding by reflection or replication, which act on the last dims alone."""
    func, args = call.func, call.args
    ids = f.ids(args[0])
    if any(dim >= ids.dim() - ops.spatial_dims(func) for dim in varying(ids)):
        return f.take_all(call)
    for y in call.outs:
        f.note(y, ids)


def reduced(f: Beside, call: Call) -> None:
    """Sums, softmax, sorting and the like: channels are passed on unless the operation combines them."""
    func, args, kwargs = call.func, call.args, call.kwargs
    x = args[0]
    ids = f.ids(x)
    over = ops.reduced_dims(func, args, kwargs)
    if any(dim in over for dim in varying(ids)):
        return f.take_all(call)
    for y in call.outs:
        kept = [d for d in range(x.dim()) if d not in over or y.dim() == x.dim()]
        f.note(y, ids.reshape([ids.shape[d] for d in kept]))


def layer_normed(f: Beside, call: Call) -> None:
    """Layer norm: channels are passed on unless it normalises over them."""
    args, out = call.args, call.out
    ids = f.ids(args[0])
    if any(dim >= ids.dim() - len(args[1]) for dim in varying(ids)):
        return f.take_all(call)
    f.note(out[0], ids)


def batch_normed(f: Beside, call: Call) -> None:
    """Batch norm: its parameters and statistics are joined to the channels of its input."""
    func, args = call.func, call.args
    x, *others = args
    if f.channels.are_loose(f.ids(x)):  # the input is a parameter, so that a weight is being computed
        return f.take_all(call)
    line = f.line(func, x, 1)
    for other in others:
        if isinstance(other, Tensor):
            f.channels.join(line, f.ids(other), "their batch norm is of what cannot be cut")
    f.note(call.outs[0], f.ids(x))


def halved(f: Beside, call: Call) -> None:
    """glu multiplies one half of its input by a function of the other half, so their channels are joined."""
    func, args, kwargs, out = call.func, call.args, call.kwargs, call.out
    dim = ops.bound(func, args, kwargs).get("dim", -1) % args[0].dim()
    ids = f.ids(args[0])
    if dim in varying(ids):
        ids, other = ids.chunk(2, dim)
        f.channels.join(ids, other)
    f.note(out, ids)
