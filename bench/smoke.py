"""A few steps on every path of every GPU executor, beside the reference: ``python -m bench.smoke``.

The tensors are small and of odd sizes: compute-sanitizer runs this and sees each access beyond one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from cges_kernels import ProxSGD, available_backends

from .lab import DTYPES

GROUPS = {  # short groups and long ones, of each kind of layout; a bias has no groups
    "feature": [(37, 51), (1100, 9), (70,)],
    "filter": [(33, 7), (17, 900), (2, 20001)],
    "channel": [(24, 5, 3, 3), (150, 2, 3, 3)],
    "tensor": [(90, 71)],
}
OPTIONS: Sequence[dict[str, Any]] = (
    {"prox_mode": "sequential"},
    {"prox_mode": "exact", "freeze_zeros": "group", "momentum": 0.9},
)


def steps(backend: str, device: str, dtype: torch.dtype, options: dict[str, Any]) -> list[torch.Tensor]:
    """The weights after two steps from the same numbers whatever the backend."""
    generator = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...]) -> torch.Tensor:  # made on the CPU: no kernels but those under test
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    groups = []
    for group_by, shapes in GROUPS.items():
        params = [torch.nn.Parameter(normal(shape)) for shape in shapes]
        for p in params:
            p.grad = normal(p.shape)
        size = max(p.numel() for p in params)
        penalty = {"group_lasso": 0.5, "exclusive_lasso": 1 / size, "l1": 0.05}
        groups.append({"params": params, "group_by": group_by, **penalty})
    optimizer = ProxSGD(groups, lr=0.1, backend=backend, **options)
    for _ in range(2):
        optimizer.step()
    return [p.detach().cpu() for group in groups for p in group["params"]]


def main(device: str = "cuda") -> None:
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"bench.smoke: expected a CUDA device, found none (torch {torch.__version__})")
    backends = [backend for backend in ("triton", "cuda") if backend in available_backends()]
    for backend in backends:
        for name, dtype in DTYPES.items():
            for options in OPTIONS:
                expected = steps("reference", "cpu", dtype, options)
                for got, right in zip(steps(backend, device, dtype, options), expected):
                    error = (got.double() - right.double()).norm() / right.double().norm()
                    bound = 8 * torch.finfo(dtype).eps
                    if not error <= bound:
                        sys.exit(
                            f"bench.smoke: {backend} {name} {options} {tuple(got.shape)}: error {error:.2g}"
                        )
    print(f"bench.smoke: right with {', '.join(backends) or 'no GPU executor, as none is here'}")
    sys.exit(0 if backends else 1)


if __name__ == "__main__":
    main()
