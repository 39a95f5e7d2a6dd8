"""The fixture for tests that import trainers."""

import pytest
from helpers.vision import torchvision


@pytest.fixture(scope="session")
def trainers():
    """Makes torchvision importable first, for trainers import it where they find it."""
    torchvision()
