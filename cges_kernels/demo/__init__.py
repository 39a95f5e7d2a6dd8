"""ProxSGD on real data: six ways to make a small LeNet sparse, compared. ``python -m cges_kernels.demo``.

Read in this order: training.py (the network, the six methods, one run), results.py (the table), claims.py
(what the runs say of the thesis's claims), speed.py (time per optimizer step), figures.py, cli.py.
"""
