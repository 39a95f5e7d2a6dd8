"""Sorts operations into kinds by their effect on channels, and answers questions about their arguments.

`kind` names the rule (rules.py, products.py) that following.py takes. An operation without a kind here is
"opaque".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

MOVED = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand"),
    *("slice", "select", "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "unbind"),
    *("squeeze", "unsqueeze", "index_select", "index", "gather", "flip", "roll", "repeat", "unfold"),
    *("diagonal", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "tril", "triu"),
}
# Operations of kind "moved" whose arguments are numbers that may be constants in a model's code.
BY_NUMBERS = {
    *("view", "_unsafe_view", "reshape", "slice", "split", "split_with_sizes", "unsafe_split"),
    *("unsafe_split_with_sizes", "select", "index", "index_select"),
}
# Elementwise operations that torch does not tag as pointwise.
POINTWISE = {
    *("_to_copy", "masked_fill", "where", "copy_", "clone", "alias", "detach", "lift_fresh", "contiguous"),
    *("hardswish", "hardswish_", "_prelu_kernel", "rrelu_with_noise", "log_sigmoid_forward", "masked_fill_"),
    *("fill_", "zero_", "native_dropout", "nan_to_num", "fake_quantize_per_tensor_affine"),
}
SHAPED = {
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like"),
    *(
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "new_empty_strided",
        "zeros",
        "ones",
        "full",
        "empty",
    ),
    *("rand", "randn", "scalar_tensor", "empty_strided"),
}
DRAWN = {"bernoulli_", "uniform_", "normal_", "random_", "exponential_"}
REDUCED = {
    *(
        "sum",
        "mean",
        "amax",
        "amin",
        "max",
        "min",
        "var",
        "std",
        "var_mean",
        "std_mean",
        "any",
        "all",
        "prod",
    ),
    *("argmax", "argmin", "logsumexp", "linalg_vector_norm", "norm", "_softmax", "_log_softmax", "cumsum"),
    *("cumprod", "sort", "topk", "median", "count_nonzero", "logcumsumexp", "cummax", "cummin"),
}
BATCH_NORMS = {
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
    *("cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update"),
}
OTHERS = {
    **dict.fromkeys(("cat", "stack"), "joined"),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), "multiplied"),
    "constant_pad_nd": "padded",
    "native_layer_norm": "layer_normed",
    "glu": "halved",
    **dict.fromkeys(("transpose_", "t_", "squeeze_", "unsqueeze_"), "turned"),
    **dict.fromkeys(("embedding", "_embedding_bag", "_embedding_bag_forward_only"), "embedded"),
    "_pack_padded_sequence": "packed",
    "convolution": "convolved",
}
SPATIAL = re.compile(r"_?(\w*_pool|upsample_\w+|reflection_pad|replication_pad|_upsample_\w+)([123])d")


def name(func: Any) -> str:
    """The operation's name without its overload."""
    return func.overloadpacket.__name__


@cache
def kind(func: Any) -> str:
    """The operation's kind, which is the name of its rule; "drawn" or "opaque" for those without one."""
    called = name(func)
    for names, found in (
        *((MOVED, "moved"), (SHAPED, "shaped"), (DRAWN, "drawn"), (REDUCED, "reduced")),
        *((POINTWISE, "pointwise"), (BATCH_NORMS, "batch_normed")),
    ):
        if called in names:
            return found
    if called in OTHERS:
        return OTHERS[called]
    if SPATIAL.match(called):
        return "spatial"
    return "pointwise" if torch.Tag.pointwise in func.tags else "opaque"


def spatial_dims(func: Any) -> int:
    """The number of last dims that a spatial operation acts on."""
    found = SPATIAL.match(name(func))
    assert found is not None
    return int(found[2])


@cache
def writes(func: Any) -> bool:
    """Whether the operation changes one of its arguments."""
    return any(x.alias_info is not None and x.alias_info.is_write for x in func._schema.arguments)


def scales(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the result is a multiple of the first argument, a matrix or kernel, or a cast of it."""
    if name(func) not in ("mul", "div", "neg", "_to_copy") or not isinstance(args[0], Tensor):
        return False
    return args[0].dim() > 1 and all(not isinstance(x, Tensor) or x.numel() == 1 for x in args[1:])


def moves_nothing(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether `func` is an as_strided_ that gives other strides to dims of size 1 alone, as pooling does."""
    if name(func) != "as_strided_" or list(args[0].shape) != list(args[1]):
        return False
    return all(size == 1 or a == b for size, a, b in zip(args[1], args[0].stride(), args[2]))


def on_ids(func: Any) -> Callable[..., Any]:
    """The operation to do on a tensor's channels, whose memory order may differ from that of the tensor."""
    if name(func) in ("view", "_unsafe_view", "_reshape_alias"):
        return lambda ids, sizes, *rest: ids.reshape(sizes)
    return func


def tensors(args: Any, kwargs: Any) -> list[Tensor]:
    """All tensors among the arguments."""
    return [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]


def bound(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name."""
    return {**{x.name: value for x, value in zip(func._schema.arguments, args)}, **kwargs}


def indexed_dims(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
    """The dims along which tensors of indices select elements."""
    if name(func) == "index":
        return {dim for dim, index in enumerate(args[1]) if index is not None}
    dim = bound(func, args, kwargs).get("dim")
    return set(range(args[0].dim())) if dim is None else {dim % args[0].dim()}


def reduced_dims(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
    """The dims over which a reduction combines elements."""
    dims, count = bound(func, args, kwargs).get("dim"), args[0].dim()
    if dims is None and name(func) in ("topk", "sort"):
        dims = -1
    if dims is None or dims == []:
        return set(range(count))
    return {dim % max(count, 1) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
