"""Steps for callers who keep no plan: functional calls, and the operators of torch.library.

An executor is made for tensors of fixed shapes, and has tables of them in device memory. The last few
executors are kept for the next call with tensors of the same kinds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..core import shrinkage
from ..core.checks import check_distinct, named_layouts
from ..core.groups import GroupedLayout, GroupSpec
from ..core.hyperparameters import Hyperparameters
from ..core.rules import Rule
from ..core.tensors import is_followed
from .extension import BUILT, Executor
from .gathering import Row
from .graphs import is_capturing
from .registry import choose_backend

MOST_KEPT = 8
_kept: OrderedDict[Hashable, Executor] = OrderedDict()  # the one used last comes last
_in_graphs: dict[Hashable, Executor] = {}  # replays of captured graphs read their tables: never dropped
_outlived: list[Executor] = []  # executors of _in_graphs that forget() has put aside


def forget() -> None:
    """Drop the executors that are kept, for callers that change how executors cut tensors."""
    _kept.clear()
    _outlived.extend(_in_graphs.values())
    _in_graphs.clear()


def step_once(
    executor: str,
    tensors: Sequence[Tensor],
    layouts: Sequence[GroupedLayout],
    rows: Sequence[Row],
    param_groups: Sequence[int],
    hyperparameters: Sequence[Hyperparameters],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step in one pass by a fused executor. The caller has checked all arguments.

    Tensor i takes the hyperparameters at the index `param_groups[i]`.

    Raises:
        RuntimeError: Triton's executor in the capture of a CUDA graph, where its tables cannot be made.
    """
    capturing = is_capturing()
    if capturing and executor == "triton":
        raise RuntimeError(
            "backend='triton': expected an optimizer's step in the capture of a graph, which keeps its "
            "tables, got a call that keeps none; use backend='cuda'"
        )
    kinds = tuple((w.device, w.dtype) for w in tensors)
    streams = tuple(map(stream_of, dict.fromkeys(w.device for w in tensors)))
    module, rule = id(BUILT.get(executor)), hyperparameters[0].rule
    key: Hashable = (
        *(
            executor,
            module,
            rule.name,
            kinds,
            tuple(layouts),
            tuple(param_groups),
            len(hyperparameters),
            streams,
        ),
        torch.is_inference_mode_enabled(),  # tables made in inference mode cannot be written to outside it
    )
    found = _in_graphs.get(key) or _kept.pop(key, None)
    found = found or _make(executor, rule, tensors, layouts, param_groups, len(hyperparameters))
    found.step(rows, hyperparameters, grad_scale, found_inf)
    if capturing or key in _in_graphs:
        _in_graphs[key] = found
        return
    _kept[key] = found  # only now, so that no executor in use, or that has failed, serves another call
    if len(_kept) > MOST_KEPT:
        _kept.popitem(last=False)


def _make(
    executor: str,
    rule: Rule,
    tensors: Sequence[Tensor],
    layouts: Sequence[GroupedLayout],
    param_groups: Sequence[int],
    num_param_groups: int,
) -> Executor:
    """A new executor for such tensors."""
    if executor in ("cpu", "cuda"):
        return BUILT[executor].Executor(executor, tensors, layouts, param_groups, rule.name)
    from .triton.executor import TritonExecutor  # not at the top: triton is slow to import

    return TritonExecutor(rule, tensors, layouts, param_groups, num_param_groups)


def stream_of(device: torch.device) -> Hashable:
    """The stream that orders launches on a device: on two streams, steps must not share scratch memory."""
    return None if device.type == "cpu" else torch.get_device_module(device).current_stream(device)


def prox_in_place(
    tensors: Sequence[Tensor],
    hyperparameters: Hyperparameters,
    group_by: GroupSpec,
    view: Sequence[int] | None,
    backend: str,
) -> None:
    """functional.prox_ after the checks of its coefficients, which are numbers here; lr is 1."""
    names = [f"tensors[{i}]" for i in range(len(tensors))]
    layouts = named_layouts(names, tensors, group_by, view)
    for name, w in zip(names, tensors):
        if torch.is_grad_enabled() and w.requires_grad:
            raise RuntimeError(
                f"{name}: expected torch.no_grad() around a change of a tensor that requires grad"
            )
    check_distinct(names, tensors)
    followed = backend == "auto" and any(map(is_followed, tensors))
    executor = choose_backend("reference" if followed else backend, tensors)
    if executor == "reference":
        options: dict[str, Any] = dict(group_by=group_by, view=view, prox_mode=hyperparameters.prox_mode)
        for w in tensors:
            w.copy_(shrinkage.shrink(w, hyperparameters.thresholds(), **options))
        return
    rows = [Row(w.data_ptr()) for w in tensors]
    step_once(executor, tensors, layouts, rows, [0] * len(tensors), [hyperparameters])
    increment_version(tensors)
