"""The fixture for tests of step plans."""

import pytest
from helpers.plans import PLANS


@pytest.fixture(params=PLANS)
def Plan(request):
    """The class of a step plan: Python's, and the one in C++ where it is built."""
    return PLANS[request.param]
