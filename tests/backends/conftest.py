import pytest
from helpers.plans import PLANS


@pytest.fixture(params=PLANS)
def Plan(request):
    return PLANS[request.param]
