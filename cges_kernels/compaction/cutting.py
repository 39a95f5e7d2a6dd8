"""Finds the channels that nobody reads, and cuts them out of every tensor that holds them.

`Reading` finds them among the channels that following.py has found, and `cut` cuts them out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .channels import NOBODY, Channels, Weight
from .layers import bias_of, sizes
from .picking import laid_out_like


@dataclass
class Removal:
    """Channels that are removed together; `layer` is the first layer that makes them."""

    layer: str
    ids: Tensor


class Reading:
    """Which channels are read in `model`, whose parameters may have changed since channels were followed.

    Attributes:
        read: for each channel, whether a weight or an operation reads it; [count].
        gone: for each channel, whether it is to leave; [count].
    """

    def __init__(self, model: nn.Module, channels: Channels) -> None:
        self.channels = channels
        self.params = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
        self.group, self.touched = channels.groups(), channels.touched()
        self.nonzero = {name: self._nonzero(self.params[name]) for name in channels.weights}
        self._padding = {
            name: module.padding_idx
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding) and module.padding_idx is not None
        }
        self.reasons = [held.reason for held in channels.held]
        self._why = self._held()
        self.read = self._read()
        self.gone = self._removable()

    @staticmethod
    def _nonzero(x: Tensor) -> Tensor:
        """The number of nonzero entries of a weight, summed over its kernel: [dim 0, dim 1], on the CPU."""
        taps = (x.detach() != 0).to(torch.float32).flatten(2) if x.dim() > 2 else (x.detach() != 0)[..., None]
        return (taps.to(torch.float32) @ taps.new_ones(taps.shape[-1], dtype=torch.float32)).cpu()

    def reading(self, weight: Weight, dim: int, by: Tensor | None = None) -> Tensor:
        """For each line along `dim`, whether it is nonzero on a line of the other dim that `by` selects."""
        entries = self.nonzero[weight.name].movedim(dim, 0)
        lines = entries.new_ones(entries.shape[1]) if by is None else by.to(entries.dtype)
        return (entries @ lines) > 0  # a product is faster than any()

    def _held(self) -> Tensor:
        """For each group's first channel, the index of the reason why it stays; -1 if nothing holds it."""
        why = torch.full((self.channels.count,), -1)
        for place, held in reversed(list(enumerate(self.channels.held))):  # the first reason wins
            why[self.group[held.ids]] = place
        return why

    def lines(self, weight: Weight, dim: int) -> Tensor:
        """The groups of the channels along `dim` of a weight."""
        return self.group[weight.ids[dim].expand(self.nonzero[weight.name].shape[dim])]

    def _read(self) -> Tensor:
        """For each channel, whether a weight whose own outputs are read reads it; from the outputs back."""
        alive = torch.zeros(self.channels.count, dtype=torch.bool)
        alive[self._why >= 0] = True  # channels that stay must keep their values
        alive[NOBODY] = True
        weights = list(self.channels.weights.values())[::-1]
        while True:
            before = int(alive.sum())
            for weight in weights:
                for dim in weight.reads:
                    by = alive[self.lines(weight, 1 - dim)] if 1 - dim in weight.makes else None
                    alive[self.lines(weight, dim)[self.reading(weight, dim, by)]] = True
            if int(alive.sum()) == before:
                return alive[self.group]

    def by_weights(self) -> Tensor:
        """For each channel, whether a weight reads it or an operation takes it, held or not."""
        read = torch.zeros(self.channels.count, dtype=torch.bool)
        for held in self.channels.held:
            if held.read:
                read[self.group[held.ids]] = True
        for weight in self.channels.weights.values():
            for dim in weight.reads:
                read[self.lines(weight, dim)[self.reading(weight, dim)]] = True
        return read[self.group]

    def _removable(self) -> Tensor:
        """Channels that nobody reads and nothing holds, leaving at least one in each tensor."""
        made = torch.zeros(self.channels.count, dtype=torch.bool)
        for weight in self.channels.weights.values():
            for dim in weight.makes:
                made[self.lines(weight, dim)] = True
        gone = made & ~self.read & (self.group == torch.arange(self.channels.count))
        while True:
            spared = self._spared(gone)
            if not spared:
                return gone[self.group]
            for first, reason in spared.items():
                gone[first], self._why[first] = False, len(self.reasons)
                self.reasons.append(reason)

    def _spared(self, gone: Tensor) -> dict[int, str]:
        """Groups that must stay although nobody reads them, and why."""
        spared: dict[int, str] = {}
        for weight in self.channels.weights.values():
            for dim in weight.ids:
                lines = self.lines(weight, dim)
                if bool(gone[lines].all()) and not spared.keys() & set(lines.tolist()):
                    spared[int(lines[0])] = f"one channel of {weight.layer or weight.name} is left"
        left = gone[self.group]
        for name, ids in self.channels.loose.items():
            if left[ids].any() and _cut_of(self.params[name], ids, left, self.touched) is None:
                ragged = self.group[ids[left[ids]]].unique().tolist()
                spared |= dict.fromkeys(ragged, f"they are scattered in {name}")
        return spared

    def removals(self) -> list[Removal]:
        """The channels that are removed, grouped by the first layer that makes them."""
        left = self.gone.clone()
        found = []
        for weight in self.channels.weights.values():
            groups = torch.cat([self.lines(weight, dim) for dim in weight.makes] or [torch.zeros(0).long()])
            mine = groups[left[groups]].unique()
            if len(mine):
                found.append(Removal(weight.layer, torch.isin(self.group, mine).nonzero().flatten()))
                left[found[-1].ids] = False
        return found

    def gone_before(self, layer: str | None) -> Tensor:
        """The channels that are removed from the inputs of a layer."""
        weights = (weight for weight in self.channels.weights.values() if weight.layer == layer)
        lines = [self.lines(weight, dim) for weight in weights for dim in weight.reads]
        groups = torch.cat([*lines, torch.zeros(0, dtype=torch.long)])
        return torch.isin(self.group, groups[self.gone[groups]]).nonzero().flatten()

    def stayed(self) -> dict[str, str]:
        """{layer: how many of its outputs are dead or unread and stay, and why}"""
        read, readers = self.by_weights(), self._readers()
        tied = {int(first): reason for ids, reason in self.channels.tied for first in self.group[ids]}
        found: dict[str, list[str]] = {}
        for weight in self.channels.weights.values():
            for dim in weight.makes:
                lines = self.lines(weight, dim)
                dead = ~self.reading(weight, dim)
                idle = (dead | ~read[lines]) & ~self.gone[lines] & (lines != NOBODY)
                if dim == 0 and weight.layer in self._padding:  # the padding token's row is zero by design
                    idle[self._padding[weight.layer]] = False
                counts = Counter(self.reasons[i] for i in self._why[lines[idle]].tolist() if i >= 0)
                with_others = lines[idle & (self._why[lines] < 0)].tolist()
                counts.update(tied[first] for first in with_others if first in tied)
                if by := Counter(readers[first] for first in with_others if first not in tied):
                    more = f" and {len(by) - 1} more" if len(by) > 1 else ""
                    counts[f"read with what comes of them by {min(by)}{more}"] = by.total()
                for reason, count in counts.items():
                    text = f"{weight.label}dead or unread outputs that stay: {count}; {reason}"
                    found.setdefault(weight.layer, []).append(text)
        return {layer: "; ".join(texts) for layer, texts in found.items()}

    def _readers(self) -> dict[int, str]:
        """{group: the first layer that reads it with a weight other than 0}"""
        readers: dict[int, str] = {}
        for weight in self.channels.weights.values():
            for dim in weight.reads:
                alive = self.lines(weight, dim)[self.reading(weight, dim)]
                for first in alive.unique().tolist():
                    readers.setdefault(first, weight.layer or weight.name)
        return readers


def cut(model: nn.Module, channels: Channels, gone: Tensor) -> None:
    """Remove, in place, the channels that are `gone` ([count]) from every parameter and buffer."""
    named = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    before = [(module, sizes(module)) for module in model.modules()]
    for name, weight in channels.weights.items():
        for dim, ids in weight.ids.items():
            _keep(named[name], dim, ~gone[ids])
        bias = bias_of(name)
        # No operation used this bias when channels were followed, because a fold has since added it.
        if bias != name and bias in named and bias not in channels.loose and len(weight.makes) == 1:
            _keep(named[bias], 0, ~gone[weight.ids[min(weight.makes)]])
    touched = channels.touched()
    for name, ids in channels.loose.items():
        for dim, lines in _cut_of(named[name], ids, gone, touched) or []:
            _keep(named[name], dim, ~lines)
    for name, ids in channels.widths.items():
        setattr(model.get_submodule(name), "num_features", int((~gone[ids]).sum()))  # noqa: B010  # for mypy
    for module, was in before:
        for key, size in sizes(module).items():
            if key in vars(module) and size != was[key]:
                setattr(module, key, size)


def _cut_of(x: Tensor, ids: Tensor, gone: Tensor, touched: Tensor) -> list[tuple[int, Tensor]] | None:
    """The dim and the lines along which a parameter is cut whose elements have channels of their own.

    Elements that the forward pass did not touch, such as those of a table for longer inputs, are removed with
    the others of their line.

    Returns:
        At most one pair of a dim and a mask [size], or None if no set of lines holds exactly the removed
            elements.
    """
    leaves, stays = (y[ids].as_strided(x.shape, x.stride()) for y in (gone, touched & ~gone))
    if not leaves.any():
        return []
    for dim, size in enumerate(x.shape):
        lines = leaves.movedim(dim, 0).reshape(size, -1).any(1)
        if not lines.all() and not (stays.movedim(dim, 0).reshape(size, -1).any(1) & lines).any():
            return [(dim, lines)]
    return [] if leaves.all() else None


def _keep(x: Tensor, dim: int, keep: Tensor) -> None:
    """Keep these lines of `x` along `dim`, in place."""
    if not bool(keep.all()):
        index = keep.nonzero().flatten().to(x.device)
        x.data = laid_out_like(x, x.detach().index_select(dim, index))
