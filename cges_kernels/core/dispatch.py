"""A dispatch mode that sees a model's operations one by one.

It is the base of the report's FLOP counter (reporting/) and of the modes of compact() (compaction/).
"""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class EachOperation(TorchDispatchMode):
    """Calls `operation` for each operation that torch does not compose of others; subclasses define it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:  # torch does not decompose composites whose tensors were made in inference mode
            out = func.decompose(*args, **kwargs)
        return self.operation(func, args, kwargs) if out is NotImplemented else out

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run `func` and return its result."""
        raise NotImplementedError
