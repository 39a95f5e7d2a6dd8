"""Asks whether a CUDA graph is being captured, for executors and the planner."""

from __future__ import annotations

import torch


def is_capturing() -> bool:
    """Whether kernels that are launched now are captured in a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
