"""What kind of tensor it is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_other_gradient(p: Tensor) -> bool:
    """Whether a parameter's gradient is, or is to be, of another dtype than it is itself (p.grad_dtype)."""
    if not p.is_leaf:
        return False
    if p.grad is not None:
        return p.grad.dtype != p.dtype
    return getattr(p, "grad_dtype", p.dtype) not in (p.dtype, None)


def holds_values(w: Tensor) -> bool:
    """Whether numbers can be read from it: not in FakeTensorMode, nor under vmap, grad and jvp.

    PyTorch's operations follow such tensors; kernels cannot, and nothing can depend on what they hold.
    """
    if torch.compiler.is_compiling():
        return True  # and what follows cannot be traced
    return not isinstance(w, FakeTensor) and not torch._C._functorch.is_functorch_wrapped_tensor(w)
