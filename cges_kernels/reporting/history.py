"""`SparsityHistory`: how sparsity develops in training, in a CSV file and as TensorBoard curves."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import as_csv, write_text
from .report import SparsityReport

MEASURES = ("percent_nonzero", "dead_groups", "dead_outputs", "dead_inputs", "flops_compacted")


class SparsityHistory:
    """Collects reports over training in a CSV file, in TensorBoard, or both.

    The reports are those of [`sparsity_report`][cges_kernels.sparsity_report]. The CSV file has one row per
    step and layer, and one row named "total" per step. At each call of `add` it is written anew and replaces
    the old file only when it is complete.

    A file that exists already is continued. Adding step s drops what the file holds from step s on. So a run
    that resumes from a checkpoint leaves no gap and no double rows, and a run that begins anew leaves nothing
    of an older one.

    Args:
        path: the CSV file, or None (default).
        tensorboard: a `torch.utils.tensorboard.SummaryWriter`, a folder to open one in, or None (default).

    Attributes:
        path: the CSV file, or None.
        rows: the rows so far, as dicts by column.
        writer: the SummaryWriter, or None.

    Raises:
        ImportError: a folder is given and tensorboard is not installed.
        ValueError: the file at `path` is not such a table; it is left as it is.

    Examples:
        >>> history = SparsityHistory("sparsity.csv", tensorboard="runs/first")
        >>> for epoch in range(epochs):
        ...     loss = train(model, optimizer)
        ...     history.add(epoch, sparsity_report(model), loss=loss)
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, tensorboard: Any = None) -> None:
        self.path = None if path is None else Path(path)
        self.rows: list[dict[str, Any]] = []
        if self.path is not None and self.path.exists():
            self.rows = _read(self.path)
        self.writer = (
            _open_writer(tensorboard) if isinstance(tensorboard, (str, os.PathLike)) else tensorboard
        )

    def add(self, step: int, report: SparsityReport, **values: float) -> None:
        """Add a report, and write it to the file and to TensorBoard.

        Args:
            step: the number of steps or epochs so far. Rows of this and of later steps are replaced.
            report: a result of `sparsity_report`.
            **values: further numbers, such as a loss, which stand in the row of the total.

        Raises:
            TypeError: a step that is not an int, or something else than a report.
            ValueError: a value under the name of one of the table's own columns.
        """
        if not isinstance(step, int) or isinstance(step, bool):
            raise TypeError(f"step: expected an int, got {step!r}")
        if not isinstance(report, SparsityReport):
            raise TypeError(f"report: expected a SparsityReport, got {type(report).__name__}")
        columns = {"step", "layer", *report.total.to_dict()}
        if taken := sorted(columns & values.keys()):
            raise ValueError(f"values: expected other names than those of the report's columns, got {taken}")
        values = {key: x.item() if isinstance(x, Tensor) else x for key, x in values.items()}
        kept = [row for row in self.rows if row["step"] < step]
        for layer in (*report.layers, report.total):
            cells = {key: x for key, x in layer.to_dict().items() if not isinstance(x, (dict, tuple))}
            kept.append({"step": step, "layer": cells.pop("name"), **cells})
            if self.writer is not None:
                for key in MEASURES:
                    if key in cells:
                        self.writer.add_scalar(f"{key}/{layer.name}", cells[key], step)
        kept[-1] |= values
        self.rows = kept
        if self.writer is not None:
            for key, value in values.items():
                self.writer.add_scalar(key, value, step)
            self.writer.flush()
        if self.path is not None:
            header = list(dict.fromkeys(key for row in kept for key in row))
            write_text(self.path, as_csv(header, ([row.get(key, "") for key in header] for row in kept)))


def _open_writer(folder: str | os.PathLike[str]) -> Any:
    """A SummaryWriter in the folder. Without tensorboard an ImportError says what to install."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"tensorboard={str(folder)!r} needs it installed: pip install tensorboard"
        ) from error
    return SummaryWriter(folder)


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier history, with the step as a number and the rest as text."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        return [{**row, "step": int(row["step"]), "layer": row["layer"]} for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a sparsity history, with columns step and layer") from error
