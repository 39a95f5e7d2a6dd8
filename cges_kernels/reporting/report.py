"""`sparsity_report`: counts a trained model's zeros per layer, in weights, groups, units and FLOPs.

A zero is an exact zero; nothing here rounds. FLOPs are those of torch's own counter (a multiply and an add
are two), for the example batch as it is given. compact() measures its FLOPs here as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from ..core.calls import Given, arguments_of, call, leaves
from ..core.dispatch import EachOperation
from ..core.groups import NAMED_SPECS, GroupSpec, has_groups, reduced_dims, viewed
from ..core.tensors import check_whole
from ..training.layers import LayerWeight, regularised_weights
from .explain import Table


@dataclass(frozen=True)
class LayerReport:
    """The sparsity of one weight tensor, or of all together.

    Attributes:
        name: the parameter's name, or "total".
        shape: the weight's shape; () for the total.
        weights: the number of weights.
        nonzero: how many of them are not exactly 0.
        groups: the number of groups under the report's spec.
        dead_groups: how many of these are all zero.
        outputs: the number of output units.
        dead_outputs: output units whose every weight is zero, so that their output is their bias.
        inputs: the number of input units or channels.
        dead_inputs: input units or channels that no weight reads.
        by_spec: (dead groups, groups) under each named spec.
        flops: the FLOPs of one forward pass, dense. This and the next two are None without an example input.
        flops_nonzero: `flops * nonzero / weights`, as the thesis counts.
        flops_compacted: the FLOPs of this layer without its dead outputs and dead inputs.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    nonzero: int
    groups: int
    dead_groups: int
    outputs: int
    dead_outputs: int
    inputs: int
    dead_inputs: int
    by_spec: dict[str, tuple[int, int]]
    flops: float | None = None
    flops_nonzero: float | None = None
    flops_compacted: float | None = None

    @property
    def percent_nonzero(self) -> float:
        """The percentage of weights that are not exactly 0."""
        return 100 * self.nonzero / max(self.weights, 1)

    def to_dict(self) -> dict[str, Any]:
        """The fields and `percent_nonzero`, without FLOPs where they are unknown; JSON takes it."""
        fields = {**asdict(self), "percent_nonzero": self.percent_nonzero}
        fields["by_spec"] = {
            key: {"dead": dead, "groups": groups} for key, (dead, groups) in self.by_spec.items()
        }
        return {key: value for key, value in fields.items() if value is not None}

    def cells(self) -> list[str]:
        """The cells of one row of the report's table."""
        dead = [(self.dead_groups, self.groups), (self.dead_outputs, self.outputs)]
        dead.append((self.dead_inputs, self.inputs))
        flops = [x for x in (self.flops, self.flops_nonzero, self.flops_compacted) if x is not None]
        cells = [
            self.name,
            "x".join(map(str, self.shape)),
            f"{self.weights:,}",
            f"{self.percent_nonzero:.2f}%",
        ]
        return [*cells, *(f"{n:,}/{all_:,}" for n, all_ in dead), *(f"{x:,.0f}" for x in flops)]


@dataclass(frozen=True)
class SparsityReport:
    """The sparsity of a model; `str()` gives a table, `to_dict()` plain numbers that JSON takes.

    Attributes:
        group_by: the spec whose groups were counted.
        layers: a LayerReport per layer, in order.
        other_flops: FLOPs of operations that use no listed weight, such as attention's q @ k.T; None without
            an example input.
    """

    group_by: GroupSpec
    layers: tuple[LayerReport, ...]
    other_flops: int | None = None

    @property
    def total(self) -> LayerReport:
        """The sum of the layers; `other_flops` is part of each of its three FLOPs."""
        columns = [key for key in LayerReport.__dataclass_fields__ if key not in ("name", "shape", "by_spec")]
        counts: dict[str, Any] = {
            key: sum(getattr(r, key) for r in self.layers) for key in columns if "flops" not in key
        }
        counts["by_spec"] = {
            spec: tuple(map(sum, zip(*(r.by_spec[spec] for r in self.layers)))) for spec in NAMED_SPECS
        }
        if self.other_flops is not None:
            for key in ("flops", "flops_nonzero", "flops_compacted"):
                counts[key] = sum(getattr(r, key) for r in self.layers) + self.other_flops
        return LayerReport("total", (), **counts)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers and strings.

        Returns:
            A dict with the keys "group_by", "layers" (a list with one dict per layer), "total" (a dict with
                the same keys) and, where it is known, "other_flops".
        """
        layers = [layer.to_dict() for layer in self.layers]
        other = {} if self.other_flops is None else {"other_flops": self.other_flops}
        return {"group_by": self.group_by, "layers": layers, "total": self.total.to_dict(), **other}

    def by_spec(self) -> Table:
        """A printable table of the dead groups under each named spec, as dead/all."""
        cells = (
            (r.name, *(f"{r.by_spec[spec][0]:,}/{r.by_spec[spec][1]:,}" for spec in NAMED_SPECS))
            for r in (*self.layers, self.total)
        )
        return Table(("dead groups", *NAMED_SPECS), tuple(cells))

    def __str__(self) -> str:
        header = ["layer", "shape", "weights", "nonzero", "dead groups", "dead outputs", "dead inputs"]
        rows = [layer.cells() for layer in self.layers]
        if self.other_flops is not None:
            header += ["FLOPs", "x nonzero", "without dead"]
            rows.append(["(other)", *[""] * 6, *[f"{self.other_flops:,}"] * 3])
        return str(Table(tuple(header), (*map(tuple, rows), tuple(self.total.cells())), left=2))


def sparsity_report(
    model: nn.Module,
    example_input: Any = None,
    group_by: GroupSpec = "feature",
    *,
    kwargs: Mapping[str, Any] | None = None,
) -> SparsityReport:
    """Reports the sparsity and the cost of each layer of a model.

    The layers are those of [`sparsity_param_groups`][cges_kernels.sparsity_param_groups], and frozen ones
    too. The numbers of a layer come from its own weight alone: a unit that is dead in one layer is not
    removed from the next, whose input it may or may not be.

    `flops_compacted` is flops times the fraction of the weight left when dead outputs and dead inputs are cut
    out, block by block in a grouped convolution. Under "feature" an input is one kernel tap of one channel (a
    column of the convolution's matrix), under any other spec a whole channel. An operation with two listed
    weights counts for the first. The printed table calls it "without dead". What a smaller dense network
    costs is another number, which [`compact`][cges_kernels.compact] gives.

    Args:
        model: the model, with initialised parameters.
        example_input: the model's argument, a tuple of its arguments, or a dict of them by name. The model
            runs once on it, in eval mode and without gradients, and is left as it was, torch's random state
            too. With None (default), and without `kwargs`, there are no FLOPs.
        group_by: the spec whose groups are counted, "feature" by default.
        kwargs: more of the model's arguments by name.

    Returns:
        A report with the properties `layers` and `total`. `str()` of it is a table, `to_dict()` has plain
            numbers, and `by_spec()` is a table of the dead groups under each named spec.

    Raises:
        ValueError: no layer to report, a lazy parameter, a weight that is sharded or on the meta device, or
            a layer that `group_by` does not fit.

    Examples:
        >>> print(sparsity_report(model, x))
        >>> sparsity_report(model).total.percent_nonzero
    """
    layers = regularised_weights(model, frozen=True)
    for layer in layers:
        check_whole(layer.name, layer.param)
    measured: list[dict[str, Any]] = [_count(layer, group_by) for layer in layers]
    other = None
    if example_input is not None or kwargs:
        given = arguments_of(() if example_input is None else example_input, kwargs)
        *dense, other = measure_flops(model, given, [layer.param for layer in layers])
        for layer, counts, flops in zip(layers, measured, dense):
            counts["flops"] = flops
            counts["flops_nonzero"] = flops * counts["nonzero"] / max(counts["weights"], 1)
            counts["flops_compacted"] = flops * _fraction_left(layer, group_by)
    reports = (LayerReport(w.name, tuple(w.param.shape), **counts) for w, counts in zip(layers, measured))
    return SparsityReport(group_by, tuple(reports), other)


@torch.no_grad()
def _alive(layer: LayerWeight, group_by: GroupSpec) -> Tensor:
    """For each group, whether any of its weights is nonzero."""
    spec, view = layer.group_spec(group_by)
    alive = viewed(layer.param, view) != 0
    dims = reduced_dims(alive.dim(), spec) if has_groups(alive.dim(), spec) else ()
    return alive.any(dim=dims) if dims else alive


@torch.no_grad()
def _count(layer: LayerWeight, group_by: GroupSpec) -> dict[str, Any]:
    """The counts of a LayerReport, by field."""
    layer.layout(group_by)  # raises, with the layer's name, where the spec does not fit
    w = layer.blocked() != 0  # [blocks, out, in, taps]
    parts = {"groups": _alive(layer, group_by)}
    parts |= {"outputs": w.any(dim=3).any(dim=2), "inputs": w.any(dim=3).any(dim=1)}
    counts: dict[str, Any] = {"weights": w.numel(), "nonzero": int(w.sum())}
    named = {spec: _alive(layer, spec) for spec in NAMED_SPECS}
    counts["by_spec"] = {spec: (x.numel() - int(x.sum()), x.numel()) for spec, x in named.items()}
    for name, x in parts.items():
        counts |= {name: x.numel(), f"dead_{name}": x.numel() - int(x.sum())}
    return counts


def _fraction_left(layer: LayerWeight, group_by: GroupSpec) -> float:
    """The fraction of the weight that is left when its dead outputs and dead inputs are cut out."""
    w = layer.blocked() != 0  # [blocks, out, in, taps]
    outputs = w.any(dim=3).any(dim=2)
    inputs = w.any(dim=1) if group_by == "feature" else w.any(dim=3).any(dim=1)
    inputs = inputs.flatten(1)  # [blocks, in * taps] or [blocks, in]
    return int((outputs.sum(1) * inputs.sum(1)).sum()) / max(w.shape[1] * inputs.numel(), 1)


class _FlopsByWeight(EachOperation):
    """Adds each operation's FLOPs to the weight that it reads, or to the last entry if it reads none.

    A weight is recognised by its address. A transpose or some of its rows (attention's q of in_proj) are
    therefore recognised as well, whichever module runs the operation. Copies, such as autocast's, are
    remembered.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        from torch.utils.flop_counter import FlopCounterMode  # not at the top: it imports Triton

        self._counter_mode = FlopCounterMode
        self.flops = [0] * (len(weights) + 1)
        self._ranges = [(w.data_ptr(), w.data_ptr() + w.nbytes, i) for i, w in enumerate(weights)]
        self._copies: list[Tensor] = []  # kept alive, so that no other tensor gets their addresses

    def _weight(self, args: Any) -> int:
        """The index of the first weight among the arguments; the last index if there is none."""
        tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.numel() > 0]
        found = (i for x in tensors for low, high, i in self._ranges if low <= x.data_ptr() < high)
        return next(found, len(self.flops) - 1)

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._counter_mode(display=False) as counter:
            out = func(*args, **kwargs)
        flops = counter.get_total_flops()
        is_copy = func in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)
        if flops or is_copy:
            index = self._weight(args)
            self.flops[index] += flops
            if is_copy and index < len(self.flops) - 1:
                self._copies.append(out)
                self._ranges.append((out.data_ptr(), out.data_ptr() + out.nbytes, index))
        return out


def measure_flops(
    model: nn.Module, given: Given, weights: Sequence[Tensor] = (), run: Callable[..., Any] = call
) -> list[int]:
    """Dense FLOPs of one forward pass, which `run` makes: one number per weight, then all others."""
    devices = {x.device for x in (*weights, *leaves(given)) if isinstance(x, Tensor) and x.is_cuda}
    with (
        in_mode(model, train=False),
        unfused_operations(),
        torch.no_grad(),
        torch.random.fork_rng(devices=list(devices)),
        _FlopsByWeight(weights) as counter,
    ):
        run(model, given)
    return counter.flops


@contextlib.contextmanager
def in_mode(model: nn.Module, train: bool) -> Iterator[None]:
    """Put every module in training or eval mode within the block, and restore each afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.train(train)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def unfused_operations() -> Iterator[None]:
    """Run attention and recurrence as plain matrix products within the block, for the counter to see them."""
    attention = torch.backends.mha.get_fastpath_enabled()
    mkldnn, cudnn = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        torch.backends.cudnn.enabled = False
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # torch's stub says ContextProp
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(attention)
        torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled = mkldnn, cudnn
