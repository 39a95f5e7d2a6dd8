"""ProxSGD on real data: six ways to make a small LeNet sparse, compared. ``python -m cges_kernels.demo --help``.

Read in this order: training.py (the network, the six methods, one run), results.py (the table, the claims),
speed.py (time per optimizer step), figures.py, cli.py.
"""
