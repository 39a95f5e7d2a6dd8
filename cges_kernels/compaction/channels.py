"""Removal of the channels that no weight reads, for good: smaller tensors instead of zeros.

Which channels of which layers belong together (residual sums, concatenation, flattening, depthwise
convolutions) is what Torch-Pruning's dependency graph says (Fang et al., DepGraph: Towards Any Structural
Pruning, CVPR 2023). Its word is not taken for it: a removal after which the outputs differ is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .layers import CONVOLUTION, PLAIN_FORWARDS, WEIGHTED, Weighted, channel_dim, columns, is_floating

# Kinds of nodes, by Torch-Pruning's names, through which a channel passes without touching another one.
CHANNELWISE = {"BN", "IN", "PRELU", "ELEMENTWISE", "CONCAT", "SPLIT", "SLICE", "RESHAPE", "PARAMETER"}
GATHER_PAYS = 64  # multiply-adds saved per element copied, from where on it was measured to be faster


class Refused(Exception):
    """The outputs of ``layer`` cannot be made fewer, for ``reason``."""

    def __init__(self, layer: str, reason: str) -> None:
        super().__init__(layer, reason)
        self.layer, self.reason = layer, reason


def import_torch_pruning() -> Any:
    """The library, or an ImportError that says what to install."""
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError("compact() needs torch-pruning: pip install cges_kernels[prune]") from error
    return torch_pruning


def dependency_graph(model: nn.Module, args: tuple[Any, ...]) -> Any:
    """Torch-Pruning's graph of ``model``, whose parameters all require grad. Every output is a node."""

    def marked(out: Any) -> list[Tensor]:
        return [x.clone() for x in tree_leaves(out) if is_floating(x) and x.requires_grad]

    graph = import_torch_pruning().DependencyGraph()
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        try:
            return graph.build_dependency(
                model, args, forward_fn=lambda m, a: m(*a), output_transform=marked, verbose=False
            )
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__}: expected a model that Torch-Pruning can trace, got: {error}"
            ) from error


def _rows(layer: Weighted) -> Tensor:
    """The weight as [out / blocks, in, *kernel], a detached view: what each output is made with."""
    return layer.weight.detach().movedim(1 if getattr(layer, "transposed", False) else 0, 0)


def _dead(layer: Weighted) -> set[int]:
    """The outputs whose every weight is zero."""
    return set((_rows(layer) == 0).flatten(1).all(1).nonzero().flatten().tolist())


class _Coupled:
    """The outputs of one layer, and all that must go with them."""

    def __init__(self, graph: Any, root: Weighted) -> None:
        self.graph, self.root = graph, root
        self.count: int = graph.get_out_channels(root)
        self.items = self._group(range(self.count)).items

    def _group(self, channels: Any) -> Any:
        remove = self.graph.get_pruner_of_module(self.root).prune_out_channels
        return self.graph.get_pruning_group(self.root, remove, list(channels))

    def _name(self, module: Any) -> str:
        return self.graph._module2name.get(module) or type(module).__name__

    def _is_read(self, item: Any) -> bool:
        """Whether the item is a layer that reads the channels, not one that they pass or come from."""
        layer = item.dep.target.module
        return isinstance(layer, WEIGHTED) and not self.graph.is_out_channel_pruning_fn(item.dep.handler)

    def obstacle(self, kept: Mapping[str, str], fixed: Mapping[str, str]) -> str | None:
        """What forbids removing any of the channels, or None."""
        for item in self.items:
            module, kind = item.dep.target.module, item.dep.target.type.name
            name = self._name(module)
            reason = fixed.get(name) or (None if self._is_read(item) else kept.get(name))
            if kind == "OUTPUT":
                return "they are outputs of the model"
            if reason is not None:
                return reason if module is self.root else f"they go with those of {name}: {reason}"
            if isinstance(module, CONVOLUTION):
                depthwise = module.groups == module.in_channels == module.out_channels
                if module.groups > 1 and not depthwise:
                    return f"{name} is a grouped convolution"
            elif kind != "LINEAR" and kind not in CHANNELWISE:
                return f"{name} ({type(module).__name__}) takes them together"
        return None

    def unread(self) -> set[int]:
        """Those that no weight reads."""
        unread = set(range(self.count))
        for item in filter(self._is_read, self.items):
            alive = (columns(item.dep.target.module) != 0).flatten(1).any(1).tolist()
            unread -= {root for i, root in zip(item.idxs, item.root_idxs) if alive[i]}
        return unread

    def idle(self) -> set[int]:
        """Those that are dead or read by no weight, whatever forbids removing them."""
        dead = _dead(self.root)
        return dead | self.unread() if any(map(self._is_read, self.items)) else dead

    def removable(self, unread: set[int]) -> set[int]:
        """Those of ``unread`` that may go so that at least one is left in each layer concerned."""
        gone = set(unread)
        for item in self.items:
            sizes = self.graph.get_in_channels if self._is_read(item) else self.graph.get_out_channels
            size = sizes(item.dep.target)
            if size is not None and sum(root in gone for root in item.root_idxs) >= size:
                gone.discard(item.root_idxs[0])
        return gone

    @torch.no_grad()
    def silence(self, channels: set[int]) -> None:
        """Give ``channels`` zero weights, so that they read nothing either."""
        for item in self.items:
            layer = item.dep.target.module
            if isinstance(layer, WEIGHTED) and not self._is_read(item):
                _rows(layer)[[i for i, root in zip(item.idxs, item.root_idxs) if root in channels]] = 0

    def remove(self, channels: set[int]) -> None:
        self._group(sorted(channels)).prune()


def remove_unread(
    model: nn.Module,
    args: tuple[Any, ...],
    kept: Mapping[str, str],
    fixed: Mapping[str, str],
    check: Callable[[str], None],
) -> tuple[bool, dict[str, str]]:
    """Remove, in place, the outputs of Linear and convolutions that no weight reads.

    Args:
        model: in eval mode, every parameter requiring grad.
        args: an example of its arguments.
        kept: {layer name: why its outputs must stay}.
        fixed: {layer name: why the layer must stay as it is}.
        check: called with the layer's name after each change.

    Returns:
        Whether anything was removed, and {layer name: why its unread outputs stayed}.
    """
    removed, stayed = False, {}
    graph = dependency_graph(model, args)
    for name, layer in reversed(list(model.named_modules())):
        if not isinstance(layer, WEIGHTED) or layer not in graph.module2node:
            continue
        try:
            coupled = _Coupled(graph, layer)
            obstacle = coupled.obstacle(kept, fixed)
            unread = coupled.idle() if obstacle else coupled.unread()
        except Exception as error:  # whatever the library meets in a model that it does not understand
            obstacle, unread = f"Torch-Pruning cannot follow them: {error}", _dead(layer)
        if not unread:
            continue
        if obstacle:
            stayed[name] = f"dead or unread outputs that stay: {len(unread)}; {obstacle}"
            continue
        coupled.silence(unread)
        try:
            if channels := coupled.removable(unread):
                coupled.remove(channels)
                removed = True
        except Exception as error:
            raise Refused(name, f"Torch-Pruning cannot remove them: {error}") from error
        check(name)
    return removed, stayed


def gather_inputs(model: nn.Module, fixed: Mapping[str, str], check: Callable[[str], None]) -> None:
    """Cut, in place, the weights that read nothing of an input channel which could not be removed.

    The layer then picks the channels that it reads (``layer.read_inputs``, a buffer of indices) before it
    computes. Done where that saves more than the copy costs.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, WEIGHTED) or type(layer).forward not in PLAIN_FORWARDS:
            continue
        if getattr(layer, "groups", 1) > 1 or name in fixed:
            continue
        weights = columns(layer)
        alive = (weights != 0).flatten(1).any(1)
        read = alive.nonzero().flatten()
        saved = (len(alive) - len(read)) * weights[0].numel()
        if len(read) and saved > GATHER_PAYS * len(read):
            _set_columns(layer, weights[read])
            select_inputs(layer, read, len(alive))
            check(name)


def _set_columns(layer: Weighted, weights: Tensor) -> None:
    """Give ``layer`` the weight of which ``weights`` are the columns."""
    dim = 0 if getattr(layer, "transposed", False) else 1
    layer.weight = nn.Parameter(weights.movedim(0, dim).contiguous())
    setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", len(weights))


class Picking(Protocol):
    """What select_inputs adds to a layer."""

    read_inputs: Tensor
    given_inputs: int
    _pick: RemovableHandle


def picking(layer: nn.Module) -> Picking:
    """``layer`` itself: type checkers take every attribute of a module for a tensor or a module."""
    return cast(Picking, layer)


def _pick(layer: Weighted, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *rest = args
    return (x.index_select(channel_dim(layer), picking(layer).read_inputs), *rest)


def select_inputs(layer: nn.Module, read: Tensor, of: int) -> None:
    """Make ``layer`` read the input channels ``read`` (indices) of the ``of`` that it is given."""
    layer.register_buffer("read_inputs", read)
    added = picking(layer)
    added.given_inputs, added._pick = of, layer.register_forward_pre_hook(_pick)


def restore_inputs(model: nn.Module) -> None:
    """Undo :func:`select_inputs` everywhere, in place: zeros for the inputs that were not read."""
    for layer in model.modules():
        if isinstance(layer, WEIGHTED) and hasattr(layer, "read_inputs"):
            weights, added = columns(layer), picking(layer)
            whole = weights.new_zeros(added.given_inputs, *weights.shape[1:])
            whole[added.read_inputs] = weights
            _set_columns(layer, whole)
            added._pick.remove()
            del added.read_inputs, added.given_inputs, added._pick
