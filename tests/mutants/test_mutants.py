"""The list of mutants is valid: each breaks one place that exists, and names test modules that exist."""

from collections import Counter
from pathlib import Path

from mutants import AREAS, MUTANTS

TESTS = Path(__file__).resolve().parents[1]


def test_there_are_many_and_names_tell_them_apart():
    """No area is empty and no two mutants share a name, under which results are filed."""
    assert len(MUTANTS) >= 40 and all(area.MUTANTS for area in AREAS)
    assert [name for name, n in Counter(mutant.name for mutant in MUTANTS).items() if n > 1] == []


def test_what_they_break_stands_there_once():
    """The text that a mutant replaces occurs exactly once in its file, and the replacement differs."""
    texts = {file: (TESTS.parent / file).read_text(encoding="utf-8") for file in {x.file for x in MUTANTS}}
    assert [x.name for x in MUTANTS if texts[x.file].count(x.old) != 1] == []
    assert [x.name for x in MUTANTS if x.old == x.new] == []


def test_who_should_see_them_is_there():
    """Each mutant names test modules that exist; races name the sanitizers' tests and nothing else does."""
    missing = {name for x in MUTANTS for name in x.seen_by if not any(TESTS.rglob(f"{name}.py"))}
    assert missing == set() and all(x.seen_by for x in MUTANTS)
    assert [x.name for x in MUTANTS if x.sanitizer != (x.seen_by == ("test_cuda_sanitizers",))] == []
