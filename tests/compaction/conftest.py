"""What all tests of compact() share."""

import pytest

from cges_kernels.compaction import running


@pytest.fixture(autouse=True)
def few_turns(monkeypatch):
    """Latency is measured in two turns, so that forward passes can be counted."""
    monkeypatch.setattr(running, "TURNS", (2, 2))
