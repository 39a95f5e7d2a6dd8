"""Inputs other than the example's, on which a small model is compared with the original.

Callers may later pass arguments of any dtype with other values, so values, batch and length are varied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.calls import Given, mapped, tensors_in
from ..reporting.report import in_mode
from .layers import is_floating
from .running import compare, outputs, run

BATCH = 2  # the batch that an example is cut to


def _is_inexact(x: Any) -> bool:
    return is_floating(x) or (isinstance(x, Tensor) and x.is_complex())


def _common_size(tensors: list[Tensor], dim: int) -> int | None:
    """The size of all tensors along `dim`, if they have one in common."""
    sizes = {x.shape[dim] if x.dim() > dim else None for x in tensors}
    return sizes.pop() if len(sizes) == 1 else None


def shortened(given: Given) -> list[Given]:
    """The examples to try: cut to a batch of two, and whole.

    The batch is the first dim, if all tensors have one size there. An example that is not cut comes once.
    """
    if (_common_size(tensors_in(given), 0) or 0) <= BATCH:
        return [given]
    return [mapped(lambda x: x[:BATCH], given), given]


def enlarged(given: Given) -> Given:
    """The example with twice the size in all dims from the third on; a model may not take it."""
    return mapped(lambda x: x.repeat([1 if dim < 2 else 2 for dim in range(x.dim())]), given)


@dataclass(frozen=True)
class Difference:
    """A difference from the expected outputs, and the module in which the forward pass failed, if it did."""

    reason: str
    layer: str | None = None


class Probes:
    """Arguments on which two models are compared: the example, and others as far as the model takes them.

    One other set of arguments has a batch of twice the size (the batch is the first dim, where all tensors
    have one size there). Its floating-point and complex tensors are normal numbers of the example's mean and
    spread. Integers are drawn between those of the example, from 0 to 255 (uint8) or up to the last entry of
    the model's smallest embedding. Truth values are inverted, all true, and all false. Then the length (the
    second dim) is doubled, or halved if the model refuses that. Other arguments stay.

    Args:
        model: the model in eval mode; it is run on each set of arguments.
        given: the example.
        expected: the outputs of `model` on the example, if they are known.
        trained: its outputs on the example in training mode, if it runs there.

    Attributes:
        given: the sets of arguments, the example first.
        expected: the outputs of `model` on each set.
        varied: the differences between the sets, in words.
        resized: the set with another length, if the model takes one.

    Raises:
        ValueError: the model takes no other values of an integer or boolean argument.
    """

    def __init__(
        self,
        model: nn.Module,
        given: Given,
        expected: list[Any] | None = None,
        trained: list[Any] | None = None,
    ) -> None:
        self.given: list[Given] = [given]
        self.expected: list[list[Any]] = [outputs(model, given) if expected is None else expected]
        self._trained = trained
        self.varied: list[str] = []
        self._generator = torch.Generator().manual_seed(0)
        tensors = tensors_in(given)
        sizes = [m.num_embeddings for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
        self._entries = min(sizes, default=None)
        self._vary_values(model, tensors)
        self.resized: Given | None = None
        length = _common_size([x for x in tensors if x.dim() > 1], 1) or 0
        half = length // 2 if max((x.dim() for x in tensors), default=0) < 4 else 0  # images have no length
        for size in filter(None, (2 * length, half)):
            others = [torch.cat((x, x), 1)[:, :size] if x.dim() > 1 else x for x in tensors]
            if self._try(model, others) is None:
                self.varied.append("length")
                self.resized = self.given[-1]
                break

    def differs(self, model: nn.Module) -> Difference | None:
        """The difference between the outputs of `model` and those expected; None if there is none.

        In training mode only shapes are compared. A batch norm makes other constants there, and on a batch of
        two it enlarges small differences.
        """
        looks = [(outputs, *pair) for pair in zip(self.given, self.expected)]
        if self._trained is not None:
            looks.append((_in_training, self.given[0], self._trained))
        for look, given, expected in looks:
            try:
                found = look(model, given)
            except Exception as error:
                told = f"{type(error).__name__}: {error}".partition("\n")[0]
                told = f"without them the forward pass fails with {told}"
                return Difference(told, failed_in(model, error))
            if look is _in_training:
                same = _shapes(found) == _shapes(expected)
            else:
                same = compare(found, expected)[1]
            if not same:
                return Difference("without them the outputs change")
        return None

    def _vary_values(self, model: nn.Module, tensors: list[Tensor]) -> None:
        """Vary all values and the batch at once, or one after the other if the model refuses that."""
        exact = [i for i, x in enumerate(tensors) if not _is_inexact(x) and x.numel()]
        masks = [i for i in exact if tensors[i].dtype == torch.bool]
        others = [next(self._others(x), x) if x.numel() else x for x in tensors]
        inexact = ["numbers"] if any(map(_is_inexact, tensors)) else []
        if _common_size(tensors, 0) is not None and self._try(model, _doubled(tensors, others)) is None:
            self.varied += [*inexact, *(self._kind(tensors, i) for i in exact), "batch"]
            for i in masks:
                for other in list(self._others(tensors[i]))[1:]:
                    self._try(model, [*others[:i], other, *others[i + 1 :]])
            return
        floating = [y if _is_inexact(x) else x for x, y in zip(tensors, others)]
        if inexact and self._try(model, floating) is None:
            self.varied += inexact
        for i in exact:
            told: list[str | None] = []
            for other in self._others(tensors[i]):
                told.append(self._try(model, [*floating[:i], other, *floating[i + 1 :]]))
                if told[-1] is None and i not in masks:
                    break
            if None not in told:
                x = tensors[i]
                raise ValueError(
                    f"example_input: expected a model that takes other values of tensor {i} ({x.dtype}, "
                    f"{list(x.shape)}), to see what depends on them, got {told[0]}"
                )
            self.varied.append(self._kind(tensors, i))

    @staticmethod
    def _kind(tensors: list[Tensor], i: int) -> str:
        return f"{'truth values' if tensors[i].dtype == torch.bool else 'integers'} of tensor {i}"

    def _others(self, x: Tensor) -> Iterator[Tensor]:
        """Tensors of the shape and dtype of `x` with other values."""
        for other in self._draw(x):
            if not torch.equal(other, x):
                yield other

    def _draw(self, x: Tensor) -> Iterator[Tensor]:
        """Tensors of the shape and dtype of `x`, whose values may be those of `x` by chance."""
        if _is_inexact(x):
            dtype = torch.complex128 if x.is_complex() else torch.float64
            noise = torch.randn(x.shape, generator=self._generator, dtype=dtype).to(x)
            yield noise * (x.std(correction=0) + 1) + x.mean()
        elif x.dtype == torch.bool:
            yield from (~x, torch.ones_like(x), torch.zeros_like(x))
        else:
            low, high = int(x.min()), int(x.max())
            bound = 255 if x.dtype == torch.uint8 else (self._entries or 2) - 1
            for ends in ((min(low, 0), max(high, bound)), (low, high)):
                for _ in range(3):  # a small tensor is easily drawn as it was, so try again
                    drawn = torch.randint(ends[0], ends[1] + 1, x.shape, generator=self._generator).to(x)
                    if not torch.equal(drawn, x):
                        break
                yield drawn
            yield from (x + 1, x - 1, x // 2)  # the last keeps order, and where offsets begin

    def _try(self, model: nn.Module, tensors: list[Tensor]) -> str | None:
        """Add these arguments if the model takes them, and return None; otherwise return the error."""
        others = iter(tensors)
        given = mapped(lambda _: next(others), self.given[0])
        try:
            found = outputs(model, given)
        except Exception as error:
            return f"{type(error).__name__}: {error}".partition("\n")[0]
        self.given.append(given)
        self.expected.append(found)
        return None


def _shapes(found: list[Any]) -> list[torch.Size]:
    return [x.shape for x in found if isinstance(x, Tensor)]


def _in_training(model: nn.Module, given: Given) -> list[Any]:
    with in_mode(model, train=True):
        return run(model, given)


def _doubled(tensors: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    return [torch.cat(pair) for pair in zip(tensors, others)]


def failed_in(model: nn.Module, error: Exception) -> str | None:
    """The name of the innermost module of `model` that was running when the error was raised."""
    names = {module: name for name, module in model.named_modules()}
    found, trace = None, error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module in names:
            found = names[module]
        trace = trace.tb_next
    return found
