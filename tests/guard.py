"""Instructions per element of the CPU executor, against budgets: ``python tests/guard.py``.

valgrind counts the same on every run, however busy the machine is. Only what runs inside cges::cpu::step
counts, on one thread, once with the loops for AVX2 and once with those for any x86-64; valgrind does not know
AVX-512.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
OBJECTS = ("executor.o", "cut.o", "rows.o")  # as `make install` compiled them
COUNT = "--tool=callgrind --callgrind-out-file=/dev/null --toggle-collect=cges::cpu::step(*".split()
INSTRUCTION_SETS = {"AVX2": 32, "x86-64": 16}  # {name: bytes of a vector}


class Case(NamedTuple):
    """A step with momentum that leaves about 70% of w."""

    group_by: str  # "none": no penalty
    dtype: str
    mode: str
    rows: int
    columns: int
    count: int = 1  # the number of tensors

    def name(self) -> str:
        many = f"{self.count} of " if self.count > 1 else ""
        return f"{self.group_by} {many}{self.rows}x{self.columns} {self.dtype} {self.mode}"


# The most instructions per element that each of INSTRUCTION_SETS may take: a tenth above what was counted
# when they were set (GCC 12).
BUDGETS = {
    Case("none", "fp32", "sequential", 512, 512): (1.6, 4.3),
    Case("none", "bf16", "sequential", 512, 512): (5.7, 15.6),
    Case("none", "fp16", "sequential", 512, 512): (6.1, 48.3),
    Case("feature", "fp32", "sequential", 128, 2048): (6.1, 15.6),
    Case("feature", "fp32", "sequential", 512, 512): (6.2, 15.7),
    Case("feature", "fp32", "sequential", 4096, 512): (6.0, 15.5),
    Case("feature", "fp32", "sequential", 50000, 64): (6.5, 16.0),
    Case("feature", "bf16", "sequential", 512, 512): (15.2, 40.9),
    Case("feature", "fp16", "sequential", 512, 512): (16.3, 97.8),
    Case("feature", "fp32", "exact", 128, 2048): (16.7, 43.7),
    Case("feature", "fp32", "exact", 512, 512): (15.2, 42.2),
    Case("feature", "fp32", "sequential", 32, 32, 300): (13.2, 22.6),
    Case("filter", "fp32", "sequential", 512, 512): (7.3, 18.0),
    Case("filter", "fp32", "sequential", 4096, 9): (10.2, 26.4),
    Case("filter", "fp32", "exact", 4096, 9): (22.5, 95.5),
    Case("filter", "fp32", "exact", 512, 512): (19.9, 50.6),
    Case("channel", "fp32", "sequential", 512, 576): (5.5, 15.0),
    Case("tensor", "fp32", "sequential", 512, 512): (4.9, 14.6),
}


def driver() -> Path:
    """guard.cpp, compiled and linked with the executor's own object files."""
    import torch
    from torch.utils.cpp_extension import include_paths

    folders = sorted((ROOT / "build").glob("temp.*/csrc/cpu"), key=lambda path: path.stat().st_mtime)
    objects = [folders[-1] / name for name in OBJECTS] if folders else []
    if not objects or not all(path.exists() for path in objects):
        sys.exit("guard: expected the extension's object files under build/, found none: make install")
    lib, program = Path(torch.__file__).parent / "lib", ROOT / "build" / "guard-driver"
    include = [f"-I{ROOT / 'csrc'}", *(f"-isystem{path}" for path in include_paths())]
    link = [f"-L{lib}", f"-Wl,-rpath,{lib}", "-lc10", "-o", str(program)]
    files = [str(path) for path in (ROOT / "tests" / "guard.cpp", *objects)]
    subprocess.run(["c++", "-std=c++20", "-O1", "-fopenmp", *include, *files, *link], check=True)
    return program


def collected(said: str) -> int:
    """The instructions that callgrind says it counted."""
    found = re.search(r"Collected : (\d+)", said)
    if found is None or int(found[1]) == 0:  # 0 where the function has another name by now
        sys.exit(f"guard: expected callgrind's count, got: {said[-500:]}")
    return int(found[1])


def per_element(program: Path, case: Case, vector_bytes: int) -> float:
    command = ["valgrind", *COUNT, str(program), *map(str, case), str(vector_bytes)]
    ended = subprocess.run(command, capture_output=True, text=True)
    return collected(ended.stderr) / (case.rows * case.columns * case.count)


def line(name: str, found: float, most: float) -> str:
    """A line of text with a count and its budget."""
    return f"{name:50s} {found:8.2f} {most:8.2f}{'  OVER' if found > most else ''}"


def main() -> None:
    if shutil.which("valgrind") is None:
        sys.exit("guard: expected valgrind on the PATH, found none")
    program, kept = driver(), True
    print(f"{'instructions per element':50s} {'counted':>8s} {'budget':>8s}")
    for case, budgets in BUDGETS.items():
        for (name, vector_bytes), most in zip(INSTRUCTION_SETS.items(), budgets):
            found = per_element(program, case, vector_bytes)
            print(line(f"{case.name()}, {name}", found, most), flush=True)
            kept = kept and found <= most
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
