"""Fixtures for tests of the CUDA executor."""

import pytest
from helpers import emulated
from helpers.cuda import LIMIT
from helpers.right import INTERPRETED

from cges_kernels.backends import registry
from cges_kernels.backends.extension import BUILT


@pytest.fixture
def device():
    """The emulated device; its attributes are restored afterwards."""
    found = emulated.Device(BUILT["cuda"].__file__)
    registry._why_not_device.cache_clear()
    yield found
    found.reset()
    registry._why_not_device.cache_clear()


@pytest.fixture
def little_memory():
    """So little shared memory that small shapes take every path, and four multiprocessors."""
    emulated.limit_device(shared_bytes=LIMIT if INTERPRETED else 36_000, multiprocessors=4)
    yield
    emulated.limit_device()
