"""Questions about a tensor: whether it holds values, is sharded, or is followed by PyTorch, and its nonzeros.

The checks and the choice of an executor depend on the answers.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(p: object) -> TypeGuard[DTensor]:
    """Whether `p` is a DTensor. Does without the slow import of DTensor: before it no DTensor can exist."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(p, distributed.DTensor)


def count_nonzero(w: Tensor) -> int:
    """The number of nonzero entries; of a DTensor those on all ranks, so every rank must call it."""
    count = (w != 0).sum() if is_sharded(w) else torch.count_nonzero(w)
    return int(count.full_tensor() if is_sharded(count) else count)


def check_whole(name: str, w: Tensor) -> None:
    """Raise a ValueError unless all of the weight's values are here to be counted and compared."""
    if is_sharded(w) or w.device.type == "meta":
        got = (
            "a DTensor, whose shards are to be gathered first" if is_sharded(w) else "one on the meta device"
        )
        raise ValueError(f"{name}: expected a whole tensor with values, got {got}")


def has_other_gradient(p: Tensor) -> bool:
    """Whether a parameter's gradient has, or will have (`p.grad_dtype`), another dtype than the parameter."""
    if not p.is_leaf:
        return False
    if p.grad is not None:
        return p.grad.dtype != p.dtype
    return getattr(p, "grad_dtype", p.dtype) not in (p.dtype, None)


def is_followed(x: object) -> bool:
    """Whether PyTorch records what is computed from `x`: for a derivative, a transform or a trace."""
    if not isinstance(x, Tensor):
        return False
    if x.requires_grad and torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False  # torch.compile cannot trace the checks below
    if torch.jit.is_tracing() or get_proxy_mode() is not None or not holds_values(x):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def is_freed(x: Tensor) -> bool:
    """Whether the tensor's storage was resized to nothing, so that a kernel would read from address 0."""
    if not holds_values(x) or torch.compiler.is_compiling() or is_traceable_wrapper_subclass(x):
        return False
    return bool(x.numel()) and x.data_ptr() == 0


def holds_values(w: Tensor) -> bool:
    """Whether numbers can be read from `w`: not in FakeTensorMode, nor under vmap, grad and jvp.

    PyTorch's operations accept such tensors. Kernels cannot, and no decision may depend on their values.
    """
    if torch.compiler.is_compiling():
        return True  # torch.compile cannot trace the checks below
    return not isinstance(w, FakeTensor) and not torch._C._functorch.is_functorch_wrapped_tensor(w)
