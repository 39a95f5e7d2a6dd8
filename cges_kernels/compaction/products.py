"""Rules for products with a weight: they read the channels of one dim and make those of the other.

following.py calls them, as it does those of rules.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import operations as ops
from .beside import Beside, Call
from .channels import NOBODY, aligned, varying
from .rules import meet

ALSO_FIXED = "what reads them also reads what cannot be cut"


def embedded(f: Beside, call: Call) -> None:
    """An embedding, or a bag of them: each column of the table makes a channel."""
    args, out = call.args, call.outs[0]
    if (name := f.owners.whole(args[0])) is None:
        return f.take_all(call)
    made = f.channels.use(name, args[0], makes=1).ids[1]
    f.note(out, made.reshape(aligned(made.shape, out.dim())))


def convolved(f: Beside, call: Call) -> None:
    """A convolution. The channels that one of its groups reads and makes can only be removed together."""
    func, args, out = call.func, call.args, call.out
    x, w, bias = args[:3]
    transposed, groups = bool(args[6]), args[8]
    if (name := f.owners.whole(w)) is None:
        return f.take_all(call)
    line = f.line(func, x, 1)
    if groups == 1:
        read, make = (0, 1) if transposed else (1, 0)
        weight = f.channels.use(name, w, reads=read, makes=make)
        f.channels.join(line, weight.ids[read], ALSO_FIXED)
        made = weight.ids[make]
    elif not transposed or (groups == len(line) and w.shape[1] == 1):
        made = f.channels.use(name, w, makes=0).ids[0]
        blocks = made.reshape(groups, -1)
        for ids in (line, made):
            f.channels.join(blocks[:, :1], ids.reshape(groups, -1), ALSO_FIXED)
        if groups < len(line):
            f.channels.tied.append((made, f"{f.where('convolution')} works in {groups} groups"))
    else:
        f.channels.use(name, w)
        f.channels.hold(line, f"{f.where('convolution')} works in {groups} groups", read=True)
        made = torch.full((out.shape[1],), NOBODY)
    if isinstance(bias, Tensor):
        f.channels.join(made, f.ids(bias))
    f.note(out, made.reshape(1, -1, *[1] * (out.dim() - 2)))


def multiplied(f: Beside, call: Call) -> None:
    """mm and bmm, also with an addition (addmm, baddbmm): [..., n, k] times [..., k, m]."""
    func, args, out = call.func, call.args, call.out
    *added, a, b = args[: 3 if ops.name(func) in ("addmm", "baddbmm") else 2]
    if part := f.owners.part(b):
        ids = _read(f, func, part, a, -1, b.shape[-1])
        made = ids.reshape(aligned(ids.shape, out.dim()))
    elif part := f.owners.part(a):
        ids = _read(f, func, (part[0], part[1][::-1]), b, -2, a.shape[-2])
        made = ids.reshape(aligned((len(ids), 1), out.dim()))
    elif f.is_owners(a) or f.is_owners(b):
        return f.take_all(call)
    else:
        made = _contracted(f, func, a, b)
    f.note(out, made)
    if added:
        meet(f, func, [*added, out], out)


def _read(
    f: Beside, func: Any, part: tuple[str, list[tuple[int, int]]], x: Tensor, dim: int, count: int
) -> Tensor:
    """Let a weight, or a part of it, read `x` along `dim`; returns the channels that it makes."""
    name, ((read, first), (make, start)) = part
    line = f.line(func, x, dim)
    ids = f.channels.use(name, f.owners.tensors[name], reads=read, makes=make).ids
    f.channels.join(line, ids[read][first : first + len(line)], ALSO_FIXED)
    return ids[make][start : start + count]


def _contracted(f: Beside, func: Any, a: Tensor, b: Tensor) -> Tensor:
    """The channels of a product of two activations: those of the rows of `a` or of the columns of `b`."""
    passed = []
    for x, dim in ((a, a.dim() - 2), (b, b.dim() - 1)):
        ids = f.ids(x)
        if varying(ids) != [dim]:  # channels that do not vary at all pass along no dim either
            f.take(func, x)
        else:
            passed.append((x, ids))
    if len(passed) == 1:
        return passed[0][1]
    f.take(func, *(x for x, _ in passed))
    return torch.full([1] * a.dim(), NOBODY)
