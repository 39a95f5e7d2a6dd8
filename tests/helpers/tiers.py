"""Two tiers of tests: `make test` runs in minutes what sees a break, `make test-full` everything.

A test marked `full` is of the second tier alone; the mark's argument says what the test buys.
"""

import itertools

import pytest
from allpairspy import AllPairs

from cges_kernels import available_backends

TILES = ("whole", "pieces")  # what conftest.py's fixture `tiles` takes
PRODUCT = pytest.mark.full("the rest of a product, whose covering array the first tier runs")


def covering(**options):
    """Parametrises by the product of these lists, of which the first tier runs a covering array.

    Breaks mostly show for one value or for a pair of them: in a covering array each pair of values of two
    options comes together at least once. Of two options that is their product. `tiles` is conftest.py's
    fixture, and where `executor` serves tensors they are made.
    """
    sizes = [len(list(option)) for option in options.values()]
    rows = AllPairs([range(n) for n in sizes]) if all(sizes) else ()  # no executor can run here
    return _of_product({tuple(row) for row in rows}, options)


def each_value(**options):
    """As covering(), where options do not meet in the code: each value comes at least once."""
    sizes = [len(list(option)) for option in options.values()]
    return _of_product({tuple(i % n for n in sizes) for i in range(max(sizes))}, options)


def _of_product(first_tier, options):
    values = [list(option) for option in options.values()]
    cases = [
        pytest.param(
            *(option[i] for option, i in zip(values, at)),
            marks=() if at in first_tier else PRODUCT,
            id="-".join(identity(option[i]) for option, i in zip(values, at)),
        )
        for at in itertools.product(*(range(len(option)) for option in values))
    ]
    return pytest.mark.parametrize(
        tuple(options), cases, indirect=[name for name in options if name == "tiles"]
    )


def fused_backends():
    """What a covering array takes for the executors that can run here, the reference apart."""
    return [name for name in available_backends() if name != "reference"]


def identity(value):
    if isinstance(value, dict):
        return ",".join(f"{key}={x}" for key, x in value.items()) or "none"
    return getattr(value, "__name__", str(value)).removeprefix("torch.")


def check_reasons(items):
    """Of tests that say nothing of why they are not in the first tier, and of marks that it does not know."""
    for item in items:
        for mark in item.iter_markers("full"):
            if not (mark.args and isinstance(mark.args[0], str)):
                raise pytest.UsageError(f"{item.nodeid}: expected full(reason), got full{mark.args}")
