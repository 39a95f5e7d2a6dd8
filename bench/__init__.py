"""Benchmarks. run.py measures steps on the CPU, gpu.py on a GPU, and training.py measures whole iterations.

pages.py writes the tables of README.md and docs/speed.md.
"""
