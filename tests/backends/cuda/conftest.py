import pytest
from helpers import emulated

from cges_kernels.backends import registry
from cges_kernels.backends.extension import BUILT


@pytest.fixture
def device():
    """The emulated device, as it was again afterwards."""
    found = emulated.Device(BUILT["cuda"].__file__)
    registry._why_not_device.cache_clear()
    yield found
    found.reset()
    registry._why_not_device.cache_clear()
