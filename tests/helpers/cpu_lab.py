"""A CPU in the place of the GPU that benchmarks measure, and rows whose times are made up."""

import os

from helpers.programs import ROOT

from bench import lab, timing

NO_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


class CpuLab(lab.Lab):
    """A CPU in the place of the GPU, with an L2 small enough that tensors rotate."""

    device, copy_bytes, warm_up, seconds, cache_bytes, most_sets = "cpu", 2**12, 0.0, 0.0, 1024, 8

    def __init__(self):
        pass

    def clock(self):
        return timing.wall_clock

    def synchronize(self):
        pass

    def free(self):
        pass

    def name(self):
        return "gpu-cpu"

    def environment(self, commit=None):
        return {**lab.environment(commit), "gpu": "none", "driver": "0", "cuda": None, "triton": "3"}


def steady(**ms):
    """What a run of contenders that take these times brings."""
    return lambda: [{name: [value / 1e3] * 5 for name, value in ms.items()}]
