"""Benchmarks: run.py measures on the CPU, gpu.py on a GPU; readme.py writes the README's tables of both."""
