import pytest
import torch

from cges_kernels import available_backends, ops


@pytest.fixture(autouse=True)
def fresh_random_inputs(request):
    """Every test draws its own numbers, the same in every run."""
    torch.manual_seed(hash_of(request.node.nodeid))


@pytest.fixture
def poisoned_memory():
    """New uninitialised tensors are filled with NaN, so that an element left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def threads():
    """torch.set_num_threads, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["whole", "pieces"])
def tiles(request):
    """Groups that fit a tile, then the same ones taken for groups that do not."""
    if request.param == "pieces" and ops._C is not None:
        ops._C.limit_z_bytes(0)
    yield request.param
    if ops._C is not None:
        ops._C.limit_z_bytes(2**31)


def hash_of(text):
    return sum(ord(c) * 31**i for i, c in enumerate(text)) % 2**31


def pytest_generate_tests(metafunc):
    """`backend`: every executor that can run here; `fused_backend`: all but the reference."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", available_backends())
    if "fused_backend" in metafunc.fixturenames:
        metafunc.parametrize("fused_backend", [b for b in available_backends() if b != "reference"])
