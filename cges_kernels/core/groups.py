"""Group specs, which say which entries of a tensor share a norm, and the one layout that all executors use.

A spec names the dimensions that are REDUCED. Weights are `[out, in, *kernel]`:

| spec | reduced | one group is |
|---|---|---|
| "feature" | 0 | one input (in, kh, kw) across all outputs |
| "filter" | 1.. | one output unit or filter |
| "channel" | 0, 2.. | one input channel |
| "tensor" | all | the whole tensor |
| (d0, ...) | those | whatever the user says (of `w.view(view)` if given) |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

GroupSpec: TypeAlias = str | tuple[int, ...]

NAMED_SPECS = ("feature", "filter", "channel", "tensor")


class Layout(NamedTuple):
    """A dense tensor in memory order as (kept K1, reduced R1, kept K2, reduced R2).

    The offset of an element is `((k1*R1 + r1)*K2 + k2)*R2 + r2`, and its group is `k1*K2 + k2`.
    """

    K1: int
    R1: int
    K2: int
    R2: int

    @property
    def num_groups(self) -> int:
        return self.K1 * self.K2

    @property
    def group_size(self) -> int:
        return self.R1 * self.R2


class GroupedLayout(NamedTuple):
    """A Layout as executors take it; `has_groups` says whether the spec makes groups of the tensor."""

    K1: int
    R1: int
    K2: int
    R2: int
    has_groups: bool

    @property
    def layout(self) -> Layout:
        return Layout(self.K1, self.R1, self.K2, self.R2)


def check_spec(group_by: GroupSpec, view: Sequence[int] | None = None) -> None:
    """Raise a ValueError or TypeError unless `group_by` and `view` are well formed."""
    if isinstance(group_by, str):
        if group_by not in NAMED_SPECS:
            raise ValueError(f"group_by: expected one of {NAMED_SPECS} or a tuple of dims, got {group_by!r}")
    elif not isinstance(group_by, (tuple, list)) or not all(_is_int(d) for d in group_by):
        raise TypeError(f"group_by: expected one of {NAMED_SPECS} or a tuple of ints, got {group_by!r}")
    if view is not None and not (isinstance(view, (tuple, list)) and all(_is_int(n) for n in view)):
        raise TypeError(f"view: expected None or a tuple of ints, got {view!r}")


def has_groups(ndim: int, group_by: GroupSpec) -> bool:
    """Whether the group penalties apply to a tensor of `ndim` dims.

    A named spec makes no groups of tensors of fewer than two dims: a bias or a scale would be ONE group.
    """
    return ndim >= 2 or not isinstance(group_by, str)


def reduced_dims(ndim: int, group_by: GroupSpec) -> tuple[int, ...]:
    """The dimensions over which a group runs, ascending, for a tensor of `ndim` dimensions."""
    if group_by == "feature":
        return tuple(range(min(ndim, 1)))
    if group_by == "filter":
        return tuple(range(1, ndim))
    if group_by == "channel":
        return tuple(d for d in range(ndim) if d != 1)
    if group_by == "tensor":
        return tuple(range(ndim))
    check_spec(group_by)
    assert not isinstance(group_by, str)  # check_spec has refused any other name
    if any(not -ndim <= d < ndim for d in group_by):
        raise ValueError(f"group_by: expected dims in [{-ndim}, {ndim}) of a {ndim}-d tensor, got {group_by}")
    dims = sorted(d % ndim for d in group_by)
    if len(set(dims)) != len(dims):
        raise ValueError(f"group_by: expected each dim once, got {group_by} for a {ndim}-d tensor")
    return tuple(dims)


def is_dense(w: Tensor) -> bool:
    """Whether `w` fills its memory without gaps or overlaps, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(w.shape, w.stride(), strict=True) if n != 1):
        if stride != expected:
            return w.numel() == 0
        expected *= size
    return True


def viewed(w: Tensor, view: Sequence[int] | None) -> Tensor:
    """`w.view(view)`, with an error that names both shapes; `w` itself if view is None."""
    if view is None:
        return w
    try:
        return w.view(tuple(view))
    except RuntimeError as error:
        raise ValueError(
            f"view: expected a shape that {tuple(w.shape)} with strides {w.stride()} can be viewed as, "
            f"got {tuple(view)}"
        ) from error


def canonical_layout(w: Tensor, group_by: GroupSpec = "feature", view: Sequence[int] | None = None) -> Layout:
    """The layout of `w` under a spec, in the one form that executors take.

    Dims are taken in memory order (so channels_last costs nothing), those of size 1 are dropped, and
    neighbours of one kind are merged. Where the spec makes no groups (a bias under a named spec), every
    element is its own group.

    Raises:
        ValueError: a tensor that is not dense, or a spec that needs more than four alternating parts.
    """
    if not is_dense(w):
        raise ValueError(
            "expected a dense, non-overlapping tensor (contiguous, channels_last or transposed), "
            f"got shape {tuple(w.shape)} with strides {w.stride()}"
        )
    v = viewed(torch.empty_strided(w.shape, w.stride(), device="meta"), view)
    reduced = reduced_dims(v.dim(), group_by) if has_groups(v.dim(), group_by) else ()
    if v.numel() == 0:
        return Layout(0, 1, 1, 1)
    in_memory = sorted((d for d in range(v.dim()) if v.shape[d] != 1), key=v.stride, reverse=True)

    sizes = [1, 1, 1, 1]  # K1, R1, K2, R2: the even ones are kept, the odd ones reduced
    slot = 0
    for d in in_memory:
        is_reduced = d in reduced
        if slot % 2 != is_reduced:
            slot += 1
        if slot == len(sizes):
            raise ValueError(
                f"group_by={group_by!r} on shape {tuple(v.shape)} with strides {v.stride()}: expected "
                "at most kept, reduced, kept, reduced in memory order; permute it or choose another spec"
            )
        sizes[slot] *= v.shape[d]
    return Layout(*sizes)


def grouped_layout(w: Tensor, group_by: GroupSpec, view: Sequence[int] | None) -> GroupedLayout:
    """The canonical layout, with whether the spec makes groups of the tensor."""
    ndim = len(view) if view is not None else w.dim()
    return GroupedLayout(*canonical_layout(w, group_by, view), has_groups(ndim, group_by))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def to_text(spec: GroupSpec | Sequence[int] | None) -> str:
    """A group spec, view or mode as text, because an operator of torch.library takes no such union of types.

    `from_text` is the inverse.
    """
    if spec is None or isinstance(spec, str):
        return spec or ""
    return "".join([f"{int(x)}," for x in spec]) or ","


def from_text(text: str) -> Any:
    """The value that `to_text` was given: a name, a tuple of numbers, or None."""
    return tuple(int(x) for x in text.split(",") if x) if "," in text else text or None
