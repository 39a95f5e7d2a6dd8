"""The two tiers of tests: `make test` runs the first in minutes, `make test-full` runs both.

The first tier has to notice any break of the code. A test marked `full` belongs to the second tier alone, and
the mark's argument says what the test adds.
"""

import itertools

import pytest
from helpers.right import INTERPRETED

from cges_kernels import available_backends

TILES = ("whole", "pieces")  # the parameters of conftest.py's fixture `tiles`


def covering(**options):
    """Parametrises by the product of these lists; the first tier runs only a covering array of it.

    Most breaks show for one value of an option or for one pair of values of two. A covering array holds each
    such pair at least once; for only two options it is the whole product. On a GPU, where kernels are fast,
    the first tier runs the whole product. The option `tiles` is conftest.py's fixture. Tensors are made where
    the executor named by `executor` serves them.
    """
    rows = ()
    if INTERPRETED and all(options.values()):  # an option has no values where no executor can run
        from allpairspy import AllPairs

        rows = AllPairs([range(len(option)) for option in options.values()])
    return _of_product({tuple(row) for row in rows}, options, "a covering array")


def each_value(**options):
    """Like covering(), for options that do not interact: the first tier runs each value at least once."""
    sizes = [len(option) for option in options.values()]
    rows = {tuple(i % n for n in sizes) for i in range(max(sizes))} if all(sizes) else set()
    return _of_product(rows, options, "each value once")


def _of_product(first_tier, options, which):
    """The parametrisation by a whole product, in which rows outside of ``first_tier`` are marked `full`."""
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
    """The executors that can run here, except the reference: a list for covering()."""
    return [name for name in available_backends() if name != "reference"]


def identity(value):
    """The part of a test's id that stands for this value."""
    if isinstance(value, dict):
        return ",".join(f"{key}={x}" for key, x in value.items()) or "none"
    return getattr(value, "__name__", getattr(value, "name", str(value))).removeprefix("torch.")


def check_reasons(items):
    """Raises UsageError where a test is marked `full` without a reason."""
    for item in items:
        for mark in item.iter_markers("full"):
            if not (mark.args and str(mark.args[0]).strip()):
                raise pytest.UsageError(f"{item.nodeid}: expected full(reason), got full{mark.args}")
