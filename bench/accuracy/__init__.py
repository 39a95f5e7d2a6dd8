"""The thesis's experiments as one command each: ``python -m bench.accuracy fig3``.

Read in this order: arms.py (what is compared), training.py (one repetition: data, network, training, what is
measured), experiments.py (each experiment's runs), results.py (confidence intervals), figures.py, page.py
(docs/claims.md), cli.py; data.py and networks.py beside them.
"""
