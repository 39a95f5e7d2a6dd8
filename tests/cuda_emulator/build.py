"""Compiles .cu files against the emulator, with or without a sanitizer.

Tests run in several processes. The second one to ask for a file waits until the first has built it.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNTIME = HERE / "emulator.cpp"
CSRC = HERE.parents[1] / "csrc"

# nvcc does not use strict aliasing either. Products and sums are not fused, so that every machine gives the
# same bits.
FLAGS = "-std=c++20 -O1 -g1 -fPIC -fvisibility=hidden -fno-strict-aliasing -ffp-contract=off".split()
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DCGES_EMULATED", f"-I{HERE}", f"-I{CSRC}"]


def compiler():
    """The C++ compiler's path, or None where there is none."""
    names = [os.environ.get("CXX"), "g++", "clang++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def build(output, sources, sanitize=None, defines=(), shared=True, extra_flags=(), link=()):
    """Compiles and links what is newer than `output`, a shared library or a program, and returns its path.

    The emulator itself is added. `sanitize` is the argument of -fsanitize: "address,undefined" or "thread".
    `link` holds further objects and libraries.
    """
    folder = Path(f"{output}.objects")
    objects = compile_objects(folder, [*sources, RUNTIME], sanitize, defines, extra_flags)
    kind = ["-shared"] if shared else []
    command = [compiler(), *objects, *kind, *sanitizer_flags(sanitize), *extra_flags, "-o", output, *link]
    command = [str(part) for part in command]
    stamp = folder / "link"
    inputs = [*objects, *(path for path in link if Path(path).exists())]
    with one_process_in(folder):
        if not fresh(output, inputs) or not stamp.exists() or stamp.read_text() != " ".join(command):
            run(command)
            stamp.write_text(" ".join(command))
    return Path(output)


@contextlib.contextmanager
def one_process_in(folder):
    """Makes other processes wait here until this one has left."""
    with (Path(folder) / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the lock ends when the file is closed
        yield


def compile_objects(folder, sources, sanitize=None, defines=(), extra_flags=()):
    """Object files of these sources, compiled two at a time where inputs or flags have changed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source):
        source = Path(source).resolve()
        command = [compiler(), *FLAGS, *sanitizer_flags(sanitize), *(f"-D{d}" for d in defines), *extra_flags]
        if source == RUNTIME:
            command += ["-O2"]  # the emulator runs at every switch of fibers
        if source == RUNTIME and sanitize == "thread":
            command += ["-fno-sanitize=thread", "-DEMULATOR_TSAN"]  # see fiber.h
        command += ["-x", "c++", str(source)]
        object_file = folder / f"{source.stem}-{hashlib.md5(' '.join(command).encode()).hexdigest()[:8]}.o"
        headers = object_file.with_suffix(".d")
        inputs = headers.read_text().replace("\\\n", "").split()[1:] if headers.exists() else [headers]
        if not fresh(object_file, inputs):
            run([*command, "-MMD", "-c", "-o", str(object_file)])
        return object_file

    with one_process_in(folder), ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def sanitizer_flags(sanitize):
    """The compiler's flags for this sanitizer."""
    if not sanitize:
        return []
    flags = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    if sanitize == "thread" and "clang" not in compiler():
        # Kernel parameters are copied without calling memcpy, which TSan watches. That is several times as
        # fast.
        flags.append("-mmemcpy-strategy=rep_8byte:-1:noalign")
    return flags


def fresh(output, inputs):
    """Whether `output` is newer than all inputs, which have to exist."""
    times = [Path(i).stat().st_mtime if Path(i).exists() else float("inf") for i in inputs]
    return Path(output).exists() and all(t <= Path(output).stat().st_mtime for t in times)


def run(command):
    """Runs a command; RuntimeError with its output if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


@functools.cache
def has_sanitizer(sanitize):
    """Whether a program with this sanitizer can be linked here."""
    command = [compiler(), f"-fsanitize={sanitize}", "-x", "c++", "-", "-o", os.devnull]
    return subprocess.run(command, input="int main() {}", text=True, capture_output=True).returncode == 0


def sanitizer_library(sanitize):
    """The LD_PRELOAD for a plain program, such as Python, that loads a library built with this sanitizer.

    The C++ library is added, because the sanitizer's wrapper of `throw` looks for the real one when it
    starts.
    """
    names = [{"address": "libasan.so", "thread": "libtsan.so"}[sanitize.split(",")[0]], "libstdc++.so"]
    found = (subprocess.check_output([compiler(), f"-print-file-name={name}"], text=True) for name in names)
    return " ".join(path.strip() for path in found)
