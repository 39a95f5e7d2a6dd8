"""Builds the extension with its CUDA kernels compiled for the CPU, so that backend="cuda" serves CPU tensors.

`PYTHONPATH=tests python -m helpers.emulated` builds it in build/emulated. Blocks have 64 threads there. That
makes two warps, so that barriers between warps matter, and keeps the number of fibers small.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from cuda_emulator.build import CSRC, build, compile_objects

FOLDER = CSRC.parent / "build" / "emulated"
THREADS = 64
NAME = "_C_emulated"
KERNELS = (CSRC / "cuda" / "launch.cu", CSRC / "cuda" / "cut.cpp")
# The sanitizer whose library is preloaded into this process: "address,undefined" or "thread".
SANITIZE = os.environ.get("CGES_SANITIZE") or None


def build_extension(sanitize: str | None = None, threads: int = THREADS) -> Path:
    """Compiles what is not up to date, for blocks of ``threads`` threads.

    Only the kernels are compiled with the sanitizer; everything else is compiled once, without it.
    """
    from torch.utils.cpp_extension import include_paths

    headers = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    lib = Path(torch.__file__).parent / "lib"
    libraries = [f"-L{lib}", *(f"-l{name}" for name in ("c10", "torch", "torch_cpu", "torch_python"))]
    defines = ["CGES_CUDA=1", f"CGES_THREADS={threads}", f"TORCH_EXTENSION_NAME={NAME}_{threads}"]
    around = [path for path in sorted(CSRC.rglob("*.cpp")) if path not in KERNELS]
    objects = compile_objects(FOLDER / "objects", around, None, defines, ["-fopenmp", *headers])
    name = (sanitize or "plain").split(",")[0] + ("" if threads == THREADS else f"-{threads}")
    return build(
        FOLDER / f"{name}.so",
        KERNELS,
        sanitize=sanitize,
        defines=defines,
        extra_flags=["-fopenmp"],
        link=[*objects, *libraries],
    )


def load(threads: int = THREADS) -> ModuleType:
    """Builds the extension and imports it."""
    # Each build has its own name, or else Python would take the second for the first.
    spec = importlib.util.spec_from_file_location(f"{NAME}_{threads}", build_extension(SANITIZE, threads))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def limit_device(**most: int) -> None:
    """Limits the CUDA executor's shared_bytes and multiprocessors, so that small groups count as large."""
    from cges_kernels.backends import extension, unplanned

    extension.BUILT["cuda"].limit_device(**most)
    unplanned.forget()  # plans that are kept were cut for other limits


class Device:
    """The emulated device: its attributes by name, and controls for tests. emulator.h lists the names."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._library.emulator_get.restype = ctypes.c_longlong
        self._library.emulator_accesses.restype = ctypes.c_longlong

    def __getitem__(self, name: str) -> int:
        return int(self._library.emulator_get(name.encode()))

    def __setitem__(self, name: str, value: int) -> None:
        if self._library.emulator_set(name.encode(), ctypes.c_longlong(value)):
            raise KeyError(name)

    def reset(self) -> None:
        self._library.emulator_reset()

    def accesses(self, work: Callable[[], object]) -> torch.Tensor:
        """The accesses to global memory that kernels make while `work` runs, in order.

        Seen are accesses through cache hints (__ldcs and the like) and asynchronous copies. Each row of int64
        holds address, bytes, 0 for a read or 1 for a write, blockIdx.x and threadIdx.x.
        """
        self._library.emulator_trace(1)
        try:
            work()
        finally:
            self._library.emulator_trace(0)
        n = self._library.emulator_accesses(None, ctypes.c_longlong(0))
        rows = torch.empty(n, 5, dtype=torch.int64, device="cpu")
        self._library.emulator_accesses(ctypes.c_void_p(rows.data_ptr()), ctypes.c_longlong(n))
        return rows


def traffic(accesses: torch.Tensor, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each byte of ``tensor``, which has no gaps, the number of its reads and of its writes (int64).

    Accesses of other memory, and bytes beyond the tensor, do not count.
    """
    size = tensor.numel() * tensor.itemsize

    def count(rows: torch.Tensor) -> torch.Tensor:
        begin = rows[:, 0] - tensor.data_ptr()
        begin, end = begin.clamp(0, size), (begin + rows[:, 1]).clamp(0, size)
        change = begin.bincount(minlength=size + 1) - end.bincount(minlength=size + 1)
        return change.cumsum(0)[:size]

    write = accesses[:, 2] == 1
    return count(accesses[~write]), count(accesses[write])


if __name__ == "__main__":
    print(build_extension(SANITIZE))
