"""What a param group's penalty removes from a weight: the order in which it would, and a cut in that order.

TargetDensity (target_density.py) keeps the penalty from shrinking weights too fast by it, and ends with the
cut. A strength is a multiple of the full coefficients, step size included: the prox of strength s does what
s/lr steps at full coefficients would do to a weight that no gradient holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..core.groups import has_groups, reduced_dims, viewed
from ..core.hyperparameters import COEFFICIENTS, INITIAL
from ..core.shrinkage import Thresholds, form_thresholds, shrink
from ..core.tensors import count_nonzero, is_sharded

Weight: TypeAlias = tuple[Tensor, dict[str, Any]]  # a parameter and its param group

STRENGTHS = (1e-12, 1e12)  # the range that is searched
RESOLUTION = 3e-6  # of the logarithm of the strength
SLACK = 1e-4  # the part of a weight that the search for a strength may leave too much
LARGEST_B = 1e3  # exclusive lasso leaves one entry of a group, which would be lost to rounding above this
SAMPLE, SAMPLED_GROUPS = 2**14, 64  # the fewest entries and groups of a sample
NEAR = 0.05  # how near, in the logarithm, the strength for a sample usually is to that for the whole weight


def full_coefficients(group: dict[str, Any]) -> list[float]:
    """The coefficients of a param group at full strength."""
    return [float(group.get(INITIAL[key], group[key])) for key in COEFFICIENTS]


def sampled(weight: Weight) -> Weight:
    """Some of a large weight's groups, every k-th along a dim; of a DTensor all, since slices would move.

    What is measured often is measured on it, because a search looks at each entry some hundred times.
    """
    p, group = weight
    w, spec = viewed(p.detach(), group.get("view")), group.get("group_by", "feature")
    within = reduced_dims(w.dim(), spec) if has_groups(w.dim(), spec) else ()
    sizes = [1 if dim in within else n for dim, n in enumerate(w.shape)]
    step = min(w.numel() // SAMPLE, math.prod(sizes) // SAMPLED_GROUPS, max(sizes, default=1))
    if step > 1 and not is_sharded(p):
        w = w[(slice(None),) * sizes.index(max(sizes)) + (slice(None, None, step),)]
    return w, {**group, "view": None}


@torch.no_grad()
def left(weight: Weight, strength: float) -> Tensor:
    """A mask of the entries that stay nonzero under the exact prox of that strength."""
    p, group = weight
    a, b, c = form_thresholds(strength, *full_coefficients(group))
    thresholds = Thresholds(a, min(b, LARGEST_B), c)
    return shrink(p.detach(), thresholds, group.get("group_by", "feature"), group.get("view"), "exact") != 0


def within_reach(weight: Weight, count: float) -> float:
    """`count`, or the number of entries that are left at any strength where that is more.

    Exclusive lasso alone leaves one entry of each group, and where a spec makes no groups all may be left.
    """
    p, group = weight
    group_lasso, _, l1 = full_coefficients(group)
    dims = p.dim() if group.get("view") is None else len(group["view"])
    if l1 or (group_lasso and has_groups(dims, group.get("group_by", "feature"))):
        return count  # all can be removed
    return max(count, count_nonzero(left(weight, STRENGTHS[1])))


def strength_to_leave(weight: Weight, count: float) -> float:
    """The strength whose prox leaves about `count` entries nonzero, and one group of them at least.

    It is found by bisection. Where no strength leaves so many, it is one of two neighbours, whichever is
    nearer.
    """
    count, size = within_reach(weight, count), weight[0].numel()
    low, high = map(math.log, STRENGTHS)
    more, fewer = math.inf, 0.0  # what is left at both
    few, first = sampled(weight), list[float]()
    if few[0].numel() < size:  # saves half of the passes over the whole weight
        near = math.log(strength_to_leave(few, count * few[0].numel() / size))
        first = [near + NEAR, near - NEAR]
    while high - low > RESOLUTION:
        middle = first.pop() if first else (low + high) / 2
        if not low < middle < high:
            continue
        now = count_nonzero(left(weight, math.exp(middle)))
        if 0 < now - count <= SLACK * size:  # where no more are left, a far weaker strength may leave as many
            return math.exp(middle)
        if now > count:
            low, more = middle, now
        else:
            high, fewer = middle, now
    return math.exp(high if fewer and count - fewer <= more - count else low)


@torch.no_grad()
def cut(weights: Sequence[Weight], count: float) -> None:
    """Leave about `count` entries of all the weights nonzero, each weight the same share of its own.

    What is left keeps its value. Small weights come first, so that later ones make up for their roundings;
    but what cannot be cut, such as a weight of one group, takes no more than half of the others' share.
    """
    alive = sorted(((count_nonzero(weight[0]), weight) for weight in weights), key=lambda pair: pair[0])
    total = sum(now for now, _ in alive)
    share = count / max(total, 1)
    for now, weight in alive:
        if now and count < total:
            wanted = now * max(count / total, share / 2)
            weight[0].mul_(left(weight, strength_to_leave(weight, wanted))).add_(0.0)  # every zero is +0.0
        total -= now
        count -= count_nonzero(weight[0])
