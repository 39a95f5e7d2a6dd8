"""The tables in device memory that the kernels read, so that a new address or learning rate compiles nothing.

The comment above each table says what one of its rows stands for. A column has one name, by which the host
writes it and the kernels read it; the last name is the number of columns. Besides the tables, kernels take
`grad_scale`, which divides gradients, and `found_inf`: if that is not 0 nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from ...core import shrinkage
from ...core.hyperparameters import FREEZE_MODES, At, Hyperparameters, Phase


class Constant(tl.constexpr):
    """A number that kernels may use as a global.

    At each launch Triton compares all globals of a kernel with a deep copy from when it was compiled. That is
    several times faster if there is only one object for each number.
    """

    def __ne__(self, other: Any) -> Any:
        return self is not other and super().__ne__(other)

    def __deepcopy__(self, memo: Any) -> Constant:
        return self


MAX_SWEEPS = Constant(shrinkage.MAX_SWEEPS)


# `tensors`, int64, has a row for each tensor: the addresses of w, gradient and the rule's states (0: none)
# and its Phase, as StepPlan gives them (gathering.Row). Then come, for a rule that counts steps, the bits of
# two float64: sqrt(1 - beta2^count) / (1 - beta1^count), and that square root.
TENSOR_W, TENSOR_GRAD, TENSOR_STATES = map(Constant, range(3))
TENSOR_PHASE, TENSOR_RATIO, TENSOR_ROOT, TENSOR_COLUMNS = map(Constant, range(4, 8))
SKIPPED = Constant(int(Phase.SKIPPED))
PROX_ALONE = Constant(int(Phase.PROX_ALONE))
FIRST = Constant(int(Phase.FIRST))
RUNNING = Constant(int(Phase.RUNNING))


# `shapes`, int64, has a row for each tensor: its Layout as far as kernels need it, and its row of `hyper`.
SHAPE_R1, SHAPE_K2, SHAPE_R2, SHAPE_GROUPS, SHAPE_HYPER, SHAPE_COLUMNS = map(Constant, range(6))


# `hyper`, of the compute dtype, has a row for each param group: numbers, then int64 addresses. The update
# rule's numbers come first.
HYPER_LR = Constant(0)
HYPER_GRAD_SIGN = Constant(1)  # -1 to maximize
# SGD's numbers.
HYPER_MOMENTUM, HYPER_ONE_MINUS_DAMPENING, HYPER_WEIGHT_DECAY, HYPER_NESTEROV = map(Constant, range(2, 6))
# AdamW's numbers. Decoupled weight decay shrinks weights, coupled is added to gradients; one of them is 0.
HYPER_ONE_MINUS_BETA1, HYPER_BETA2, HYPER_ONE_MINUS_BETA2, HYPER_EPS = map(Constant, range(2, 6))
HYPER_DECOUPLED_DECAY, HYPER_COUPLED_DECAY = map(Constant, range(6, 8))
# The prox's numbers: the thresholds a, b and c, or the bare coefficients where HYPER_ON_DEVICE is not 0.
HYPER_A, HYPER_B, HYPER_C, HYPER_EXACT, HYPER_FREEZE, HYPER_ON_DEVICE = map(Constant, range(8, 14))
HYPER_NUMBERS = Constant(14)
# Addresses of float32 numbers to be read in place of lr and coefficients (0: none), in the order of SCALARS.
ADDRESS_LR, ADDRESS_GROUP_LASSO, ADDRESS_EXCLUSIVE_LASSO, ADDRESS_L1, ADDRESSES = map(Constant, range(5))
HYPER_COLUMNS = Constant(HYPER_NUMBERS.value + 2 * ADDRESSES.value)  # an address is as large as two float32
# The values of HYPER_FREEZE, which are indices into FREEZE_MODES.
FREEZE_GROUP, FREEZE_ELEMENT = (Constant(FREEZE_MODES.index(mode)) for mode in ("group", "element"))


# `items`, int64, has a row for each tile: a variant (an index into VARIANTS, or IDLE), a tensor, the tile's
# first group, and the first entry that it has of its groups.
ITEM_VARIANT, ITEM_TENSOR, ITEM_GROUP, ITEM_ENTRY, ITEM_COLUMNS = map(Constant, range(5))
# Rows for split_groups also have the panel, the chunk, the panel's number of chunks, and where in `scratch`
# the panel begins.
ITEM_PANEL, ITEM_CHUNK, ITEM_CHUNKS, ITEM_SCRATCH, SPLIT_ITEM_COLUMNS = map(Constant, range(4, 9))
IDLE = Constant(-1)


# `scratch`, of the compute dtype, has for each panel rows of one number per group: first the state of the
# panel's search, then the partial sums of each of its chunks.
STATE_S, STATE_T, STATE_LOW, STATE_HIGH, STATE_DONE, STATE_ALIVE, STATE_ROWS = map(Constant, range(7))
SUM_COUNT, SUM_L1, SUM_L2_SQUARED, SUM_ALIVE, SUM_ROWS = map(Constant, range(5))


# `counters`, int32, are all 0 between steps. They hold the number of tickets taken, then for each panel how
# many chunks have arrived in the present sweep, how many sweeps have passed, and how many programs have ended
# a wait.
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


# The indices by which kernels take the fields of a Variant.
VARIANT_KIND, VARIANT_PARTS, VARIANT_RED, VARIANT_KEEP, VARIANT_VEC, VARIANT_WIDE = map(Constant, range(6))
# The kinds of a Variant, in terms of the canonical layout (K1, R1, K2, R2) of groups.py.
ROWS = Constant(0)  # K1 = R1 = 1: a group is a contiguous run
COLUMNS = Constant(1)  # R2 = 1: neighbours along a row belong to different groups
GENERAL = Constant(2)  # any layout, by division
ELEMENTWISE = Constant(3)  # no groups


def hyper_table(
    hyperparameters: Sequence[Hyperparameters],
    fill: Callable[[np.ndarray, Mapping[str, Any]], None],
    dtype: torch.dtype,
) -> Tensor:
    """`hyper` on the CPU; LOAD, load_thresholds and load_freeze read it. `fill` writes the rule's columns."""
    table = torch.zeros((len(hyperparameters), HYPER_COLUMNS.value), dtype=dtype, device="cpu")
    for row, h in zip(table.numpy(), hyperparameters):
        chosen = h.chosen
        row[HYPER_LR] = _number(h.lr)
        row[HYPER_GRAD_SIGN] = -1 if chosen["maximize"] else 1
        fill(row, chosen)
        coefficients = h.group_lasso, h.exclusive_lasso, h.l1
        thresholds = map(_number, coefficients) if h.on_device else h.thresholds()
        row[HYPER_A], row[HYPER_B], row[HYPER_C] = thresholds
        row[HYPER_EXACT] = h.exact
        row[HYPER_FREEZE] = FREEZE_MODES.index(h.freeze_zeros)
        row[HYPER_ON_DEVICE] = h.on_device
        row[HYPER_NUMBERS:].view(np.int64)[:ADDRESSES] = h.addresses
    return table


def _number(x: Any) -> float:
    """The number that the host knows for one of SCALARS; 0 where a kernel reads it from an address."""
    return 0.0 if isinstance(x, At) else float(x)
