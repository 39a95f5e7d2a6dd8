"""The code that the examples share.

data.py loads images, networks.py has the networks, methods.py the six methods that are compared, training.py
the training loop and what is measured of a trained network. jobs.py runs many trainings in worker processes.
results.py judges the results by one rule, and figures.py draws them. cli.py has the options of the commands.
"""
