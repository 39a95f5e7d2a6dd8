"""Benchmarks: run.py measures on the CPU, gpu.py on a GPU; pages.py writes the tables of both."""
