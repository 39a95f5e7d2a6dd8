"""The code that the examples share.

data.py loads images. networks.py has the networks, methods.py the six methods that are compared, and
training.py the training loop and the measurements of a trained network. jobs.py runs many trainings in worker
processes. results.py averages and compares their results, and figures.py draws them. cli.py has the options
of the commands.
"""
