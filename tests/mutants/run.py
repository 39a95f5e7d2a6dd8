"""Breaks the project in one place at a time, and tells whether its tests notice.

    python tests/mutants/run.py [NAME or AREA ...] [--suite test|full] [--copy N] [--commit ...]

Each mutant (see mutant.py) is put into a copy of the checkout, build/mutants. There the parts that it affects
are built, the tests that should see it run, and the file is restored. Results are added to results.csv, a
line for each trial. A mutant that this suite has killed at this commit is skipped, so that an interrupted
run can be continued. Two runs over different areas may go on at the same time, each in a copy of its own. Run
this only where all tests pass: a test that fails without a mutant would count as seeing every one.

Outcomes:

    killed              a test failed or the process crashed; the first failing test is noted
    timeout             the tests did not end within the limit
    survived            no test failed, so one is missing
    does not build, ran nothing
                        not a break that a user could meet; the mutant should be replaced

The exit status is 1 unless all are killed. The suite "test" leaves out races that only ThreadSanitizer can
see.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutants import AREAS, MUTANTS
from mutants.mutant import Mutant

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COPIES = ROOT / "build" / "mutants"
COPY = COPIES / "1"  # --copy chooses another one
RESULTS = HERE / "results.csv"
COLUMNS = ("mutant", "suite", "commit", "outcome", "test", "seconds")
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
SUITES = {"test": ["-m", "not full"], "full": []}  # more arguments for pytest
ENVIRONMENT = {
    **os.environ,
    # Cached bytecode is checked by whole seconds, too coarse for files that change and change back.
    "PYTHONDONTWRITEBYTECODE": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # where ninja is
    "CGES_CUDA": "0",
}
EXTENSION = (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
EMULATED = (
    sys.executable,
    "-m",
    "helpers.emulated",
)  # the extension with the CUDA kernels compiled for the emulator


def refresh() -> None:
    """Brings the copy up to date. Equal files keep their times, and with them what was built from them."""
    listed = subprocess.check_output(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, text=True)
    names = {name for name in listed.split("\0") if (ROOT / name).is_file()}
    copied = COPY / "build" / "copied"  # the names copied last, to find files that are gone since
    for name in set(copied.read_text().splitlines()) - names if copied.exists() else ():
        (COPY / name).unlink(missing_ok=True)
    for name in names:
        source, target = ROOT / name, COPY / name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    copied.parent.mkdir(parents=True, exist_ok=True)
    copied.write_text("\n".join(sorted(names)))


@contextmanager
def broken(mutant: Mutant) -> Iterator[None]:
    """Puts the mutant into the copy and takes it out again, with new times so that builds notice."""
    path = COPY / mutant.file
    whole = path.read_text(encoding="utf-8")
    if whole.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.name}: expected its text once in {mutant.file}, got it otherwise")
    try:
        path.write_text(whole.replace(mutant.old, mutant.new), encoding="utf-8")
        yield
    finally:
        path.write_text(whole, encoding="utf-8")


def run(*command: str, limit: float | None = None, **environment: str) -> tuple[int | None, str]:
    """The exit status (None if it was stopped at the limit) and the output of a command in the copy."""
    process = subprocess.Popen(
        command,
        cwd=COPY,
        env=ENVIRONMENT | environment | {"PYTHONPATH": f"{COPY}{os.pathsep}{COPY / 'tests'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # so that its children can be stopped with it
    )
    try:
        printed, _ = process.communicate(timeout=limit)
        return process.returncode, printed
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def built_from(file: str) -> set[tuple[str, ...]]:
    """The builds that a change of this file makes necessary."""
    if not file.startswith("csrc/"):
        return set()
    return {EMULATED} if file.startswith("csrc/cuda/") else {EXTENSION, EMULATED}


def needed_for(mutant: Mutant) -> set[tuple[str, ...]]:
    """The builds that the mutant's tests need.

    The emulator takes long to build. Breaks of C++ code need it only if the CUDA executor is about.
    """
    file = mutant.file
    cuda = file.startswith("csrc/cuda/") or any("cuda" in name for name in mutant.seen_by)
    return {EXTENSION} if file.startswith("csrc/") and not cuda else {EXTENSION, EMULATED}


def outcome_of(mutant: Mutant, suite: str, limit: float) -> tuple[str, str]:
    """The outcome of the mutant's tests in the copy, and the first test that failed."""
    files = [str(p.relative_to(ROOT)) for x in mutant.seen_by for p in HERE.parent.rglob(f"{x}.py")]
    chosen = [*SUITES[suite], *(["-k", "thread"] if mutant.sanitizer else [])]
    command = (sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *chosen, *files)
    emulator = str(int(EMULATED in needed_for(mutant)))
    status, printed = run(*command, limit=limit, CGES_EMULATOR=emulator)
    if status is None:
        return "timeout", ""
    if status == 0:
        some_passed = re.search(r"^[.sx]*\.[.sx]*( |$)", printed, re.MULTILINE)
        return "survived" if some_passed else "ran nothing", ""
    if status == 1 or -status in CRASHES:
        failed = re.search(r"^(?:FAILED|ERROR) (\S+?::.*?)(?: - .*)?$", printed, re.MULTILINE)
        return "killed", failed[1] if failed else f"exit status {status}"
    return "ran nothing", printed.strip().rpartition("\n")[2]


def judge(mutant: Mutant, stale: set[tuple[str, ...]], suite: str, limit: float) -> tuple[str, str]:
    """The outcome and the first test that failed; builds first what is stale and needed."""
    with broken(mutant):
        affected, needed = built_from(mutant.file), needed_for(mutant)
        for command in sorted((stale | affected) & needed):
            status, printed = run(*command)
            if status:
                stale |= affected
                return "does not build", printed.strip().rpartition("\n")[2]
        stale -= needed
        stale |= affected  # because the file is about to be restored
        return outcome_of(mutant, suite, limit)


def earlier(suite: str, commit: str) -> dict[str, str]:
    """The last outcome filed for each mutant under this suite and commit."""
    if not RESULTS.exists():
        return {}
    with RESULTS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {row["mutant"]: row["outcome"] for row in rows if (row["suite"], row["commit"]) == (suite, commit)}


def main() -> int:
    """Tries the mutants chosen on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    head = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True).strip()
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants, or areas of them (all)")
    parser.add_argument("--suite", choices=SUITES, default="test", help="which tests of the files run (test)")
    parser.add_argument("--limit", type=float, default=900, help="seconds for a mutant's tests (900)")
    parser.add_argument("--commit", default=head, help=f"what results are filed under ({head})")
    parser.add_argument("--copy", default="1", help="in which copy: two runs at a time need two (1)")
    args = parser.parse_args()
    # so that children are stopped and the file is restored
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    areas = {area.__name__.rpartition(".")[2]: area for area in AREAS}
    if unknown := sorted(set(args.names) - areas.keys() - {mutant.name for mutant in MUTANTS}):
        parser.error(f"expected names of mutants or of {', '.join(areas)}, got {unknown}")
    global COPY
    COPY = COPIES / args.copy
    of_areas = {x.name for name in areas.keys() & set(args.names) for x in areas[name].MUTANTS}
    named = [x for x in MUTANTS if not args.names or x.name in of_areas | set(args.names)]
    chosen = [x for x in named if args.suite == "full" or not x.sanitizer]
    done = earlier(args.suite, args.commit)
    todo = [x for x in chosen if done.get(x.name) != "killed"]
    print(f"{len(todo)} mutants to try at {args.commit}, {len(chosen) - len(todo)} are killed", flush=True)
    refresh()
    for command in (EXTENSION, EMULATED):
        status, printed = run(*command)
        if status:
            raise SystemExit(f"the project itself does not build:\n{printed}")
    stale = set[tuple[str, ...]]()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(COLUMNS)
        for mutant in todo:
            start = time.monotonic()
            outcome, test = judge(mutant, stale, args.suite, args.limit)
            seconds = round(time.monotonic() - start)
            writer.writerow((mutant.name, args.suite, args.commit, outcome, test, seconds))
            file.flush()
            print(f"{mutant.name}: {outcome}, {seconds} s", flush=True)
    done = earlier(args.suite, args.commit)
    alive = [x.name for x in chosen if done[x.name] != "killed"]
    print(f"{len(chosen) - len(alive)} of {len(chosen)} killed; the others: {alive}", flush=True)
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main())
