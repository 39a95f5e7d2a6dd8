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

from ..core.hyperparameters import COEFFICIENTS, INITIAL
from ..core.shrinkage import Thresholds, form_thresholds, shrink
from ..core.tensors import count_nonzero

Weight: TypeAlias = tuple[Tensor, dict[str, Any]]  # a parameter and its param group

STRENGTHS = (1e-12, 1e12)  # the range that is searched
BISECTIONS = 40
LARGEST_B = 1e3  # exclusive lasso leaves one entry of a group, which would be lost to rounding above this


def full_coefficients(group: dict[str, Any]) -> list[float]:
    """The coefficients of a param group at full strength."""
    return [float(group.get(INITIAL[key], group[key])) for key in COEFFICIENTS]


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
    return max(count, count_nonzero(left(weight, STRENGTHS[1])))


def strength_to_leave(weight: Weight, count: float) -> float:
    """The strength whose prox leaves about `count` entries nonzero, and one group of them at least.

    It is one of the two ends of the search, whichever is nearer.
    """
    count = within_reach(weight, count)
    low, high = map(math.log, STRENGTHS)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if count_nonzero(left(weight, math.exp(middle))) > count:
            low = middle
        else:
            high = middle
    more, fewer = (count_nonzero(left(weight, math.exp(x))) for x in (low, high))
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
            weight[0].mul_(left(weight, strength_to_leave(weight, wanted)))
        total -= now
        count -= count_nonzero(weight[0])
