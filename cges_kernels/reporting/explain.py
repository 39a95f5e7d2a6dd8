"""What an optimizer's group specs amount to, parameter by parameter."""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import Optimizer

from ..core.groups import canonical_layout, has_groups
from ..core.hyperparameters import COEFFICIENTS, SCALARS
from ..core.reference import form_thresholds


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; `str()` aligns the columns, the first `left` of them to the left."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1

    def __str__(self) -> str:
        lines = (self.header, *self.rows)
        widths = [max(map(len, column)) for column in zip(*lines)]
        aligned = (
            [
                cell.ljust(n) if i < self.left else cell.rjust(n)
                for i, (cell, n) in enumerate(zip(line, widths))
            ]
            for line in lines
        )
        return "\n".join("  ".join(line).rstrip() for line in aligned)

    __repr__ = __str__


def explain(optimizer: Optimizer) -> Table:
    """A printable table, one row per parameter: its spec, canonical layout, groups, coefficients and b*n.

    The layout is (K1, R1, K2, R2): kept and reduced dims in memory order. b*n is lr * exclusive_lasso * group
    size; in sequential mode nearly everything becomes zero where it reaches 1, in exact mode it does not.
    A "-" means that the spec makes no groups of this parameter (a bias under a named spec): only l1 applies.
    """
    if optimizer.param_groups and "group_by" not in optimizer.param_groups[0]:
        raise TypeError(f"optimizer: expected a ProxSGD, got {type(optimizer).__name__}")
    header = (
        "parameter",
        "shape",
        "group_by",
        "layout",
        "groups",
        "group size",
        *COEFFICIENTS,
        "lr",
        "mode",
        "b*n",
    )
    rows = []
    for g, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or [f"param_groups[{g}][{i}]" for i in range(len(group["params"]))]
        spec, view = group["group_by"], group["view"]
        for name, p in zip(names, group["params"]):
            layout = canonical_layout(p, spec, view)
            grouped = has_groups(p.dim() if view is None else len(view), spec)
            lr, *coefficients = (float(group[key]) for key in SCALARS)
            b = form_thresholds(lr, *coefficients).b
            rows.append(
                (
                    name,
                    "x".join(map(str, p.shape)) or "scalar",
                    f"{spec} of {'x'.join(map(str, view))}" if view else str(spec),
                    str(tuple(layout)) if grouped else "-",
                    f"{layout.num_groups:,}" if grouped else "-",
                    f"{layout.group_size:,}" if grouped else "-",
                    *(f"{float(group[key]):.3g}" if grouped or key == "l1" else "-" for key in COEFFICIENTS),
                    f"{lr:.3g}",
                    group["prox_mode"],
                    f"{b * layout.group_size:.3g}" if grouped else "-",
                )
            )
    return Table(header, tuple(rows), left=3)
