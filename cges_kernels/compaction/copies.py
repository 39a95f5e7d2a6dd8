"""Makes working copies of a model: without wrappers and hooks, and in float64 if the model runs in it.

compact() uses them. At the end it gives the small model the dtypes, modes and hooks of the original.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._pytree import tree_leaves

from ..core.calls import Given, mapped
from .layers import is_floating
from .picking import pick, restore_inputs

HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"),
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel or DistributedDataParallel."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(inside := getattr(model, "_orig_mod", None), nn.Module):
            model = inside
        else:
            return model


def has_hooks(model: nn.Module) -> bool:
    """Whether a forward pass would run any hook other than those by which layers pick their inputs."""
    return any(
        hook is not pick
        for module in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks")
        for hook in (getattr(module, name, None) or {}).values()
    )


def kept_tensors(model: nn.Module) -> list[Tensor]:
    """The tensors that modules have as plain attributes, alone or in lists and dicts."""
    own = vars(nn.Module()).keys()
    attributes = (pair for module in model.modules() for pair in vars(module).items())
    kept = (y for key, x in attributes if key not in own for y in tree_leaves(x))
    return [x for x in kept if isinstance(x, Tensor)]


@contextlib.contextmanager
def without_hooks(model: nn.Module) -> Iterator[nn.Module]:
    """Remove all hooks of `model` within the block, other than those by which layers pick their inputs."""
    taken = []
    try:
        for module in model.modules():
            for name in HOOKS:
                hooks = getattr(module, name, None)
                if hooks:
                    taken.append((module, name, hooks))
                    ours = [(key, hook) for key, hook in hooks.items() if hook is pick]
                    setattr(module, name, OrderedDict(ours))
        yield model
    finally:
        for module, name, hooks in taken:
            setattr(module, name, hooks)


def working_copies(model: nn.Module, given: Given) -> tuple[tuple[nn.Module, Given], tuple[nn.Module, Given]]:
    """Two copies in eval mode, each with its arguments: one in float64, one as the model is.

    Layers that pick their inputs read all of them again in the copies.
    """
    memo = {id(x): x.detach().clone() for x in kept_tensors(model) if not x.is_leaf}  # these do not copy
    try:
        base = copy.deepcopy(model, memo).eval().requires_grad_(False)
    except Exception as error:
        raise ValueError(f"{type(model).__name__}: expected a model that copies, got: {error}") from error
    restore_inputs(base)
    exact = mapped(lambda x: x.double() if is_floating(x) else x, given)
    return (copy.deepcopy(base).double(), exact), (base, given)


def restore_kind(small: nn.Module, model: nn.Module) -> None:
    """Give `small` the dtypes, requires_grad and training modes of `model`."""
    as_was = dict(model.named_modules(remove_duplicate=False))
    for name, module in small.named_modules(remove_duplicate=False):
        old = as_was[name]
        module.training = old.training
        for key, p in module._parameters.items():
            if p is not None:
                like = old.weight if old._parameters[key] is None else old._parameters[key]
                p.data = p.data.to(like.dtype)
                p.requires_grad_(like.requires_grad)
                p.grad = None
        for key, x in module._buffers.items():
            if is_floating(x):
                module._buffers[key] = x.to(old._buffers[key].dtype)


def restore_hooks(small: nn.Module, model: nn.Module) -> None:
    """Give `small` copies of the hooks of `model`; hooks that cannot be copied are shared."""
    as_was = dict(model.named_modules())
    copies: dict[int, Any] = {id(as_was[name]): module for name, module in small.named_modules()}
    for name, module in small.named_modules():
        for key in HOOKS:
            for i, hook in getattr(as_was[name], key, {}).items():
                if hook is not pick:
                    with contextlib.suppress(Exception):
                        hook = copy.deepcopy(hook, copies)
                    getattr(module, key)[i] = hook
