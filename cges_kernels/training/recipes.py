"""Makes param groups for a model: the weights to regularise, their coefficients, and their group specs.

CGES shares one strength lambda between group and exclusive lasso, layer by layer (thesis Eq. 5); layers.py
says what a layer is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor, nn

from ..core.groups import GroupSpec
from ..core.hyperparameters import COEFFICIENTS
from .layers import Include, LayerWeight, regularised_weights, warn_of_computed_weights

Coefficient: TypeAlias = float | Sequence[float]
Scale: TypeAlias = str | Mapping[str, tuple[float, float]]


def _is_number(x: object) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool)


def exclusivity_schedule(num_layers: int, m: float) -> list[float]:
    """The share of exclusive lasso in each layer of CGES (thesis Eq. 5).

        mu_l = m + (1 - 2m)*l/(L - 1),  l = 0, ..., L - 1

    and `mu = [m]` where L = 1. With m below 1/2, low layers share features (group lasso) and high layers
    compete for them (exclusive lasso).

    Args:
        num_layers: L, the number of regularised layers, >= 1.
        m: mu of the first layer, in [0, 1]; that of the last is 1 - m.

    Returns:
        A list of L numbers, mu of each layer.

    Raises:
        ValueError: fewer than one layer, or m outside [0, 1].
    """
    if not isinstance(num_layers, int) or isinstance(num_layers, bool) or num_layers < 1:
        raise ValueError(f"num_layers: expected an int >= 1, got {num_layers!r}")
    if not _is_number(m) or not 0 <= m <= 1:
        raise ValueError(f"m: expected a number in [0, 1], got {m!r}")
    return [m + (1 - 2 * m) * l / max(num_layers - 1, 1) for l in range(num_layers)]


def _per_layer(key: str, value: Coefficient, num_layers: int) -> list[float]:
    """One checked coefficient per layer, from a number or a sequence."""
    if isinstance(value, (Tensor, np.ndarray)):
        value = value.tolist()
    given = list(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else [value]
    if not all(_is_number(x) or (isinstance(x, Tensor) and x.numel() == 1) for x in given):
        raise TypeError(f"{key}: expected a number or one value per layer, got {value!r}")
    values = [float(x) for x in given] * (1 if isinstance(value, Sequence) else num_layers)
    if len(values) != num_layers:
        raise ValueError(f"{key}: expected a number or {num_layers} values, one per layer, got {len(values)}")
    if not all(x >= 0 and math.isfinite(x) for x in values):
        raise ValueError(f"{key}: expected finite values >= 0, got {value!r}")
    return values


def _scale_factors(
    weights: Sequence[LayerWeight], group_by: GroupSpec, scale: Scale | None
) -> list[tuple[float, float]]:
    """`(alpha factor, beta factor)` of each layer; a ValueError where a spec does not fit a layer."""
    sizes = [weight.layout(group_by).group_size for weight in weights]  # raises where a spec has no layout
    if scale is None:
        return [(1.0, 1.0)] * len(weights)
    if isinstance(scale, str) and scale == "size":
        return [(math.sqrt(n), 1 / n) for n in sizes]
    if not isinstance(scale, Mapping):
        raise ValueError(f"scale: expected None, 'size' or a dict of name to two factors, got {scale!r}")
    if unknown := sorted(set(scale) - {w.name for w in weights}):
        raise ValueError(f"scale: expected names among {[w.name for w in weights]}, got {unknown}")
    factors = []
    for weight in weights:
        pair = scale.get(weight.name, (1.0, 1.0))
        numbers = isinstance(pair, Sequence) and all(map(_is_number, pair))
        if not numbers or len(pair) != 2 or not all(x >= 0 and math.isfinite(x) for x in pair):
            raise ValueError(f"scale[{weight.name!r}]: expected two finite factors >= 0, got {pair}")
        factors.append((pair[0], pair[1]))
    return factors


def sparsity_param_groups(
    model: nn.Module,
    *,
    group_lasso: Coefficient = 0.0,
    exclusive_lasso: Coefficient = 0.0,
    l1: Coefficient = 0.0,
    weight_decay: Coefficient = 0.0,
    group_by: GroupSpec = "feature",
    scale: Scale | None = None,
    include: Include | None = None,
    names: bool = True,
) -> list[dict[str, Any]]:
    """Param groups for the optimizers: the penalties on the layer weights, none on anything else.

    Regularised are the weights of Linear, `Conv*`, `ConvTranspose*`, RNN, LSTM and GRU (input, hidden and
    projection), MultiheadAttention's input projections and Hugging Face's Conv1D. Not regularised are biases,
    norms, embeddings (and a Linear tied to one), bare parameters, and weights whose requires_grad is False. A
    weight used by several modules is one layer. The last group returned holds all that is not regularised,
    with every penalty 0 and `freeze_zeros=None`. Each parameter of the model is in exactly one group, with
    its name.

    A coefficient, or weight decay, that is 0 for every layer is left out, so that the optimizer's own
    argument holds. `ProxSGD(groups, weight_decay=5e-4)` then decays everything, as in torch.optim.SGD, and
    `ProxSGD(groups, l1=1e-5)` reaches the layer weights only.

    Frozen weights that are unfrozen later (Lightning's BaseFinetuning) stay without a penalty in the last
    group. Build the groups from the part that trains, and when the rest is unfrozen give the optimizer that
    part's: `for group in sparsity_param_groups(model.backbone, ...): optimizer.add_param_group(group)`.

    Args:
        model: the model, before any wrapper such as DistributedDataParallel.
        group_lasso: alpha, the coefficient of group lasso (thesis Eq. 3), not multiplied by lr: a number, or
            one per layer.
        exclusive_lasso: beta, the coefficient of exclusive lasso (Eq. 4), not multiplied by lr: a number, or
            one per layer.
        l1: gamma, the coefficient of l1 (Eq. 2), not multiplied by lr: a number, or one per layer.
        weight_decay: a number, or one per layer. Like the penalties it goes to the layer weights, and the
            other parameters get 0.
        group_by: "feature" (default), "filter", "channel" or "tensor", meant for `[out, in, *kernel]` and
            translated where a weight is held otherwise (transposed and grouped convolutions, Conv1D); or a
            tuple of dims, used as it is for every layer. Recurrent and attention weights are taken as the
            matrices they are: the rows of all gates, or of q, k and v, are outputs. In a depthwise
            convolution a "feature" is a single weight, on which group lasso acts as l1 and exclusive lasso as
            weight decay; "filter" and "channel" remove whole filters.
        scale: "size" multiplies alpha by sqrt(n) and divides beta by n, where n is the layer's group size. A
            dict {layer name: (alpha factor, beta factor)} multiplies by hand-tuned factors, 1 where a layer
            is missing. Layer names are those of `model.named_parameters()`. l1 and weight decay are not
            scaled.
        include: chooses the regularised parameters instead of the rule above: a callable `(name, parameter)
            -> bool`, or a collection of parameter names. Frozen ones are left out even so.
        names: False gives parameters without names, for optimizers that take no named ones, such as
            torch.distributed.optim.ZeroRedundancyOptimizer.

    Returns:
        A list of param groups. Layers with equal coefficients, spec and view share one.

    Raises:
        ValueError: a wrong number of values, a negative one, unknown names, a lazy parameter, no layer at
            all, or a layer on which `group_by` has no layout.
        TypeError: an argument of the wrong type.

    Warns:
        UserWarning: weights without a penalty because they are no parameters (parametrizations, pruning
            masks).
    """
    if not isinstance(names, bool):
        raise TypeError(f"names: expected a bool, got {names!r}")
    weights = regularised_weights(model, include)
    if include is None:
        warn_of_computed_weights(model, "no penalty")
    given = dict(group_lasso=group_lasso, exclusive_lasso=exclusive_lasso, l1=l1, weight_decay=weight_decay)
    values = {key: _per_layer(key, value, len(weights)) for key, value in given.items()}
    for i, (alpha_factor, beta_factor) in enumerate(_scale_factors(weights, group_by, scale)):
        values["group_lasso"][i] *= alpha_factor
        values["exclusive_lasso"][i] *= beta_factor
    values = {key: row for key, row in values.items() if any(row)}

    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for i, weight in enumerate(weights):
        spec, view = weight.group_spec(group_by)
        options = {key: row[i] for key, row in values.items()} | {"group_by": spec, "view": view}
        group = groups.setdefault(tuple(options.values()), {"params": [], **options})
        group["params"].append((weight.name, weight.param))

    regularised = {w.param for w in weights}
    rest: dict[str, Any] = {"params": [(n, p) for n, p in model.named_parameters() if p not in regularised]}
    rest |= {key: 0.0 for key in given if key in COEFFICIENTS or key in values}
    rest |= {"group_by": "feature", "view": None, "freeze_zeros": None}
    made = [*groups.values(), rest] if rest["params"] else [*groups.values()]
    return made if names else [{**group, "params": [p for _, p in group["params"]]} for group in made]


def cges_param_groups(model: nn.Module, lam: float, m: float = 0.0, **same: Any) -> list[dict[str, Any]]:
    """Param groups of combined group and exclusive sparsity, CGES (thesis Eq. 5; Yoon and Hwang 2017).

        alpha_l = lam*(1 - mu_l),  beta_l = lam*mu_l

    are the coefficients of group and exclusive lasso in layer l, of L regularised ones, where mu is
    [`exclusivity_schedule(L, m)`][cges_kernels.exclusivity_schedule].

    Args:
        model: as for [`sparsity_param_groups`][cges_kernels.sparsity_param_groups].
        lam: lambda, the strength that both penalties share, not multiplied by lr.
        m: mu of the first layer, in [0, 1]. With 0, the default, the first of several layers has group lasso
            alone, the last exclusive lasso alone.
        **same: the other arguments of `sparsity_param_groups`.

    Returns:
        A list of param groups, as from `sparsity_param_groups`.

    Raises:
        ValueError: m outside [0, 1], a negative `lam`, or what `sparsity_param_groups` refuses.
        TypeError: an argument of the wrong type.

    Examples:
        >>> optimizer = ProxSGD(cges_param_groups(model, lam=1e-2, scale="size"), lr=0.1, momentum=0.9)
    """
    if not _is_number(lam):
        raise TypeError(f"lam: expected a number, got {lam!r}")
    if not (lam >= 0 and math.isfinite(lam)):
        raise ValueError(f"lam: expected a finite number >= 0, got {lam!r}")
    mu = exclusivity_schedule(len(regularised_weights(model, same.get("include"))), m)
    alpha, beta = [lam * (1 - x) for x in mu], [lam * x for x in mu]
    return sparsity_param_groups(model, group_lasso=alpha, exclusive_lasso=beta, **same)
