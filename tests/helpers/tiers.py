"""Two tiers of tests: `make test` runs in minutes what sees a break, `make test-full` everything.

A test marked `full` is of the second tier alone; the mark's argument says what the test buys.
"""

import itertools

import pytest
from helpers.right import INTERPRETED

from cges_kernels import available_backends

TILES = ("whole", "pieces")  # what conftest.py's fixture `tiles` takes


def covering(**options):
    """Parametrises by the product of these lists, of which the first tier runs a covering array.

    Breaks mostly show for one value or for a pair of them: in a covering array each pair of values of two
    options comes together at least once. Of two options that is their product. On a GPU kernels take no
    time, and all of the product is of the first tier. `tiles` is conftest.py's fixture; tensors are made
    where the executor named by `executor` serves them.
    """
    rows = ()
    if INTERPRETED and all(options.values()):  # not so where no executor can run
        from allpairspy import AllPairs

        rows = AllPairs([range(len(option)) for option in options.values()])
    return _of_product({tuple(row) for row in rows}, options, "a covering array")


def each_value(**options):
    """As covering(), for options that do not meet in the code: each value comes at least once."""
    sizes = [len(option) for option in options.values()]
    rows = {tuple(i % n for n in sizes) for i in range(max(sizes))} if all(sizes) else set()
    return _of_product(rows, options, "each value once")


def _of_product(first_tier, options, which):
    rest = pytest.mark.full(f"the rest of a product, of which the first tier runs {which}")
    values = [list(option) for option in options.values()]
    cases = [
        pytest.param(
            *(option[i] for option, i in zip(values, at)),
            marks=() if at in first_tier or not INTERPRETED else rest,
            id="-".join(identity(option[i]) for option, i in zip(values, at)),
        )
        for at in itertools.product(*(range(len(option)) for option in values))
    ]
    indirect = [name for name in options if name == "tiles"]
    return pytest.mark.parametrize(tuple(options), cases, indirect=indirect)


def fused_backends():
    """What a covering array takes for the executors that can run here, the reference apart."""
    return [name for name in available_backends() if name != "reference"]


def identity(value):
    if isinstance(value, dict):
        return ",".join(f"{key}={x}" for key, x in value.items()) or "none"
    return getattr(value, "__name__", getattr(value, "name", str(value))).removeprefix("torch.")


def check_reasons(items):
    """UsageError where a test is left out of the first tier without a reason."""
    for item in items:
        for mark in item.iter_markers("full"):
            if not (mark.args and str(mark.args[0]).strip()):
                raise pytest.UsageError(f"{item.nodeid}: expected full(reason), got full{mark.args}")
