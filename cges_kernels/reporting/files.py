"""Files that are whole or not there: what is half-written never replaces what was good."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write to; it takes `path`'s place when the block ends without an error."""
    target = Path(path)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=target.parent) as folder:
        unfinished = Path(folder) / target.name
        yield unfinished
        os.replace(unfinished, target)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace the file by `text` (UTF-8), whole or not at all."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def as_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """CSV text; floats with six significant digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in rows)
    return text.getvalue()
