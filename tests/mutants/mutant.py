"""What a mutant is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One small break. In ``file`` the text ``old``, which stands there exactly once, becomes ``new``."""

    name: str  # what is broken then
    file: str  # relative to the repository's root
    old: str
    new: str
    seen_by: tuple[str, ...]  # test modules, anywhere in tests/, that should see it; * stands for anything
    hangs: bool = False  # its tests may wait for ever
    sanitizer: bool = False  # a race that ThreadSanitizer alone can see
