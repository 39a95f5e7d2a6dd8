"""Trainers are imported where torchvision, if there is one, can be."""

import pytest
from helpers.vision import torchvision


@pytest.fixture(scope="session")
def trainers():
    torchvision()
