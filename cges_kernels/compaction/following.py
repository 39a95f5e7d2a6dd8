"""Follows the channels of a network through one forward pass, operation by operation.

For each tensor a tensor of integers holds the channel of each element, with size 1 along dims along which
channels do not vary. Operations that move elements move those integers the same way. Elementwise operations
join the channels of their operands. Reductions, pooling and norms pass channels on, unless they combine
several of them. Products with a weight read the channels of one dim and make those of the other. Any other
operation that takes a channel holds it. `follow` does this for compact().
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.calls import Given, tensors_in
from ..core.dispatch import EachOperation
from ..reporting.report import in_mode
from . import operations as ops
from . import products, rules
from .beside import Beside, Call
from .channels import Channels, varying
from .running import following, fresh, run

NORMS = nn.modules.batchnorm._NormBase
LARGE = 2**18  # a tensor of more elements is not followed element by element
AT_OUTPUTS = "they are outputs of the model"

# The rule for each kind of operation. Those that draw random numbers or move nothing change no channels.
RULES: dict[str, Callable[[Any, Call], None]] = {
    **{
        rule.__name__: rule
        for rule in (
            *(rules.shaped, rules.moved, rules.turned, rules.pointwise, rules.joined, rules.padded),
            *(rules.packed, rules.spatial, rules.reduced),
            *(rules.layer_normed, rules.batch_normed, rules.halved),
            *(products.embedded, products.convolved, products.multiplied),
        )
    },
    **dict.fromkeys(("drawn", "still"), lambda follower, call: None),
    "opaque": lambda follower, call: follower.take_all(call),
}


class Follower(Beside, EachOperation):
    """The dispatch mode that applies a rule to each operation of a forward pass."""

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind = "still" if ops.moves_nothing(func, args) else ops.kind(func)
        before = self.ids(args[0]).expand(args[0].shape) if kind == "turned" else None
        out = func(*args, **kwargs)
        if any(x in self.given for x in ops.tensors(args, kwargs)):
            for x in ops.tensors((out,), {}):
                self.given[x] = True
        tensors = ops.tensors(args, kwargs)
        names = [self.owners.name(x) for x in tensors]
        self.used.update(filter(None, names))
        views = [self.owners.name(x) for x in ops.tensors((out,), {})]
        if names and names[0] is not None and names[0] in views and not ops.writes(func):
            return out  # a view of a parameter needs no note: it is known by its memory
        if ops.scales(func, args) and self.owners.add_multiple(out, args[0]):
            return out
        if tensors and all(self.is_owners(x) or x in self.computed for x in tensors):
            for y in ops.tensors((out,), {}):
                self.computed[y] = True
            if kind != "drawn" and max(x.numel() for x in tensors) > LARGE:
                kind = "opaque"  # so large a tensor is a weight that is computed, and no table to add
        made = Call(func, args, kwargs, out, before)
        try:
            RULES[kind](self, made)
        except Exception as error:  # the rule does not know this form of the operation
            self.take_all(made, f"{ops.name(func)}: {type(error).__name__}: {error}")
        return out

    @contextlib.contextmanager
    def attached(self, model: nn.Module, keep: Collection[str]) -> Iterator[None]:
        """Follow operations within the block, module by module, and hold the outputs of those in `keep`."""

        def before(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any) -> None:
                self.stack.append(name)
                self.calls[name] += 1
                if isinstance(module, NORMS) and module.weight is None and module.running_mean is None:
                    ids = self.ids(args[0])
                    if varying(ids) == [1]:
                        self.channels.widths[name] = ids.flatten()

            return hook

        def after(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, out: Any) -> None:
                self.stack.pop()
                if name in keep:
                    for x in tensors_in(out):
                        self.channels.hold(self.ids(x), "asked for")

            return hook

        hooks = []
        for name, module in model.named_modules():
            hooks.append(module.register_forward_pre_hook(before(name)))
            hooks.append(module.register_forward_hook(after(name)))
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()


@dataclass
class Followed:
    """The result of following a network."""

    channels: Channels
    opaque: dict[str, str]  # {weight: why it is not followed}
    outputs: list[Any]  # the outputs of the model in eval mode
    trained: list[Any] | None  # its outputs in training mode; None if it fails there


def follow(model: nn.Module, given: Given, keep: Collection[str]) -> Followed:
    """The channels of `model`, which is in eval mode.

    It is followed in eval mode and, if it runs there, in training mode too, because other heads may read
    channels and other values may be returned there. Channels that a parameter could read which took part in
    neither pass are held.

    Raises:
        Exception: whatever the forward pass in eval mode raises.
    """
    channels = Channels()
    opaque: dict[str, str] = {}

    def once() -> tuple[Follower, list[Any]]:
        follower = Follower(model, channels)
        arguments = fresh(given)
        for x in tensors_in(arguments):
            follower.given[x] = True
        with following(), follower.attached(model, keep):
            out = run(model, arguments)
        tensors = tensors_in(out)
        for x in tensors:
            channels.hold(follower.ids(x), AT_OUTPUTS, read=True)
        if not tensors:
            channels.hold(torch.arange(channels.count), "the outputs of the model are no tensors", read=True)
        opaque.update(follower.opaque)
        return follower, out

    first, outputs = once()
    channels.called = {w.layer: w.uses for w in channels.weights.values() if w.uses == first.calls[w.layer]}
    unused = {name for name, x in first.owners.tensors.items() if isinstance(x, nn.Parameter)} - first.used
    sizes = first.sizes
    uses = {name: weight.uses for name, weight in channels.weights.items()}
    compared = {placed.text for placed in channels.by_numbers}
    trained = None
    with contextlib.suppress(Exception), in_mode(model, train=True):
        second, out = once()
        unused -= second.used
        sizes = {**sizes, **second.sizes}
        trained = out
    for name, weight in channels.weights.items():  # the count was over both modes: take the larger one
        weight.uses = max(uses.get(name, 0), weight.uses - uses.get(name, 0))
    for placed in channels.by_numbers:
        if placed.chooses and placed.text not in compared:
            where = placed.module or type(model).__name__
            channels.hold(placed.ids, f"{where} chooses them by numbers in training mode alone")
    _hold_what_may_be_read(channels, {name: first.owners.tensors[name] for name in unused}, sizes.values())
    _hold_recurrent(channels, model)
    for name in (channels.loose.keys() & channels.weights.keys()) | opaque.keys():
        own = channels.weights.get(name)
        for ids in (channels.loose.get(name), *(own.ids.values() if own else ())):
            if ids is not None:
                channels.hold(ids, f"{name} is used in more than one way", read=True)
    for held in [held for held in channels.held if held.read]:
        for name in channels.loose_of(held.ids):
            opaque.setdefault(name, held.reason)
    return Followed(channels, opaque, outputs, trained)


def _hold_what_may_be_read(channels: Channels, unused: Mapping[str, Tensor], lines: Iterable[Tensor]) -> None:
    """Hold lines of channels whose number fits a parameter that took no part in the passes.

    Nothing but the number of channels that such a parameter would read is known.
    """
    for line in lines:
        for name, x in sorted(unused.items()):
            read = x.shape[1] if x.dim() > 1 else 0  # a multiple, where channels are flattened before it
            if len(line) in x.shape or (read and read % len(line) == 0):
                layer = name.rpartition(".")[0] or name
                channels.hold(line, f"{layer} takes no part in the forward pass, but may read them")
                break


def _hold_recurrent(channels: Channels, model: nn.Module) -> None:
    """Hold hidden units where layers, directions or a projection of one module share a hidden_size."""
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase) and (
            module.num_layers > 1 or module.bidirectional or module.proj_size
        ):
            for key, _ in module.named_parameters():
                for ids in getattr(channels.weights.get(f"{name}.{key}"), "ids", {}).values():
                    channels.hold(ids, f"the layers and directions of {name} have one hidden_size")
