"""`save_compacted` and `load_compacted`: files that hold a small model's layer sizes beside its weights.

The files hold plain data, so that torch.load reads them with `weights_only=True`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..reporting.files import replacing
from .layers import WEIGHTED, sizes
from .picking import picking, select_inputs


def save_compacted(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a compacted model to a file.

    The file is `{"sizes": {module name: {attribute: int}}, "state_dict": ...}`; `torch.load` reads it with
    `weights_only=True`. It replaces an earlier file only once it is complete.

    Args:
        model: as [`compact`][cges_kernels.compact] made it (`result.model`), or trained further since.
        path: the file.

    Examples:
        >>> save_compacted(compact(net, example).model, "small.pt")
    """
    found = {}
    for name, module in model.named_modules():
        names = (*sizes(module), "given_inputs")  # layers that pick their inputs have given_inputs
        if own := {key: vars(module)[key] for key in names if key in vars(module)}:
            found[name] = own
    with replacing(path) as unfinished:
        torch.save({"sizes": found, "state_dict": model.state_dict()}, unfinished)


def load_compacted(model: nn.Module, path: str | os.PathLike[str], map_location: Any = None) -> nn.Module:
    """The model that [`save_compacted`][cges_kernels.save_compacted] wrote.

    Args:
        model: a network of the class and arguments that the compacted model was made from. Its weights do not
            matter, and it is left as it is.
        path: the file.
        map_location: as for `torch.load`.

    Returns:
        A copy of `model` with the sizes and weights of the file.

    Raises:
        ValueError: the file is not of this kind, or is of another network. The error names the file and the
            modules.

    Examples:
        >>> small = load_compacted(Net(), "small.pt")
    """
    content = torch.load(path, map_location=map_location, weights_only=True)
    if not isinstance(content, Mapping) or content.keys() != {"sizes", "state_dict"}:
        raise ValueError(f"{path}: expected a file of save_compacted, got something else")
    small = copy.deepcopy(model)
    modules = dict(small.named_modules())
    if unknown := sorted(content["sizes"].keys() - modules.keys()):
        raise ValueError(f"{path}: expected modules of {type(model).__name__}, got {unknown}")
    for name, own in content["sizes"].items():
        for key, size in own.items():
            if key in vars(modules[name]) or key == "given_inputs":
                setattr(modules[name], key, size)
    for name, value in content["state_dict"].items():
        owner, _, key = name.rpartition(".")
        if owner in modules:
            _fit(modules[owner], key, value)
    try:
        small.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{path}: expected the weights of {type(model).__name__}, got: {told}") from error
    return small


def _fit(module: nn.Module, key: str, value: Tensor) -> None:
    """Give a parameter or buffer of `module` the shape of `value`, and make it if it does not exist."""
    if key == "read_inputs":
        assert isinstance(module, WEIGHTED)
        select_inputs(module, torch.empty_like(value), picking(module).given_inputs)
        return
    if key not in module._parameters and key not in module._buffers:
        return
    now = getattr(module, key)
    if now is None:  # a bias that compact() added
        like = module.get_parameter("weight")
        setattr(module, key, nn.Parameter(like.new_empty(value.shape), like.requires_grad))
    elif now.shape != value.shape:  # in place: another module may have the same parameter
        now.data = now.new_empty(value.shape)
