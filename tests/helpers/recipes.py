"""For tests of the recipes: a stack of Linear layers, and param groups looked up by name."""

import itertools

from torch import nn

COEFFICIENTS = ("group_lasso", "exclusive_lasso", "l1")


def mlp(*widths):
    """Linear layers from each width to the next, without activations."""
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


def by_name(groups):
    """{parameter name: its param group}."""
    return {name: group for group in groups for name, _ in group["params"]}
