"""The program that counts the CPU executor's instructions: what it runs, and what it says."""

import subprocess
import sys

import guard
import pytest
from helpers.programs import ROOT

from cges_kernels.backends.extension import BUILT


def test_budgets():
    assert "OVER" not in guard.line("a case", 4.5, 5.0) and "OVER" in guard.line("another", 5.5, 5.0)
    assert "OVER" not in guard.line("a case", 5.0, 5.0)
    assert guard.Case("a", "bf16", "exact", 8, 8, 3).name() == "a 3 of 8x8 bf16 exact"
    assert guard.collected("==1== Collected : 1234\n") == 1234
    for said in ("valgrind: no such file", "==1== Collected : 0\n"):
        with pytest.raises(SystemExit, match="expected callgrind's count"):
            guard.collected(said)
    assert all(len(most) == len(guard.INSTRUCTION_SETS) for most in guard.BUDGETS.values())


@pytest.mark.full("a program of its own, compiled against the executor's object files")
def test_what_the_guard_counts_steps():
    if "cpu" not in BUILT or not list((guard.ROOT / "build").glob("temp.*/csrc/cpu/rows.o")):
        pytest.skip("the extension was not built here")
    for case in (guard.Case("feature", dtype, "exact", 300, 250) for dtype in ("fp32", "bf16", "fp16")):
        told = [str(guard.driver()), *map(str, case), "64"]
        said = subprocess.run(told, capture_output=True, text=True, check=True).stdout
        assert 0.5 < float(said.split()[0]) < 0.9


def test_the_guard_says_that_valgrind_is_absent(tmp_path):
    command = [sys.executable, "tests/guard.py"]
    ended = subprocess.run(command, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == "guard: expected valgrind on the PATH, found none\n"
