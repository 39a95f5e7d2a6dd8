"""What executors and the planner must know of CUDA graphs."""

from __future__ import annotations

import torch


def is_capturing() -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
