"""Writing files so that they are complete or unchanged: a half-written file never replaces a good one.

Histories (history.py) and compacted models (compaction/saving.py) are written this way.
"""

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
    """Yield a path beside `path` to write to; it replaces `path` when the block ends without an error."""
    target = Path(path)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=target.parent) as folder:
        unfinished = Path(folder) / target.name
        yield unfinished
        os.replace(unfinished, target)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace the file by `text` in UTF-8; after an error it is as before."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def as_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The table as CSV text; floats have six significant digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in rows)
    return text.getvalue()
