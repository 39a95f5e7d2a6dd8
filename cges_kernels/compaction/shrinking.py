"""Tries smaller copies of a model until one has the outputs of the original.

`Shrinking` makes all changes at once and compares outputs (probes.py). If they differ, it finds a change
that changes the outputs, refuses it and tries again.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .channels import Channels
from .cutting import Reading, Removal, cut
from .fold import Fold, find_folds
from .picking import pick_inputs
from .probes import Difference, Probes

Change: TypeAlias = Fold | Removal
ATTEMPTS = 12  # the most attempts; the last one removes nothing
GIVEN_UP = f"{ATTEMPTS - 1} attempts to remove others showed in the outputs"


class Shrinking:
    """Tries smaller copies of `base`, each without a change that altered the outputs of the one before."""

    def __init__(
        self, base: nn.Module, channels: Channels, constants: Mapping[str, Tensor], probes: Probes
    ) -> None:
        self.base, self.channels, self.constants, self.probes = base, channels, constants, probes
        self._fixed: dict[str, str] = {}  # {layer whose inputs must not be folded: the reason}
        self._unpicked: set[str] = set()  # layers that must not pick their inputs

    def run(self) -> tuple[nn.Module, list[dict[str, str]]]:
        """The smallest copy that gives the same outputs, and two dicts {layer: what stayed in it, and why}.

        The first dict is about constants that were not folded into biases, the second about channels.
        """
        for attempt in itertools.count(1):
            if attempt == ATTEMPTS:
                self.channels.hold(torch.arange(self.channels.count), GIVEN_UP)
            folds, unfolded = find_folds(self.base, self.channels, self.constants, self._fixed)
            folds = self._those_that_pay(folds)
            reading = Reading(self._changed(folds), self.channels)
            changes: list[Change] = [*folds, *reading.removals()]
            small = self._changed(changes)
            picked = self._pick(small)
            changed = bool(changes) or bool(picked)
            difference = self.probes.differs(small) if changed else None
            if difference is None:
                return small, [unfolded, reading.stayed()]
            self._refuse(difference, reading, changes, picked)
        raise AssertionError  # not reachable: a refused change is never tried again, so the loop ends

    def _pick(self, small: nn.Module) -> list[str]:
        """Let layers of `small` pick their inputs if that pays; returns their names."""
        return pick_inputs(small, self.channels.called.keys() - self._unpicked)

    def _those_that_pay(self, folds: Sequence[Fold]) -> list[Fold]:
        """The folds after which a channel can be removed or need not be picked.

        Other folds would change weights without making the model smaller.
        """
        reading = Reading(self._changed(folds), self.channels)
        picked = self._pick(self._changed([*folds, *reading.removals()]))
        useful = []
        for fold in folds:
            leaving = reading.gone[self.channels.weights[fold.weight].ids[fold.dim]]
            inputs = fold.inputs if fold.layer in picked else fold.inputs & leaving.to(fold.inputs.device)
            if inputs.any():
                useful.append(replace(fold, inputs=inputs))
        return useful

    def _changed(self, changes: Sequence[Change]) -> nn.Module:
        """A copy of `base` with these changes."""
        small = copy.deepcopy(self.base)
        gone = torch.zeros(self.channels.count, dtype=torch.bool)
        for change in changes:
            if isinstance(change, Fold):
                change.apply(small)
            else:
                gone[change.ids] = True
        cut(small, self.channels, gone)
        return small

    def _refuse(
        self, difference: Difference, reading: Reading, changes: Sequence[Change], picked: Sequence[str]
    ) -> None:
        """Rule out, for the next attempt, changes that made the outputs differ."""
        for suspects in (self._by_numbers(difference.layer, reading), reading.gone_before(difference.layer)):
            if len(suspects):
                return self.channels.hold(suspects, difference.reason)
        change, reason = self._first_to_show(changes)
        if isinstance(change, Removal):
            for like in changes:
                if isinstance(like, Removal) and self._kind(like.layer) == self._kind(change.layer):
                    self.channels.hold(like.ids, reason)
        elif change is not None:
            self._fixed[change.layer] = reason
        elif picked:  # the changes alter nothing, so the picking of inputs does
            self._unpicked |= set(picked)
        else:
            raise RuntimeError(f"compact: expected outputs that stay, got: {difference.reason}")

    def _kind(self, layer: str) -> tuple[type[nn.Module], str]:
        """The class of the module that holds `layer`, and the layer's name in it.

        Layers with equal kinds do the same in their modules.
        """
        around, _, name = layer.rpartition(".")
        return type(self.base.get_submodule(around)), name

    def _by_numbers(self, layer: str | None, reading: Reading) -> Tensor:
        """The channels removed from modules that lay channels out by numbers, as one around `layer` does.

        It is the innermost module around `layer` that does so. All modules of its class are taken, because a
        size that is a constant in the code of one is a constant in that of the others.
        """
        types = {name: type(module) for name, module in self.base.named_modules()}
        laid_out = [(x.module, x.ids[reading.gone[x.ids]]) for x in self.channels.by_numbers]
        laid_out = [(name, ids) for name, ids in laid_out if len(ids)]
        while layer is not None:
            if any(name == layer for name, _ in laid_out):
                return torch.cat([ids for name, ids in laid_out if types[name] is types[layer]])
            layer = layer.rpartition(".")[0] if layer else None
        return torch.zeros(0, dtype=torch.long)

    def _first_to_show(self, changes: Sequence[Change]) -> tuple[Change | None, str]:
        """The first change that alters the outputs when made after those before it, and the difference."""
        # After the first `right` changes the outputs still agree; after the first `wrong` they do not.
        right, wrong, reason = 0, len(changes) + 1, ""
        while wrong - right > 1:
            middle = (right + wrong) // 2
            difference = self.probes.differs(self._changed(changes[:middle]))
            if difference is None:
                right = middle
            else:
                wrong, reason = middle, difference.reason
        return (changes[wrong - 1], reason) if wrong <= len(changes) else (None, "")
