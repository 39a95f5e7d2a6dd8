"""Finds the layers of a model: the weights to regularise, and the meaning of their dims.

A layer is one regularised weight tensor, counted from 0 in module registration order (the order of
`model.named_parameters()`). An LSTM is therefore two layers per direction and depth.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..core.groups import GroupSpec, Layout, canonical_layout, check_spec

Include: TypeAlias = Callable[[str, nn.Parameter], bool] | Collection[str]


class LayerWeight(NamedTuple):
    """A weight tensor and what its first two dims mean.

    It holds `[out, in/blocks, *kernel]`, or `[in, out/blocks, *kernel]` where `transposed`. Dim 0 is made of
    `blocks` equal parts that share nothing (the `groups` of a convolution).
    """

    name: str
    param: nn.Parameter
    blocks: int = 1
    transposed: bool = False

    def group_spec(self, group_by: GroupSpec) -> tuple[GroupSpec, tuple[int, ...] | None]:
        """The `(group_by, view)` that mean for this tensor what `group_by` means for `[out, in, *kernel]`."""
        check_spec(group_by)
        if not isinstance(group_by, str):
            return tuple(group_by), None
        shape = tuple(self.param.shape)
        if group_by == "tensor" or len(shape) < 2:
            return group_by, None
        out, into, *taps = (1, 0, *range(2, len(shape))) if self.transposed else range(len(shape))
        dims = sorted({"feature": (out,), "filter": (into, *taps), "channel": (out, *taps)}[group_by])
        if self.blocks > 1 and dims[0] == 0:
            return tuple(d + 1 for d in dims), (self.blocks, shape[0] // self.blocks, *shape[1:])
        return (tuple(dims) if self.transposed else group_by), None

    def layout(self, group_by: GroupSpec) -> Layout:
        """The canonical layout under `group_by`; a ValueError names the weight."""
        try:
            return canonical_layout(self.param, *self.group_spec(group_by))
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def blocked(self) -> Tensor:
        """The weight as `[blocks, out/blocks, in/blocks, taps]`, detached."""
        w = self.param.detach()
        w = w.reshape(self.blocks, w.shape[0] // self.blocks, w.shape[1], math.prod(w.shape[2:]))
        return w.transpose(1, 2) if self.transposed else w


class _Kind(NamedTuple):
    """A kind of layer: the pattern of its weights' names, and the meaning of their dims (see LayerWeight)."""

    pattern: str
    blocks: int = 1
    transposed: bool = False


def _kind_of(module: nn.Module) -> _Kind | None:
    """The kind of a layer with weights to regularise; None for any other module."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return _Kind("weight", module.groups, module.transposed)
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return _Kind(r"weight_(ih|hh|hr)(_l\d+)?(_reverse)?")
    if isinstance(module, nn.MultiheadAttention):
        return _Kind(r"(in|q|k|v)_proj_weight")
    # Hugging Face's Conv1D holds [in, out]. It is known by its name, so that transformers is not imported.
    if hasattr(module, "nf") and any(base.__name__ == "Conv1D" for base in type(module).__mro__):
        return _Kind("weight", transposed=True)
    return _Kind("weight") if isinstance(module, nn.Linear) else None


def _weights_of(module: nn.Module) -> dict[nn.Parameter, tuple[int, bool]]:
    """`(blocks, transposed)` of each weight to regularise that `module` itself holds; no biases."""
    kind = _kind_of(module)
    own = module.named_parameters(recurse=False) if kind else ()
    return {p: (kind.blocks, kind.transposed) for name, p in own if kind and re.fullmatch(kind.pattern, name)}


def computed_weights(model: nn.Module) -> list[str]:
    """Names of layers' weights that are not parameters but computed from others before each forward pass.

    torch.nn.utils.parametrize (weight_norm, spectral_norm, ...), the older torch.nn.utils.weight_norm and
    spectral_norm, and torch.nn.utils.prune make them.
    """
    names = []
    for prefix, module in model.named_modules():
        kind = _kind_of(module)
        if kind is None:
            continue
        found = [*getattr(module, "parametrizations", {})]
        found += [
            re.sub("_(orig|v)$", "", name)
            for name, _ in module.named_parameters(recurse=False)
            if name.endswith(("_orig", "_v"))
        ]
        found = [
            name for name in found if re.fullmatch(kind.pattern, name) and name not in module._parameters
        ]
        names += [f"{prefix}.{name}".lstrip(".") for name in found]
    return names


def warn_of_computed_weights(model: nn.Module, what: str) -> None:
    """Warn of weights that a helper leaves out because they are computed; `what` is the consequence."""
    if names := computed_weights(model):
        warnings.warn(
            f"{type(model).__name__}: {what} for {names}, which are no parameters but computed from others "
            "(parametrizations, weight_norm, spectral_norm, torch.nn.utils.prune): remove what computes them "
            "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove), or choose "
            "parameters by `include`",
            stacklevel=3,
        )


def regularised_weights(
    model: nn.Module, include: Include | None = None, *, frozen: bool = False
) -> list[LayerWeight]:
    """The layers of `model` in order; see sparsity_param_groups for the rule and for `include`.

    `frozen=True` also lists weights that do not require grad.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    lazy = [name for name, param in model.named_parameters() if is_lazy(param)]
    if lazy:
        raise ValueError(f"model: expected initialised parameters, got lazy {lazy}; run one batch first")
    if isinstance(include, str) or not (
        include is None or callable(include) or isinstance(include, Iterable)
    ):
        raise TypeError(f"include: expected a callable or a collection of names, got {include!r}")
    axes: dict[nn.Parameter, tuple[int, bool]] = {}
    for module in model.modules():
        for param, axis in _weights_of(module).items():
            axes.setdefault(param, axis)
    named = list(model.named_parameters(remove_duplicate=False))  # tied parameters under each of their names
    if include is None:
        embeddings = (m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
        chosen = set(axes) - {p for m in embeddings for p in m.parameters(recurse=False)}
    elif callable(include):
        chosen = {param for name, param in named if include(name, param)}
    else:
        names = set(include)
        if unknown := sorted(names - {name for name, _ in named}):
            raise ValueError(f"include: expected names of model.named_parameters(), got {unknown}")
        chosen = {param for name, param in named if name in names}
    weights = [
        LayerWeight(name, param, *axes.get(param, ()))
        for name, param in model.named_parameters()
        if param in chosen and (frozen or param.requires_grad)
    ]
    if not weights:
        computed = computed_weights(model)
        got = f"none but {computed}, which are computed from other parameters" if computed else "none"
        raise ValueError(f"{type(model).__name__}: expected at least one weight to regularise, got {got}")
    return weights
