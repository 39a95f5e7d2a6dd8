"""What kind of tensor it is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def has_other_gradient(p: Tensor) -> bool:
    """Whether a parameter's gradient is, or is to be, of another dtype than it is itself (p.grad_dtype)."""
    if not p.is_leaf:
        return False
    if p.grad is not None:
        return p.grad.dtype != p.dtype
    return getattr(p, "grad_dtype", p.dtype) not in (p.dtype, None)


def is_followed(x: object) -> bool:
    """Whether PyTorch is to follow what is computed from it: for a derivative, a transform or a trace."""
    if not isinstance(x, Tensor):
        return False
    if x.requires_grad and torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False  # what follows cannot be traced
    if torch.jit.is_tracing() or get_proxy_mode() is not None or not holds_values(x):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def is_freed(x: Tensor) -> bool:
    """Whether its storage was resized to nothing: what reads it would read address 0."""
    if not holds_values(x) or torch.compiler.is_compiling() or is_traceable_wrapper_subclass(x):
        return False
    return bool(x.numel()) and x.data_ptr() == 0


def holds_values(w: Tensor) -> bool:
    """Whether numbers can be read from it: not in FakeTensorMode, nor under vmap, grad and jvp.

    PyTorch's operations follow such tensors; kernels cannot, and nothing can depend on what they hold.
    """
    if torch.compiler.is_compiling():
        return True  # and what follows cannot be traced
    return not isinstance(w, FakeTensor) and not torch._C._functorch.is_functorch_wrapped_tensor(w)
