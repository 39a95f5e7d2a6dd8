"""Other inputs than the example's, for checks: what a caller may pass is unknown, whatever its dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .layers import is_floating

Arguments = tuple[Any, ...]


def _is_inexact(x: Any) -> bool:
    return is_floating(x) or (isinstance(x, Tensor) and x.is_complex())


class Probes:
    """Arguments on which two models are compared: the example, and as many others as the model takes.

    Floating and complex tensors become normal numbers of the example's mean and spread. Integers are drawn
    from between the example's, from 0 to 255 (uint8) or to the last entry of the model's smallest embedding,
    and moved by one; truth values are inverted, all true and all false. Then the batch (the first dim, where
    all tensors have one size there) and the length (the second) are doubled. Other arguments stay.

    Args:
        model: in eval mode; it is run on each of them.
        args: the example.

    Attributes:
        args: the arguments, the example first.
        varied: what differs between them, in words.

    Raises:
        ValueError: the model takes no other values of an integer or boolean argument.
    """

    def __init__(self, model: nn.Module, args: Arguments) -> None:
        self.args: list[Arguments] = [args]
        self.varied: list[str] = []
        self._generator = torch.Generator().manual_seed(0)
        leaves, self._tree = tree_flatten(args)
        sizes = [m.num_embeddings for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
        self._entries = min(sizes, default=None)
        self._vary_values(model, leaves)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        for dim, name in enumerate(("batch", "length")):
            if all(x.dim() > dim for x in tensors) and len({x.shape[dim] for x in tensors}) == 1:
                longer = [torch.cat([x, x], dim) if isinstance(x, Tensor) else x for x in leaves]
                if self._try(model, longer) is None:
                    self.varied.append(name)

    def _vary_values(self, model: nn.Module, leaves: list[Any]) -> None:
        floating = [self._normal(x) if _is_inexact(x) else x for x in leaves]
        if any(map(_is_inexact, leaves)) and self._try(model, floating) is None:
            self.varied.append("numbers")
        for i, x in enumerate(leaves):
            if not isinstance(x, Tensor) or _is_inexact(x) or not x.numel():
                continue
            others = (other for other in self._others(x) if not torch.equal(other, x))
            failures = [self._try(model, [*floating[:i], other, *floating[i + 1 :]]) for other in others]
            if None not in failures:
                raise ValueError(
                    f"example_input: expected a model that takes other values of tensor {i} ({x.dtype}, "
                    f"{list(x.shape)}), to see what depends on them, got {failures[0]}"
                )
            kind = "truth values" if x.dtype == torch.bool else "integers"
            self.varied.append(f"{kind} of tensor {i}")

    def _normal(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x
        dtype = torch.complex128 if x.is_complex() else torch.float64
        noise = torch.randn(x.shape, generator=self._generator, dtype=dtype).to(x)
        return noise * (x.std(correction=0) + 1) + x.mean()

    def _others(self, x: Tensor) -> list[Tensor]:
        if x.dtype == torch.bool:
            return [~x, torch.ones_like(x), torch.zeros_like(x)]
        low, high = int(x.min()), int(x.max())
        bound = 255 if x.dtype == torch.uint8 else (self._entries or 2) - 1
        wide, narrow = (self._integers(x, *ends) for ends in ((min(low, 0), max(high, bound)), (low, high)))
        return [wide, narrow, x + 1, x - 1]

    def _integers(self, x: Tensor, low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, x.shape, generator=self._generator).to(x)

    def _try(self, model: nn.Module, leaves: list[Any]) -> str | None:
        """Adds these arguments if the model takes them; else says why not."""
        args = tree_unflatten(leaves, self._tree)
        try:
            with torch.no_grad():
                model(*args)
        except Exception as error:
            return f"{type(error).__name__}: {error}".partition("\n")[0]
        self.args.append(args)
        return None
