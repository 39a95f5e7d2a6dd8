"""Instructions per element of the CPU executor under valgrind, against budgets: ``python -m bench.guard``.

The same on every run, however busy the machine is. Only what runs inside cges::cpu::step counts, on one
thread; valgrind knows AVX2 but not AVX-512, so it counts the AVX2 loops.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
DRIVER = ROOT / "build" / "guard" / "driver"
OBJECTS = ("executor.o", "cut.o", "rows.o")  # as `make install` compiled them
COUNT = "--tool=callgrind --callgrind-out-file=/dev/null --toggle-collect=cges::cpu::step(*".split()


class Budget(NamedTuple):
    """The most instructions per element that a step may take, momentum and about 70% of w left."""

    group_by: str  # "none": no penalty
    dtype: str
    mode: str
    rows: int
    columns: int
    count: int  # of tensors
    most: float

    def name(self) -> str:
        many = f"{self.count} of " if self.count > 1 else ""
        return f"{self.group_by} {many}{self.rows}x{self.columns} {self.dtype} {self.mode}"


# A tenth above what was counted when they were set (GCC 12, L2 of 1 MiB).
BUDGETS = [
    Budget("none", "fp32", "sequential", 512, 512, 1, 1.8),
    Budget("none", "bf16", "sequential", 512, 512, 1, 5.9),
    Budget("feature", "fp32", "sequential", 512, 512, 1, 7.6),
    Budget("feature", "fp32", "sequential", 4096, 512, 1, 5.5),
    Budget("feature", "fp32", "sequential", 50000, 64, 1, 6.4),
    Budget("feature", "bf16", "sequential", 512, 512, 1, 12.0),
    Budget("feature", "fp32", "exact", 512, 512, 1, 15.7),
    Budget("feature", "fp32", "sequential", 32, 32, 300, 13.2),
    Budget("filter", "fp32", "sequential", 512, 512, 1, 7.2),
    Budget("filter", "fp32", "sequential", 4096, 9, 1, 10.6),
    Budget("filter", "fp32", "exact", 4096, 9, 1, 23.0),
    Budget("filter", "fp32", "exact", 512, 512, 1, 19.8),
    Budget("channel", "fp32", "sequential", 512, 576, 1, 8.7),
    Budget("tensor", "fp32", "sequential", 512, 512, 1, 4.9),
]


def driver() -> Path:
    """guard.cpp, compiled and linked with the executor's own object files."""
    import torch
    from torch.utils.cpp_extension import include_paths

    folders = sorted((ROOT / "build").glob("temp.*/csrc/cpu"), key=lambda path: path.stat().st_mtime)
    objects = [folders[-1] / name for name in OBJECTS] if folders else []
    if not objects or not all(path.exists() for path in objects):
        sys.exit("bench.guard: expected the extension's object files under build/, found none: make install")
    lib = Path(torch.__file__).parent / "lib"
    include = [f"-isystem{path}" for path in include_paths()]
    link = [f"-L{lib}", f"-Wl,-rpath,{lib}", "-lc10"]
    DRIVER.parent.mkdir(parents=True, exist_ok=True)
    source = ROOT / "bench" / "guard.cpp"
    compiler = ["c++", "-std=c++20", "-O1", "-fopenmp", f"-I{ROOT / 'csrc'}", *include]
    subprocess.run([*compiler, str(source), *map(str, objects), *link, "-o", str(DRIVER)], check=True)
    return DRIVER


def collected(said: str) -> int:
    """The instructions that callgrind says it counted."""
    found = re.search(r"Collected : (\d+)", said)
    if found is None or int(found[1]) == 0:  # 0 where the function has another name by now
        sys.exit(f"bench.guard: expected callgrind's count, got: {said[-500:]}")
    return int(found[1])


def per_element(program: Path, budget: Budget) -> float:
    arguments = [str(program), *map(str, budget[:-1])]
    ended = subprocess.run(["valgrind", *COUNT, *arguments], capture_output=True, text=True)
    return collected(ended.stderr) / (budget.rows * budget.columns * budget.count)


def report(counts: list[tuple[Budget, float]]) -> tuple[str, bool]:
    """The table, and whether every case keeps to its budget."""
    lines = [f"{'instructions per element':42s} {'counted':>8s} {'budget':>8s}"]
    for budget, found in counts:
        over = "  OVER" if found > budget.most else ""
        lines.append(f"{budget.name():42s} {found:8.2f} {budget.most:8.2f}{over}")
    return "\n".join(lines), all(found <= budget.most for budget, found in counts)


def main() -> None:
    if shutil.which("valgrind") is None:
        sys.exit("bench.guard: expected valgrind on the PATH, found none")
    program = driver()
    table, kept = report([(b, per_element(program, b)) for b in tqdm(BUDGETS, file=sys.stderr)])
    print(table)
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
