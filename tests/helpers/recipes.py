"""What tests of the recipes share: a perceptron, and its param groups by name."""

import itertools

from torch import nn

COEFFICIENTS = ("group_lasso", "exclusive_lasso", "l1")


def mlp(*widths):
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


def by_name(groups):
    """{parameter name: its group}."""
    return {name: group for group in groups for name, _ in group["params"]}
