"""The list of mutants: each breaks one place, which is still there, and names tests that are."""

from collections import Counter
from pathlib import Path

from mutants import AREAS, MUTANTS

TESTS = Path(__file__).resolve().parents[1]


def test_there_are_many_and_names_tell_them_apart():
    assert len(MUTANTS) >= 40 and all(area.MUTANTS for area in AREAS)
    assert [name for name, n in Counter(mutant.name for mutant in MUTANTS).items() if n > 1] == []


def test_what_they_break_stands_there_once():
    texts = {file: (TESTS.parent / file).read_text(encoding="utf-8") for file in {x.file for x in MUTANTS}}
    assert [x.name for x in MUTANTS if texts[x.file].count(x.old) != 1] == []
    assert [x.name for x in MUTANTS if x.old == x.new] == []


def test_who_should_see_them_is_there():
    missing = {name for x in MUTANTS for name in x.seen_by if not any(TESTS.rglob(f"{name}.py"))}
    assert missing == set() and all(x.seen_by for x in MUTANTS)
    assert [x.name for x in MUTANTS if x.sanitizer != (x.seen_by == ("test_cuda_sanitizers",))] == []
