"""Follows the channels of a network through one forward pass, operation by operation.

Beside each tensor stands one of integers: whose channel each element is, with size 1 along the dims along
which that does not vary. Operations that move elements move those integers the same way; elementwise ones
join what meets; reductions, pooling and norms pass channels that they do not take together; products with a
weight read the channels of one dim and make those of the other. Whatever else takes a channel holds it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.calls import Given, call, tensors_in
from ..core.groups import is_dense
from . import operations as ops
from . import products, rules
from .channels import NOBODY, Channels, Owners, narrowed, varying
from .running import following, fresh, training, unchanged

NORMS = nn.modules.batchnorm._NormBase
AT_OUTPUTS = "they are outputs of the model"


class Call(NamedTuple):
    """An operation, what it was given and what it gave."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    before: Tensor | None  # the channels of what it moves in place

    @property
    def outs(self) -> list[Any]:
        return list(self.out) if isinstance(self.out, (list, tuple)) else [self.out]


# What each kind of operation makes of channels. Those that draw numbers change none.
RULES: dict[str, Callable[[Any, Call], None]] = {
    **{
        rule.__name__: rule
        for rule in (
            *(rules.shaped, rules.moved, rules.turned, rules.pointwise, rules.joined, rules.padded),
            *(rules.spatial, rules.reduced, rules.layer_normed, rules.batch_normed, rules.halved),
            *(products.embedded, products.convolved, products.multiplied),
        )
    },
    "drawn": lambda follower, call: None,
    "opaque": lambda follower, call: follower.take_all(call),
}


class Follower(TorchDispatchMode):
    """Notes in ``channels`` what a forward pass makes of them; parameters are those of ``model``."""

    def __init__(self, model: nn.Module, channels: Channels) -> None:
        super().__init__()
        self.channels, self.owners = channels, Owners(model)
        self.model = type(model).__name__
        self.used: set[str] = set()  # parameters and buffers that operations took
        self.opaque: dict[str, str] = {}  # weights that nobody here understands, and what took them
        self.sizes: dict[bytes, Tensor] = {}  # channels that lay side by side
        self.stack: list[str] = []  # of modules at work
        self.calls: Counter[str] = Counter()
        self.given: Any = WeakTensorKeyDictionary()  # what the model is passed, and all that comes of it
        self._ids: Any = WeakTensorKeyDictionary()
        # Memory of anybody's that was written in parts, by its storage, which is held so that no other takes
        # its place; and the channels of its elements.
        self.written: dict[int, tuple[Tensor, Tensor]] = {}

    # What is known of tensors

    def ids(self, x: Tensor) -> Tensor:
        """Whose channel each element of ``x`` is: the dims of ``x``, of size 1 where it does not vary."""
        if (written := self.written.get(x.untyped_storage()._cdata)) is not None:
            return narrowed(written[1].as_strided(x.shape, x.stride(), x.storage_offset()))
        if x in self._ids:
            return self._ids[x]
        nobody = torch.full([1] * x.dim(), NOBODY)
        if (name := self.owners.name(x)) is None or name in self.owners.shared or x.numel() == 1:
            return nobody
        whole = self.owners.tensors[name]
        if whole.numel() == 1 or not is_dense(whole):
            return nobody
        if name not in self.channels.loose:
            self.channels.loose[name] = self.channels.new_loose(whole.numel())
        first = x.storage_offset() - whole.storage_offset()
        return narrowed(self.channels.loose[name].as_strided(x.shape, x.stride(), first))

    def note(self, x: Any, ids: Tensor) -> None:
        """``x`` holds these channels. Along two dims they could not be cut out of it."""
        if not isinstance(x, Tensor) or x.dim() != ids.dim():
            return
        ids = narrowed(ids)
        dims = varying(ids)
        if len(dims) > 1 and not self.channels.are_loose(ids):
            self.channels.hold(ids, f"{self.where('reshaped')} lays them out along two dims", read=True)
            ids = torch.full([1] * x.dim(), NOBODY)
        elif len(dims) == 1:
            line = ids.flatten()
            self.sizes[line.numpy().tobytes()] = line
        self._ids[x] = ids

    def where(self, operation: str) -> str:
        return f"{self.stack[-1] or self.model} ({operation})" if self.stack else f"the model ({operation})"

    def take(self, operation: Any, *tensors: Tensor) -> None:
        """An operation takes all channels of ``tensors`` together."""
        where = self.where(operation if isinstance(operation, str) else ops.name(operation))
        for x in tensors:
            if self.is_owners(x):
                self.opaque[str(self.owners.name(x))] = where
            else:
                self.channels.hold(self.ids(x), f"{where} takes them together", read=True)

    def is_owners(self, x: Tensor) -> bool:
        """Whether it is a parameter or buffer, or a view of one."""
        return self.owners.name(x) is not None and x not in self._ids

    def line(self, func: Any, x: Tensor, dim: int) -> Tensor:
        """The channels of ``x`` along ``dim``, the only one along which they may vary: [x.shape[dim]]."""
        ids = self.ids(x)
        dim %= x.dim()
        if any(d != dim for d in varying(ids)):
            lines = ids.movedim(dim, 0).flatten(1)
            if not self.channels.are_loose(ids):
                self.take(func, x)
                return torch.full((x.shape[dim],), NOBODY)
            self.channels.join(lines, lines[:, :1], "")
            return lines[:, 0].expand(x.shape[dim])
        return ids.flatten().expand(x.shape[dim])

    # Operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:  # a composite arrives whole where tensors were made in inference mode
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        kind = ops.kind(func)
        before = self.ids(args[0]).expand(args[0].shape) if kind == "turned" else None
        out = func(*args, **kwargs)
        if any(x in self.given for x in ops.tensors(args, kwargs)):
            for x in ops.tensors((out,), {}):
                self.given[x] = True
        names = [self.owners.name(x) for x in ops.tensors(args, kwargs)]
        self.used.update(filter(None, names))
        views = [self.owners.name(x) for x in ops.tensors((out,), {})]
        if names and names[0] is not None and names[0] in views and not ops.writes(func):
            return out  # a view of a parameter, known by its memory
        made = Call(func, args, kwargs, out, before)
        try:
            RULES[kind](self, made)
        except Exception as error:  # a form of the operation that its rule does not foresee
            self.take_all(made, f"{ops.name(func)}: {type(error).__name__}: {error}")
        return out

    def take_all(self, call: Call, known_as: str = "") -> None:
        """An operation that nobody here understands."""
        self.take(known_as or call.func, *ops.tensors(call.args, call.kwargs))
        for y in ops.tensors(call.outs, {}):
            self.note(y, torch.full([1] * y.dim(), NOBODY))

    # Modules

    @contextlib.contextmanager
    def attached(self, model: nn.Module, keep: Collection[str]) -> Iterator[None]:
        """Knows which module works, and holds the outputs of those in ``keep``."""

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


def follow(model: nn.Module, given: Given, keep: Collection[str]) -> tuple[Channels, dict[str, str]]:
    """The channels of ``model``, and the weights that take channels in a way unknown here.

    It is followed in eval mode and, where it runs so, in training mode too, in which other heads may read and
    other values be given. Whatever could still meet a parameter that takes part in neither is held.

    Raises:
        Exception: whatever the forward pass in eval mode raises.
    """
    channels = Channels()
    opaque: dict[str, str] = {}

    def run() -> Follower:
        follower = Follower(model, channels)
        arguments = fresh(given)
        for x in tensors_in(arguments):
            follower.given[x] = True
        with unchanged(model), following(), follower.attached(model, keep):
            out = call(model, arguments)
        for x in tensors_in(out):
            channels.hold(follower.ids(x), AT_OUTPUTS, read=True)
        opaque.update(follower.opaque)
        return follower

    first = run()
    channels.called = {w.layer for w in channels.weights.values() if w.uses == first.calls[w.layer]}
    unused = {name for name, x in first.owners.tensors.items() if isinstance(x, nn.Parameter)} - first.used
    sizes = first.sizes
    uses = {name: weight.uses for name, weight in channels.weights.items()}
    compared = {placed.text for placed in channels.by_numbers}
    with contextlib.suppress(Exception), training(model):
        second = run()
        unused -= second.used
        sizes = {**sizes, **second.sizes}
    for name, weight in channels.weights.items():  # of the mode in which it is used more often
        weight.uses = max(uses.get(name, 0), weight.uses - uses.get(name, 0))
    for placed in channels.by_numbers:
        if placed.text not in compared:
            reason = (
                f"{placed.module or type(model).__name__} lays them out by numbers in training mode alone"
            )
            channels.hold(placed.ids, reason)
    _hold_what_may_be_read(channels, {name: first.owners.tensors[name] for name in unused}, sizes.values())
    _hold_recurrent(channels, model)
    for name in channels.loose.keys() & channels.weights.keys() | opaque.keys():
        own = channels.weights.get(name)
        for ids in (channels.loose.get(name), *(own.ids.values() if own else ())):
            if ids is not None:
                channels.hold(ids, f"{name} is used in more than one way", read=True)
    for held in [held for held in channels.held if held.read]:
        for name in channels.loose_of(held.ids):
            opaque.setdefault(name, held.reason)
    return channels, opaque


def _hold_what_may_be_read(channels: Channels, unused: Mapping[str, Tensor], lines: Iterable[Tensor]) -> None:
    """Of parameters that took no part it is known how many channels they read, if they ever do."""
    for line in lines:
        for name, x in sorted(unused.items()):
            read = x.shape[1] if x.dim() > 1 else 0  # flattened, perhaps, and so a multiple
            if len(line) in x.shape or (read and read % len(line) == 0):
                layer = name.rpartition(".")[0] or name
                channels.hold(line, f"{layer} takes no part in the forward pass, but may read them")
                break


def _hold_recurrent(channels: Channels, model: nn.Module) -> None:
    """Layers and directions of an LSTM have one hidden_size, a projection another."""
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase) and (
            module.num_layers > 1 or module.bidirectional or module.proj_size
        ):
            for key, _ in module.named_parameters():
                for ids in getattr(channels.weights.get(f"{name}.{key}"), "ids", {}).values():
                    channels.hold(ids, f"the layers and directions of {name} have one hidden_size")
