"""Stands a CPU in for the GPU that benchmarks measure, and makes up rows of times."""

import os

from helpers.programs import ROOT

from bench import lab, timing

NO_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


class CpuLab(lab.Lab):
    """A lab on the CPU, with so small an L2 cache that tensors rotate through several sets."""

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
    """The function that a measured run would be, for contenders whose times in ms are made up."""
    return lambda: [{name: [value / 1e3] * 5 for name, value in ms.items()}]
