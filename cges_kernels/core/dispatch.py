"""Sees a model's operations one by one."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class EachOperation(TorchDispatchMode):
    """Calls :meth:`operation` for each operation that torch does not make of others."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:  # a composite arrives whole where tensors were made in inference mode
            out = func.decompose(*args, **kwargs)
        return self.operation(func, args, kwargs) if out is NotImplemented else out

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``func`` gives."""
        raise NotImplementedError
