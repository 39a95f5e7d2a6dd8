import contextlib
import importlib.util
import os
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: the machine may have other work

import pytest
import torch
from cuda_emulator.build import compiler
from helpers import emulated
from helpers.right import INTERPRETED, device_of
from helpers.tiers import TILES, check_reasons

from cges_kernels import available_backends
from cges_kernels.backends import unplanned
from cges_kernels.backends.extension import BUILT

if INTERPRETED:  # settled before anything imports a kernel
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        from helpers import interpreter  # noqa: F401
    if compiler() and os.environ.get("CGES_EMULATOR") != "0":  # building it takes a minute
        BUILT["cuda"] = emulated.load()


def pytest_collection_modifyitems(items):
    check_reasons(items)


def pytest_runtest_setup(item):
    if INTERPRETED and item.get_closest_marker("gpu"):
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def fresh_random_inputs(request):
    """Every test draws its own numbers, the same in every run and wherever it lies."""
    torch.manual_seed(hash_of(request.node.name.partition("@")[0]))  # pytest-xdist appends a group


@pytest.fixture(autouse=True)
def default_device(request):
    """Tensors are made where the test's backend serves them."""
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
    torch._dynamo.reset()


@pytest.fixture
def threads():
    """torch.set_num_threads, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=TILES)
def tiles(request, monkeypatch):
    """Groups that fit a tile ("whole"), or the same ones taken for groups that do not ("pieces")."""
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
    unplanned.forget()  # what is kept was cut otherwise
    yield request.param
    unplanned.forget()
    if "cpu" in BUILT:
        BUILT["cpu"].limit_z_bytes(2**31)
    if "cuda" in BUILT:
        emulated.limit_device()


def hash_of(text):
    return sum(ord(c) * 31**i for i, c in enumerate(text)) % 2**31


class Executors(NamedTuple):
    """What a parameter of tests stands for: those that can run here, some in the second tier alone."""

    but: tuple[str, ...] = ()
    second_tier: tuple[str, ...] = ()
    why: str = ""


EXECUTORS = {
    "backend": Executors(),
    "fused_backend": Executors(but=("reference",)),
    "kernel_backend": Executors(but=("reference", "cpu")),
    "checked_backend": Executors((), ("triton", "cuda"), "is Python around the executors, the same for each"),
    "fastest_backend": Executors((), ("triton", "cuda", "reference"), "is Python's, whatever the executor"),
    "quick_backend": Executors(
        ("reference",), ("triton",), "many steps, which Triton's interpreter makes slow"
    ),
}


def pytest_generate_tests(metafunc):
    for name in (name for name in EXECUTORS if name in metafunc.fixturenames):
        but, second_tier, why = EXECUTORS[name]
        if "cpu" not in available_backends():
            second_tier = set(second_tier) - {"reference"}
        if not INTERPRETED:  # on a GPU kernels take no time
            second_tier = set(second_tier) - {"triton", "cuda"}
        executors = [
            pytest.param(executor, marks=pytest.mark.full(why)) if executor in second_tier else executor
            for executor in available_backends()
            if executor not in but
        ]
        metafunc.parametrize(name, executors)
