"""The tables in device memory that the kernels read: a new address or learning rate compiles nothing.

Each has a row per entry of what its heading says. A column has one name, by which the host writes it and the
kernels read it; the last name of a heading is how many columns there are. Beside the tables kernels take
`grad_scale`, which divides gradients, and `found_inf`: where that is not 0 nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from ...core import reference
from ...core.hyperparameters import FREEZE_MODES, At, Hyperparameters, Phase
from ...core.rules import ADAMW, SGD


class Constant(tl.constexpr):
    """A number that kernels may name.

    At each launch Triton compares all that a kernel names with a deep copy of what it was compiled for; that
    there is but one of each makes it several times faster.
    """

    def __ne__(self, other: Any) -> Any:
        return self is not other and super().__ne__(other)

    def __deepcopy__(self, memo: Any) -> Constant:
        return self


MAX_SWEEPS = Constant(reference.MAX_SWEEPS)


# `tensors`, int64, by tensor: addresses of w, gradient and the rule's states (0: there is none), and its
# Phase, as StepPlan gives them (gathering.Row); then, for a rule that counts steps, the bits of two float64:
# sqrt(1 - beta2^count) / (1 - beta1^count), and that square root.
TENSOR_W, TENSOR_GRAD, TENSOR_STATES = map(Constant, range(3))
TENSOR_PHASE, TENSOR_RATIO, TENSOR_ROOT, TENSOR_COLUMNS = map(Constant, range(4, 8))
SKIPPED = Constant(int(Phase.SKIPPED))
PROX_ALONE = Constant(int(Phase.PROX_ALONE))
FIRST = Constant(int(Phase.FIRST))
RUNNING = Constant(int(Phase.RUNNING))


# `shapes`, int64, by tensor: its Layout as far as kernels need it, and the row of `hyper` that it takes.
SHAPE_R1, SHAPE_K2, SHAPE_R2, SHAPE_GROUPS, SHAPE_HYPER, SHAPE_COLUMNS = map(Constant, range(6))


# `hyper`, of the compute dtype, by param group: numbers, then int64 addresses. First the update rule's:
HYPER_LR = Constant(0)
HYPER_GRAD_SIGN = Constant(1)  # -1 to maximize
# SGD's
HYPER_MOMENTUM, HYPER_ONE_MINUS_DAMPENING, HYPER_WEIGHT_DECAY, HYPER_NESTEROV = map(Constant, range(2, 6))
# AdamW's: weight decay of the weights (decoupled) and of the gradient, one of which is 0
HYPER_ONE_MINUS_BETA1, HYPER_BETA2, HYPER_ONE_MINUS_BETA2, HYPER_EPS = map(Constant, range(2, 6))
HYPER_DECOUPLED_DECAY, HYPER_COUPLED_DECAY = map(Constant, range(6, 8))
# The prox's: a, b and c, but where HYPER_ON_DEVICE is not 0 the bare coefficients.
HYPER_A, HYPER_B, HYPER_C, HYPER_EXACT, HYPER_FREEZE, HYPER_ON_DEVICE = map(Constant, range(8, 14))
HYPER_NUMBERS = Constant(14)
# Addresses of float32 that take the place of lr and the coefficients (0: none), in the order of SCALARS.
ADDRESS_LR, ADDRESS_GROUP_LASSO, ADDRESS_EXCLUSIVE_LASSO, ADDRESS_L1, ADDRESSES = map(Constant, range(5))
HYPER_COLUMNS = Constant(HYPER_NUMBERS.value + 2 * ADDRESSES.value)  # each is as large as two float32
# RULE, which kernels are compiled for.
SGD_RULE, ADAMW_RULE = map(Constant, range(2))
RULE_NUMBERS = {SGD.name: SGD_RULE, ADAMW.name: ADAMW_RULE}
# HYPER_FREEZE: what must stay zero, by its place in FREEZE_MODES.
FREEZE_GROUP, FREEZE_ELEMENT = (Constant(FREEZE_MODES.index(mode)) for mode in ("group", "element"))


# `items`, int64, by tile: a variant (an index into VARIANTS, or IDLE), a tensor, the tile's first group, and
# the first entry that it has of its groups.
ITEM_VARIANT, ITEM_TENSOR, ITEM_GROUP, ITEM_ENTRY, ITEM_COLUMNS = map(Constant, range(5))
# Those of split_groups go on with panel, chunk, chunks of the panel, and where in `scratch` the panel begins.
ITEM_PANEL, ITEM_CHUNK, ITEM_CHUNKS, ITEM_SCRATCH, SPLIT_ITEM_COLUMNS = map(Constant, range(4, 9))
IDLE = Constant(-1)


# `scratch`, of the compute dtype, by panel: rows of a number per group, first the state of its search, then
# the partial sums of each of its chunks.
STATE_S, STATE_T, STATE_LOW, STATE_HIGH, STATE_DONE, STATE_ALIVE, STATE_ROWS = map(Constant, range(7))
SUM_COUNT, SUM_L1, SUM_L2_SQUARED, SUM_ALIVE, SUM_ROWS = map(Constant, range(5))


# `counters`, int32, all 0 between steps: the tickets taken, then by panel how many chunks have arrived in the
# present sweep, how many sweeps have passed, and how many programs have seen what they waited for.
COUNTER_TICKETS, COUNTER_PANELS = map(Constant, range(2))
PANEL_ARRIVED, PANEL_SWEPT, PANEL_SEEN, PANEL_COUNTERS = map(Constant, range(4))


class Variant(NamedTuple):
    """A tile as a kernel is compiled for it; VARIANTS is a tuple of those that one launch needs."""

    kind: int
    parts: int
    red: int
    keep: int
    vec: int
    wide: bool


# Its fields, by which kernels take them out of VARIANTS.
VARIANT_KIND, VARIANT_PARTS, VARIANT_RED, VARIANT_KEEP, VARIANT_VEC, VARIANT_WIDE = map(Constant, range(6))
# Its kind; the canonical layout is groups.py's (K1, R1, K2, R2).
ROWS = Constant(0)  # K1 = R1 = 1: a group is a contiguous run
COLUMNS = Constant(1)  # R2 = 1: neighbours along a row are of different groups
GENERAL = Constant(2)  # any layout, by division
ELEMENTWISE = Constant(3)  # no groups


def hyper_table(hyperparameters: Sequence[Hyperparameters], dtype: torch.dtype) -> Tensor:
    """`hyper` on the CPU; the kernels' load_sgd, load_adamw, load_thresholds and load_freeze read it."""
    table = torch.zeros((len(hyperparameters), HYPER_COLUMNS.value), dtype=dtype, device="cpu")
    for row, h in zip(table.numpy(), hyperparameters):
        chosen = h.chosen
        row[HYPER_LR] = _number(h.lr)
        row[HYPER_GRAD_SIGN] = -1 if chosen["maximize"] else 1
        if h.rule is SGD:
            row[HYPER_MOMENTUM] = chosen["momentum"]
            row[HYPER_ONE_MINUS_DAMPENING] = 1 - chosen["dampening"]
            row[HYPER_WEIGHT_DECAY] = chosen["weight_decay"]
            row[HYPER_NESTEROV] = chosen["nesterov"]
        else:
            beta1, beta2 = map(float, chosen["betas"])
            row[HYPER_ONE_MINUS_BETA1] = 1 - beta1
            row[HYPER_BETA2], row[HYPER_ONE_MINUS_BETA2] = beta2, 1 - beta2
            row[HYPER_EPS] = chosen["eps"]
            decoupled = chosen["decoupled_weight_decay"]
            row[HYPER_DECOUPLED_DECAY if decoupled else HYPER_COUPLED_DECAY] = chosen["weight_decay"]
        coefficients = h.group_lasso, h.exclusive_lasso, h.l1
        thresholds = map(_number, coefficients) if h.on_device else h.thresholds()
        row[HYPER_A], row[HYPER_B], row[HYPER_C] = thresholds
        row[HYPER_EXACT] = h.exact
        row[HYPER_FREEZE] = FREEZE_MODES.index(h.freeze_zeros)
        row[HYPER_ON_DEVICE] = h.on_device
        row[HYPER_NUMBERS:].view(np.int64)[:ADDRESSES] = h.addresses
    return table


def _number(x: Any) -> float:
    """What the host knows of one of SCALARS."""
    return 0.0 if isinstance(x, At) else float(x)
