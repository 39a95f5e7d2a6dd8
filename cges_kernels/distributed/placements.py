"""Finds the part of a DTensor that a rank holds, and translates group specs for that part.

ShardedPlan (sharded.py) uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm, prod
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from ..core.groups import viewed

SHARDED = (Shard, _StridedShard)


def local_part(x: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, ready to be read; call this under no_grad."""
    local = x._local_tensor if isinstance(x, DTensor) else x  # to_local() would wrap it for autograd
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def placed_alike(p: DTensor, x: DTensor) -> bool:
    """Whether every rank holds the same part of both tensors."""
    mine, its = p._spec, x._spec
    if mine is its or (mine.mesh == its.mesh and mine.placements == its.placements):
        return True
    return p.device_mesh == x.device_mesh and all(
        mine == its or p.device_mesh.size(m) == 1  # on one rank all placements mean the same
        for m, (mine, its) in enumerate(zip(p.placements, x.placements))
    )


def is_companion(x: Any, p: DTensor, local: Tensor) -> TypeGuard[DTensor]:
    """Whether `x` passes every check of a gradient or buffer of `p`, whose local part is `local`.

    This is a quick test of the usual case. After False, checked_inputs and local_companion decide, and raise
    the errors.
    """
    return (
        type(x) is DTensor
        and x.shape == p.shape
        and x.dtype == p.dtype
        and x.device == p.device
        and x.layout == torch.strided
        and placed_alike(p, x)
        and type(x._local_tensor) is Tensor
        and x._local_tensor.shape == local.shape
    )


def local_companion(what: str, name: str, p: Tensor, x: Tensor) -> Tensor:
    """The local part of a gradient or buffer `x` of `p`.

    Raises:
        RuntimeError: it is distributed otherwise than p. An optimizer should not redistribute it unasked.
    """
    if not isinstance(p, DTensor):
        return x
    if not isinstance(x, DTensor):
        raise RuntimeError(
            f"{name}: expected a {what} with placements {p.placements}, got a plain {type(x).__name__}; "
            "torch.distributed.tensor.distribute_tensor makes one"
        )
    mine, its = local_part(p), local_part(x)
    if not placed_alike(p, x) or its.shape != mine.shape:
        raise RuntimeError(
            f"{name}: expected a {what} with placements {p.placements}, shape {tuple(mine.shape)} here, on "
            f"{p.device_mesh}, got {x.placements}, {tuple(its.shape)}, on {x.device_mesh}; bring it there by "
            f"x.redistribute(placements=p.placements) before the step"
        )
    return its


def sharded_dims(name: str, p: DTensor) -> list[int]:
    """The dims of `p` that are sharded, ascending.

    Raises:
        ValueError: another placement than Shard and Replicate, or a mesh that this rank is not in.
    """
    if p.device_mesh.get_coordinate() is None:
        raise ValueError(f"{name}: expected a mesh that this rank is in, got {p.device_mesh}")
    for placement in p.placements:
        if not isinstance(placement, (*SHARDED, Replicate)):
            raise ValueError(f"{name}: expected placements of Shard and Replicate, got {p.placements}")
    return sorted({x.dim for x in p.placements if isinstance(x, SHARDED)})


def _pieces(p: DTensor, d: int) -> int:
    """Into how many equal pieces sharding cuts dim `d`, if it divides evenly; a rank may hold several."""
    pieces = ranks = 1
    for m, placement in enumerate(p.placements):
        if getattr(placement, "dim", None) == d:
            size = p.device_mesh.size(m)
            pieces = lcm(pieces, ranks * size * getattr(placement, "split_factor", 1))
            ranks *= size
    return pieces


def local_view(
    name: str, p: DTensor, local: Tensor, view: Sequence[int]
) -> tuple[tuple[int, ...], dict[int, int]]:
    """The part of `p.view(view)` that this rank holds: its shape, and the dim that each sharded dim became.

    A sharded dim of p must begin where a dim of the view begins, and a shard must hold whole slices of that
    dim. This is the case if the view keeps the dim, merges it with the dims after it, or splits it into a
    first part that divides by the number of shards.

    Raises:
        ValueError: the view does none of these; every rank raises it.
    """
    whole = viewed(torch.empty_strided(p.shape, p.stride(), device="meta"), view).shape
    shape, became = list(whole), {}
    for d in sharded_dims(name, p) if p.numel() else ():
        n = p.shape[d]
        starts = (j for j in range(len(whole)) if prod(whole[:j]) == prod(p.shape[:d]))
        j = next((j for j in starts if whole[j] > 1 or n == 1), None)
        if j is None or not (
            n == 1
            or prod(p.shape[d + 1 :]) % prod(whole[j + 1 :]) == 0
            or (n % _pieces(p, d) == 0 and whole[j] % _pieces(p, d) == 0)
        ):
            raise ValueError(
                f"{name}: view={tuple(view)} of shape {tuple(p.shape)}: expected shards that hold whole "
                f"slices of a dim of the view, got placements {p.placements} on a mesh of shape "
                f"{tuple(p.device_mesh.shape)}; shard a dim that the view keeps or splits evenly, or none"
            )
        shape[j] = shape[j] * local.shape[d] // n
        became[d] = j
    return tuple(shape), became


def crossed_mesh_dims(p: DTensor, became: dict[int, int], reduced: Sequence[int]) -> tuple[int, ...]:
    """The dims of the mesh along which ranks share groups; `became` is local_view's."""
    return tuple(
        m
        for m, placement in enumerate(p.placements)
        if isinstance(placement, SHARDED)
        and p.device_mesh.size(m) > 1
        and p.shape[placement.dim] > 1  # a dim of size 1 is held by one rank
        and became.get(placement.dim, -1) in reduced
    )


def copied_mesh_dims(p: DTensor) -> tuple[int, ...]:
    """The dims of the mesh along which ranks hold replicas."""
    return tuple(
        m
        for m, placement in enumerate(p.placements)
        if isinstance(placement, Replicate) and p.device_mesh.size(m) > 1
    )
