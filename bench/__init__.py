"""Benchmarks of steps on the CPU (run.py) and a GPU (gpu.py) and of training iterations (training.py)."""
