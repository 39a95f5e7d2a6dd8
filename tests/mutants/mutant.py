"""The definition of a mutant."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One small break: in ``file`` the text ``old``, which occurs exactly once, is replaced by ``new``."""

    name: str  # says what is broken; results are filed under it
    file: str  # relative to the repository's root
    old: str
    new: str
    # names of test modules anywhere in tests/ that should notice it, with * for any characters
    seen_by: tuple[str, ...]
    sanitizer: bool = False  # whether it is a race that only ThreadSanitizer can see
