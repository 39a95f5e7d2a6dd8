"""Follows the channels of a network through one forward pass, operation by operation.

Beside each tensor stands one of integers: whose channel each element is, with size 1 along the dims along
which that does not vary. Operations that move elements move those integers the same way; elementwise ones
join what meets; reductions, pooling and norms pass channels that they do not take together; products with a
weight read the channels of one dim and make those of the other. Whatever else takes a channel holds it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.groups import is_dense
from . import operations as ops
from .channels import ANYBODY, NOBODY, Channels, Owners, aligned, narrowed, varying
from .running import Given, call, following, leaves, trained

Call = tuple[Any, tuple[Any, ...], dict[str, Any], Any]  # an operation, what it was given and what it gave
NORMS = nn.modules.batchnorm._NormBase
AT_OUTPUTS = "they are outputs of the model"
ALSO_FIXED = "what reads them also reads what cannot be cut"


def _lead(ids: list[Tensor]) -> Tensor:
    """What the others are joined to: it varies along the fewest dims and is nobody's in the fewest places."""
    return min(ids, key=lambda x: (len(varying(x)), int((x <= NOBODY).sum())))


class Follower(TorchDispatchMode):
    """Notes in ``channels`` what a forward pass makes of them; parameters are those of ``model``."""

    def __init__(self, model: nn.Module, channels: Channels) -> None:
        super().__init__()
        self.channels, self.owners = channels, Owners(model)
        self.model = type(model).__name__
        self.used: set[str] = set()  # parameters and buffers that operations took
        self.opaque: dict[str, str] = {}  # weights that nobody here understands, and what took them
        self.sizes: dict[tuple[int, int, int], Tensor] = {}  # channels that lay side by side
        self.stack: list[str] = []  # of modules at work
        self.calls: Counter[str] = Counter()
        self._ids: Any = WeakTensorKeyDictionary()
        # Memory of anybody's that was written in parts, by its storage, which is held so that no other takes
        # its place; and the channels of its elements.
        self._written: dict[int, tuple[Tensor, Tensor]] = {}

    # What is known of tensors

    def ids(self, x: Tensor) -> Tensor:
        """Whose channel each element of ``x`` is: the dims of ``x``, of size 1 where it does not vary."""
        if (written := self._written.get(x.untyped_storage()._cdata)) is not None:
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
            self.sizes[len(line), int(line[0]), int(line[-1])] = line
        self._ids[x] = ids

    def where(self, operation: str) -> str:
        return f"{self.stack[-1] or self.model} ({operation})" if self.stack else f"the model ({operation})"

    def take(self, operation: Any, *tensors: Tensor) -> None:
        """An operation takes all channels of ``tensors`` together."""
        where = self.where(operation if isinstance(operation, str) else ops.name(operation))
        for x in tensors:
            if self._is_owners(x):
                self.opaque[str(self.owners.name(x))] = where
            else:
                self.channels.hold(self.ids(x), f"{where} takes them together", read=True)

    def _is_owners(self, x: Tensor) -> bool:
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
        if ops.kind(func) == "turned":
            return self._turned(func, args)
        out = func(*args, **kwargs)
        names = [self.owners.name(x) for x in ops.tensors(args, kwargs)]
        self.used.update(filter(None, names))
        views = [self.owners.name(x) for x in ops.tensors((out,), {})]
        if names and names[0] is not None and names[0] in views and not ops.writes(func):
            return out  # a view of a parameter, known by its memory
        made = (func, args, kwargs, out)
        try:
            getattr(self, "_" + ops.kind(func))(made)
        except Exception as error:  # a form of the operation that its rule does not foresee
            self._opaque(made, f"{ops.name(func)}: {type(error).__name__}: {error}")
        return out

    def _shaped(self, call: Call) -> None:
        """Values that depend on a size alone: they are made in the size of what they are like, or of any."""
        func, args, _, out = call
        like = args[0] if args and isinstance(args[0], Tensor) and "_like" in ops.name(func) else None
        self.note(out, torch.full([1] * out.dim(), ANYBODY) if like is None else self.ids(like))

    def _drawn(self, call: Call) -> None:
        """Random numbers in place of what was there."""

    def _moved(self, call: Call) -> None:
        func, args, kwargs, out = call
        x = args[0]
        ids = self.ids(x)
        outs = out if isinstance(out, (list, tuple)) else [out]
        if indices := [i for i in ops.tensors(args[1:], kwargs) if bool((self.ids(i) > NOBODY).any())]:
            self.take(func, x, *indices)
            ids = torch.full_like(ids, NOBODY)
        if not varying(ids):  # also where an element is repeated: then any number of it will do
            value = int(ids.flatten()[0]) if ids.numel() else NOBODY
            repeated = value == NOBODY and ops.name(func) == "expand" and out.numel() > x.numel()
            for y in outs:
                self.note(y, torch.full([1] * y.dim(), ANYBODY if repeated else value))
            return
        if ops.name(func) in ops.BY_NUMBERS:
            self.channels.by_numbers.append((self.stack[-1] if self.stack else "", ids.unique()))
        rest, named = tree_map(lambda i: i.cpu() if isinstance(i, Tensor) else i, (args[1:], kwargs))
        moved = ops.on_ids(func)(ids.expand(x.shape), *rest, **named)
        for y, line in zip(outs, moved if isinstance(out, (list, tuple)) else [moved]):
            self.note(y, line)

    def _turned(self, func: Any, args: tuple[Any, ...]) -> Tensor:
        """Dims moved in place, after which the integers have other dims than before."""
        x, *rest = args
        ids = self.ids(x).expand(x.shape)
        out = func(x, *rest)
        self.note(out, getattr(torch.ops.aten, ops.name(func)[:-1])(ids, *rest))
        return out

    def _pointwise(self, call: Call) -> None:
        func, args, kwargs, out = call
        out = out[0] if isinstance(out, (tuple, list)) else out
        self._meet(func, ops.tensors(args, kwargs), [out], written=args[0] if ops.writes(func) else None)

    def _meet(self, func: Any, given: list[Tensor], outs: list[Tensor], written: Any = None) -> None:
        """Join what meets elementwise, broadcast, and note it for ``outs``."""
        dims = max((x.dim() for x in given), default=0)
        if written is not None and bool((self.ids(written) == ANYBODY).all()):
            self._give_elements(written)
        known = [(x, self.ids(x)) for x in given]
        known = [(x, ids.reshape(aligned(ids.shape, dims))) for x, ids in known]
        varied = {dim for _, ids in known for dim in varying(ids)}
        real = []
        for x, ids in known:
            sizes = aligned(x.shape, dims)
            free = bool((ids == ANYBODY).all()) or (
                bool((ids == NOBODY).all()) and all(sizes[dim] == 1 for dim in varied)
            )
            if not free:
                real.append(ids.clamp(min=NOBODY))
        if not real:
            anybody = bool(known) and all(bool((ids == ANYBODY).all()) for _, ids in known)
            for out in outs:
                self.note(out, torch.full([1] * out.dim(), ANYBODY if anybody else NOBODY))
            return
        fixed = [ids for ids in real if not self.channels.are_loose(ids) and bool((ids > NOBODY).any())]
        lead = _lead(fixed or real)
        for ids in real:
            if ids is not lead:
                why = f"in {self.where(ops.name(func))} they meet what cannot be cut"
                self.channels.join(lead, ids, why)
        for out in outs:
            self.note(out, lead)

    def _give_elements(self, x: Tensor) -> None:
        """Tell the elements of what ``x`` is a part of apart, since they are about to be written."""
        storage = x.untyped_storage()
        if x.numel() > 1:
            count = storage.nbytes() // x.element_size()
            self._written[storage._cdata] = x, self.channels.new_loose(count)

    def _joined(self, call: Call) -> None:
        """cat and stack. Along another dim than the joined one, what is joined must stay alike."""
        func, args, kwargs, out = call
        dim = ops.bound(func, args, kwargs).get("dim", 0) % out.dim()
        pieces = [x for x in args[0] if x.dim() == args[0][-1].dim() and x.numel()]
        known = [(self.ids(x), x.shape) for x in pieces]
        if ops.name(func) == "stack":
            known = [(ids.unsqueeze(dim), (*s[:dim], 1, *s[dim:])) for ids, s in known]
        across = [ids for ids, _ in known if any(d != dim for d in varying(ids))]
        fixed = [ids for ids in across if not self.channels.are_loose(ids)]
        if not fixed:
            self.note(out, torch.cat([ids.expand(shape) for ids, shape in known], dim))
            return
        lead = _lead(fixed)
        dims = {d for ids in across for d in varying(ids)}
        for ids, shape in known:
            broadcasts = all(shape[d] == 1 for d in dims if d != dim)
            if ids is not lead and not (broadcasts and bool((ids == NOBODY).all())):
                self.channels.join(lead, ids, f"in {self.where('cat')} they meet what cannot be cut")
        self.note(out, lead.narrow(dim, 0, 1))

    def _padded(self, call: Call) -> None:
        _, args, _, out = call
        ids = self.ids(args[0])
        sides = list(args[1])
        for i in range(len(sides) // 2):
            if ids.shape[-1 - i] == 1:
                sides[2 * i : 2 * i + 2] = 0, 0  # of no other channel than what is inside
        self.note(out, torch.constant_pad_nd(ids, sides, NOBODY))

    def _spatial(self, call: Call) -> None:
        """Pooling, interpolation and padding by what is there: over the last dims alone."""
        func, args, _, out = call
        ids = self.ids(args[0])
        if any(dim >= ids.dim() - ops.spatial_dims(func) for dim in varying(ids)):
            return self._opaque(call)
        for y in out if isinstance(out, (list, tuple)) else [out]:
            self.note(y, ids)

    def _reduced(self, call: Call) -> None:
        func, args, kwargs, out = call
        x = args[0]
        ids = self.ids(x)
        over = ops.reduced_dims(func, args, kwargs)
        if any(dim in over for dim in varying(ids)):
            return self._opaque(call)
        for y in out if isinstance(out, (list, tuple)) else [out]:
            kept = [d for d in range(x.dim()) if d not in over or y.dim() == x.dim()]
            self.note(y, ids.reshape([ids.shape[d] for d in kept]))

    def _layer_normed(self, call: Call) -> None:
        _, args, _, out = call
        ids = self.ids(args[0])
        if any(dim >= ids.dim() - len(args[1]) for dim in varying(ids)):
            return self._opaque(call)
        self.note(out[0], ids)

    def _batch_normed(self, call: Call) -> None:
        func, args, _, out = call
        x, *others = args
        if self.channels.are_loose(self.ids(x)):  # a parameter: it is a weight that is computed
            return self._opaque(call)
        line = self.line(func, x, 1)
        for other in others:
            if isinstance(other, Tensor):
                self.channels.join(line, self.ids(other), "their batch norm is of what cannot be cut")
        self.note(out[0] if isinstance(out, (list, tuple)) else out, self.ids(x))

    def _halved(self, call: Call) -> None:
        """glu: the one half times a function of the other."""
        func, args, kwargs, out = call
        dim = ops.bound(func, args, kwargs).get("dim", -1) % args[0].dim()
        ids = self.ids(args[0])
        if dim in varying(ids):
            ids, other = ids.chunk(2, dim)
            self.channels.join(ids, other, "")
        self.note(out, ids)

    # Products

    def _whole(self, w: Tensor) -> str | None:
        """Whose name ``w`` is, where it is a parameter as it stands."""
        name = self.owners.name(w)
        if name is None or name in self.owners.shared or w is not self.owners.tensors[name]:
            return None
        return name

    def _embedded(self, call: Call) -> None:
        _, args, _, out = call
        if (name := self._whole(args[0])) is None:
            return self._opaque(call)
        made = self.channels.use(name, args[0], makes=1).ids[1]
        self.note(out, made.reshape(aligned(made.shape, out.dim())))

    def _convolved(self, call: Call) -> None:
        func, args, _, out = call
        x, w, bias = args[:3]
        transposed, groups = bool(args[6]), args[8]
        if (name := self._whole(w)) is None:
            return self._opaque(call)
        line = self.line(func, x, 1)
        if groups == 1:
            read, make = (0, 1) if transposed else (1, 0)
            weight = self.channels.use(name, w, reads=read, makes=make)
            self.channels.join(line, weight.ids[read], ALSO_FIXED)
            made = weight.ids[make]
        elif groups == len(line) and not (transposed and w.shape[1] > 1):  # depthwise
            made = self.channels.use(name, w, makes=0).ids[0]
            self.channels.join(line.repeat_interleave(len(made) // groups), made, ALSO_FIXED)
        else:
            reason = f"{self.where('convolution')} works in {groups} groups"
            self.channels.hold(line, reason, read=True)
            weight = self.channels.use(name, w, makes=None if transposed else 0)
            made = weight.ids.get(0, torch.full((out.shape[1],), NOBODY))
            self.channels.hold(made, reason)
        if isinstance(bias, Tensor):
            self.channels.join(made, self.ids(bias), "")
        self.note(out, made.reshape(1, -1, *[1] * (out.dim() - 2)))

    def _multiplied(self, call: Call) -> None:
        """mm, bmm and those that add something: [..., n, k] times [..., k, m]."""
        func, args, _, out = call
        *added, a, b = args[: 3 if ops.name(func) in ("addmm", "baddbmm") else 2]
        if part := self.owners.part(b):
            ids = self._read(func, part, a, -1, b.shape[-1])
            made = ids.reshape(aligned(ids.shape, out.dim()))
        elif part := self.owners.part(a):
            ids = self._read(func, (part[0], part[1][::-1]), b, -2, a.shape[-2])
            made = ids.reshape(aligned((len(ids), 1), out.dim()))
        elif self._is_owners(a) or self._is_owners(b):
            return self._opaque(call)
        else:
            made = self._contracted(func, a, b)
        self.note(out, made)
        if added:
            self._meet(func, [*added, out], [out])

    def _read(
        self, func: Any, part: tuple[str, list[tuple[int, int]]], x: Tensor, dim: int, count: int
    ) -> Tensor:
        """A weight, or a part of it, reads ``x`` along ``dim``; the channels that it makes."""
        name, ((read, first), (make, start)) = part
        line = self.line(func, x, dim)
        ids = self.channels.use(name, self.owners.tensors[name], reads=read, makes=make).ids
        self.channels.join(line, ids[read][first : first + len(line)], ALSO_FIXED)
        return ids[make][start : start + count]

    def _contracted(self, func: Any, a: Tensor, b: Tensor) -> Tensor:
        """A product of two activations: the channels of the rows of ``a`` or of the columns of ``b``."""
        rows, columns = self.ids(a), self.ids(b)
        n, m = rows.dim() - 2, rows.dim() - 1
        if any(dim != n for dim in varying(rows)):
            self.take(func, a)
            rows = torch.full_like(rows, NOBODY)
        if any(dim != m for dim in varying(columns)):
            self.take(func, b)
            columns = torch.full_like(columns, NOBODY)
        rows, columns = narrowed(rows), narrowed(columns)
        if varying(rows) and varying(columns):
            self.take(func, a, b)
            return torch.full_like(rows[..., :1, :1], NOBODY)
        return rows if varying(rows) else columns

    def _opaque(self, call: Call, known_as: str = "") -> None:
        """An operation that nobody here understands."""
        func, args, kwargs, out = call
        self.take(known_as or func, *ops.tensors(args, kwargs))
        for y in ops.tensors((out,), {}):
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
                    for x in filter(lambda x: isinstance(x, Tensor), leaves(out)):
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

    def hold_outputs(self, out: Any) -> None:
        for x in leaves(out):
            if isinstance(x, Tensor):
                self.channels.hold(self.ids(x), AT_OUTPUTS, read=True)


def follow(model: nn.Module, given: Given, keep: Collection[str]) -> tuple[Channels, dict[str, str]]:
    """The channels of ``model``, in eval mode, and the weights that take channels in a way unknown here.

    Where parameters take no part in that, it is followed once more in training mode, as auxiliary heads want;
    whatever could still meet a parameter that takes no part is held.

    Raises:
        ValueError: the forward pass fails; the module is named.
    """
    channels = Channels()
    opaque: dict[str, str] = {}

    def run() -> Follower:
        follower = Follower(model, channels)
        with following(), follower.attached(model, keep):
            try:
                out = call(model, given)
            except Exception as error:
                where = (follower.stack and follower.stack[-1]) or type(model).__name__
                raise ValueError(
                    f"{where}: expected a forward pass on example_input, got {type(error).__name__}: {error}"
                ) from error
        follower.hold_outputs(out)
        opaque.update(follower.opaque)
        return follower

    first = run()
    channels.called = {w.layer for w in channels.weights.values() if w.uses == first.calls[w.layer]}
    unused = {name for name, x in first.owners.tensors.items() if isinstance(x, nn.Parameter)} - first.used
    sizes = first.sizes
    if unused:
        uses = {name: weight.uses for name, weight in channels.weights.items()}
        with contextlib.suppress(ValueError), trained(model):
            second = run()
            unused -= second.used
            sizes = {**sizes, **second.sizes}
        for name, weight in channels.weights.items():
            weight.uses = uses.get(name, 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase) and (module.num_layers > 1 or module.bidirectional):
            for key, _ in module.named_parameters():
                if key.startswith("weight_hh") and f"{name}.{key}" in channels.weights:
                    weight = channels.weights[f"{name}.{key}"]
                    reason = f"the layers and directions of {name} have one hidden_size"
                    channels.hold(weight.ids.get(1, torch.tensor([NOBODY])), reason)
    for name in channels.loose.keys() & channels.weights.keys() | opaque.keys():
        own = channels.weights.get(name)
        for ids in (channels.loose.get(name), *(own.ids.values() if own else ())):
            if ids is not None:
                channels.hold(ids, f"{name} is used in more than one way", read=True)
    for held in [held for held in channels.held if held.read]:
        for name in channels.loose_of(held.ids):
            opaque.setdefault(name, held.reason)
    may_meet = {size: name for name in sorted(unused) for size in first.owners.tensors[name].shape}
    for (size, *_), line in sizes.items():
        if size in may_meet:
            layer = may_meet[size].rpartition(".")[0] or may_meet[size]
            channels.hold(line, f"{layer} takes no part in the forward pass, but may read them")
    return channels, opaque
