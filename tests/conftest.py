"""What every test gets: its own random numbers, a default device, the executors as parameters, and fixtures.

Without a GPU, importing this file makes every executor available on the CPU: it switches Triton's interpreter
on, and it loads the CUDA executor compiled for the emulator.
"""

import contextlib
import importlib.util
import os
from typing import NamedTuple

# set before torch is imported, so that idle OpenMP threads do not spin
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from cuda_emulator.build import compiler
from helpers import emulated
from helpers.right import INTERPRETED, device_of
from helpers.tiers import TILES, check_reasons

from cges_kernels import available_backends
from cges_kernels.backends import unplanned
from cges_kernels.backends.extension import BUILT

if INTERPRETED:  # before any kernel is imported: Triton reads this variable then
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        from helpers import interpreter  # noqa: F401
    if compiler() and os.environ.get("CGES_EMULATOR") != "0":  # the first build takes a minute
        BUILT["cuda"] = emulated.load()


def pytest_collection_modifyitems(items):
    """Refuses a `full` mark without a reason, see helpers/tiers.py."""
    check_reasons(items)


def pytest_runtest_setup(item):
    """Skips tests marked `gpu` where there is no GPU."""
    if INTERPRETED and item.get_closest_marker("gpu"):
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def fresh_random_inputs(request):
    """Seeds each test by its name: its numbers depend on neither the order of tests nor the process."""
    torch.manual_seed(hash_of(request.node.name.partition("@")[0]))  # pytest-xdist appends "@group" to names


@pytest.fixture(autouse=True)
def default_device(request):
    """Makes new tensors on the device that the test's executor serves."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    backend = next((params[name] for name in (*EXECUTORS, "executor") if name in params), None)
    device = device_of(backend or getattr(request.module, "BACKEND", None))
    with torch.device(device) if device != "cpu" else contextlib.nullcontext():
        yield


@pytest.fixture
def poisoned_memory():
    """New uninitialised tensors are filled with NaN, so that an element left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def nothing_compiled_before():
    """Drops what torch.compile has cached, so that the test compiles anew."""
    torch._dynamo.reset()


@pytest.fixture
def threads():
    """Gives torch.set_num_threads, and restores the number of threads afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=TILES)
def tiles(request, monkeypatch):
    """Runs a test with groups that fit one tile ("whole"), and with too small tiles ("pieces")."""
    if request.param == "pieces":
        if "cpu" in BUILT:
            BUILT["cpu"].limit_z_bytes(0)
        if "cuda" in BUILT:
            emulated.limit_device(shared_bytes=9000 if INTERPRETED else 36_000, multiprocessors=4)
        if "triton" in available_backends():
            from cges_kernels.backends.triton.tiles import COLUMNS, GENERAL, ROWS, TILES, Tile

            chunks = {
                COLUMNS: Tile(0, 64, 64),
                ROWS: Tile(0, 1024, 32 if INTERPRETED else 4),
                GENERAL: Tile(0, 64, 64),
            }
            for kind, tile in chunks.items():
                monkeypatch.setitem(TILES, kind.value, (tile,))
    unplanned.forget()  # plans that are kept were cut for other tiles
    yield request.param
    unplanned.forget()
    if "cpu" in BUILT:
        BUILT["cpu"].limit_z_bytes(2**31)
    if "cuda" in BUILT:
        emulated.limit_device()


def hash_of(text):
    """A number that depends on the text alone; Python's own hash differs between processes."""
    return sum(ord(c) * 31**i for i, c in enumerate(text)) % 2**31


class Executors(NamedTuple):
    """The executors that a test parameter stands for, among those that can run here.

    ``but`` are left out. Those in ``second_tier`` run in the second tier only, and ``why`` is the reason.
    """

    but: tuple[str, ...] = ()
    second_tier: tuple[str, ...] = ()
    why: str = ""


EXECUTORS = {
    "backend": Executors(),
    "fused_backend": Executors(but=("reference",)),
    "kernel_backend": Executors(but=("reference", "cpu")),
    "checked_backend": Executors(
        (),
        ("triton", "cuda"),
        "the code under test is Python around the executors, the same for each of them",
    ),
    "fastest_backend": Executors(
        (), ("triton", "cuda", "reference"), "the code under test is Python, whatever the executor"
    ),
    "quick_backend": Executors(
        ("reference",), ("triton",), "takes many steps, and Triton's interpreter is slow"
    ),
}


def pytest_generate_tests(metafunc):
    """Parametrises each test that has an argument named in EXECUTORS by these executors."""
    for name in (name for name in EXECUTORS if name in metafunc.fixturenames):
        but, second_tier, why = EXECUTORS[name]
        if "cpu" not in available_backends():
            second_tier = set(second_tier) - {"reference"}
        if not INTERPRETED:  # on a GPU kernels are fast enough for the first tier
            second_tier = set(second_tier) - {"triton", "cuda"}
        executors = [
            pytest.param(executor, marks=pytest.mark.full(why)) if executor in second_tier else executor
            for executor in available_backends()
            if executor not in but
        ]
        metafunc.parametrize(name, executors)
