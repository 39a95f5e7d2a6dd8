"""`explain`: a table of the groups that an optimizer's specs make of each parameter; and the table type."""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import Optimizer

from ..core.groups import canonical_layout, has_groups
from ..core.hyperparameters import COEFFICIENTS, SCALARS
from ..core.shrinkage import form_thresholds


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; `str()` gives an aligned table.

    Attributes:
        header: the columns' names.
        rows: the cells of each row.
        left: the number of first columns that are aligned to the left; the others are to the right.
    """

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
    """A printable table of an optimizer's specs and coefficients, one row per parameter.

    Its columns are:

    - parameter: the name where the param groups have names, else the place.
    - shape and group_by: the parameter's shape and its spec, with the view where there is one.
    - layout: (K1, R1, K2, R2), the sizes of kept and reduced dims in memory order.
    - groups and group size: how many groups the spec makes, and of how many entries.
    - group_lasso, exclusive_lasso, l1 and lr: the values in force; coefficients are not multiplied by lr.
    - mode: the prox_mode.
    - `b*n`: lr times exclusive_lasso times group size. In sequential mode nearly everything becomes zero
      where it reaches 1; in exact mode it does not.

    A "-" means that the spec makes no groups of this parameter (a bias under a named spec), so only l1
    applies.

    Args:
        optimizer: a [`ProxSGD`][cges_kernels.ProxSGD] or [`ProxAdamW`][cges_kernels.ProxAdamW].

    Returns:
        A table to print. Its `header` and `rows` hold the cells as text.

    Raises:
        TypeError: an optimizer whose param groups have no group specs.

    Examples:
        >>> print(explain(optimizer))
    """
    if not isinstance(optimizer, Optimizer) or (
        optimizer.param_groups and "group_by" not in optimizer.param_groups[0]
    ):
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
