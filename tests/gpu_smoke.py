"""Compares a few steps on every path of every GPU executor with the reference: ``python tests/gpu_smoke.py``.

The tensors are small and of odd sizes. compute-sanitizer runs this program and sees each access beyond one.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch

from cges_kernels import ProxAdamW, ProxSGD, available_backends
from cges_kernels.backends.extension import BUILT
from cges_kernels.core.groups import grouped_layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUMBERED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # as the CUDA executor knows them
GROUPS = {  # from short groups to those that several blocks together cannot hold; a bias has none
    "feature": [(37, 51), (1100, 9), (3000, 20), (16000, 20), (70,)],
    # rows of odd and even lengths, for part of a warp, a warp and a block; then those that exceed registers
    "filter": [(33, 7), (65, 48), (17, 900), (9, 2052), (3, 4096), (2, 20001), (2, 40001), (1, 300007)],
    "channel": [(24, 5, 3, 3), (150, 2, 3, 3), (12, 2, 47, 45)],
    "tensor": [(90, 71)],
}
OPTIONS: Sequence[dict[str, Any]] = (
    {"prox_mode": "sequential"},
    {"prox_mode": "sequential", "momentum": 0.9},
    {"prox_mode": "exact", "freeze_zeros": "group", "momentum": 0.9},
    {"optimizer": ProxAdamW, "prox_mode": "exact", "freeze_zeros": "group"},
    {"optimizer": ProxAdamW, "prox_mode": "sequential", "capturable": True},  # counts steps on the GPU
    {"momentum": 0.9, "freeze_zeros": "group", "skip_dead": True},  # from the third step on
)


def steps(backend: str, device: str, dtype: torch.dtype, options: dict[str, Any]) -> list[torch.Tensor]:
    """The weights after a few steps, which start from the same numbers whatever the backend."""
    generator = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...]) -> torch.Tensor:  # made on the CPU: no kernels but those under test
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    groups = []
    for group_by, shapes in GROUPS.items():
        for shape in shapes:
            p = torch.nn.Parameter(normal(shape))
            if "skip_dead" in options:
                p.data[1::2] = 0.0
            p.grad = normal(shape)
            _, outer, _, inner, _ = grouped_layout(p, group_by, None)
            size = outer * inner  # of a group
            penalty = {"group_lasso": 0.5 * size**0.5, "exclusive_lasso": 1 / size, "l1": 0.05}
            groups.append({"params": [p], "group_by": group_by, **penalty})
    make = options.get("optimizer", ProxSGD)
    # With capturable the reference forms powers in float32, as torch does, and so is many roundings off.
    left_out = {"optimizer", "capturable"} if backend == "reference" else {"optimizer"}
    told = {key: x for key, x in options.items() if key not in left_out}
    optimizer = make(groups, lr=0.1, backend=backend, **told)
    for _ in range(3 if "skip_dead" in options else 2):
        optimizer.step()
    return [p.detach().cpu() for group in groups for p in group["params"]]


def cuda_paths(tensors: Sequence[tuple[str, tuple[int, ...]]], dtype: torch.dtype) -> dict[str, int]:
    """The number of blocks of the CUDA executor that work on these tensors, by path."""
    layouts = [grouped_layout(torch.empty(shape, device="meta"), spec, None) for spec, shape in tensors]
    counts = BUILT["cuda"].cuda_paths(layouts, NUMBERED.index(dtype), 0)
    return dict(zip(("rows", "tile", "shared", "ticket"), counts))


def check_paths(dtype: torch.dtype) -> None:
    """Ends the program unless the CUDA executor takes every path."""
    paths = cuda_paths([(spec, shape) for spec, shapes in GROUPS.items() for shape in shapes], dtype)
    if not all(paths.values()):
        sys.exit(f"gpu_smoke: expected blocks on every path with {dtype}, got {paths}")


def check(backend: str, device: str, name: str, options: dict[str, Any]) -> None:
    dtype = DTYPES[name]
    expected = steps("reference", "cpu", dtype, options)
    for got, right in zip(steps(backend, device, dtype, options), expected):
        error = (got.double() - right.double()).norm() / right.double().norm()
        if not error <= 8 * torch.finfo(dtype).eps:
            sys.exit(f"gpu_smoke: {backend} {name} {options} {tuple(got.shape)}: error {error:.2g}")


def main(backends: Sequence[str], device: str = "cuda") -> None:
    """A few steps with each backend, dtype and options; the program ends at the first that is wrong."""
    for backend, name in itertools.product(backends, DTYPES):
        for options in OPTIONS:
            check(backend, device, name, options)
        if backend == "cuda":
            BUILT["cuda"].limit_device(multiprocessors=4)  # so few that they cannot hold the largest groups
            try:
                check_paths(DTYPES[name])
                for options in OPTIONS:
                    check(backend, device, name, options)
            finally:
                BUILT["cuda"].limit_device()
    print(f"gpu_smoke: right with {', '.join(backends)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="gpu_smoke", description=__doc__)
    parser.add_argument("--backend", choices=("cuda", "triton"), help="try this one (default: all here)")
    wish = parser.parse_args().backend
    if not torch.cuda.is_available():
        sys.exit(f"gpu_smoke: expected a CUDA device, found none (torch {torch.__version__})")
    here = [wish] if wish else [b for b in ("cuda", "triton") if b in available_backends()]
    if not here:
        sys.exit("gpu_smoke: expected a GPU executor, found none")
    main(here)
