"""The emulator that stands in for CUDA: what is right passes, and what is planted is caught."""

import ctypes
import os
import shutil
import subprocess

import pytest
import torch
from cuda_emulator.build import HERE, build, compiler, has_sanitizer

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler"),
    pytest.mark.xdist_group("cuda_emulator"),
]

RIGHT = ["sum_blocks", "swap_in_warp", "sum_clusters", "hand_over", "use_all"]
LAUNCH_FAILURE, INVALID_VALUE, INSUFFICIENT_DRIVER, NOT_SUPPORTED = 719, 1, 35, 801


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """Builds planted.cu: a library, or with a sanitizer a program."""
    folder = tmp_path_factory.mktemp("planted")

    def build_planted(sanitize=None):
        if sanitize and not has_sanitizer(sanitize):
            pytest.skip(f"{compiler()} cannot link -fsanitize={sanitize}")
        return build(folder / str(sanitize), [HERE / "planted.cu"], sanitize, shared=sanitize is None)

    return build_planted


@pytest.fixture
def library(planted):
    library = ctypes.CDLL(str(planted()))
    library.emulator_message.restype = ctypes.c_char_p
    library.emulator_get.restype = ctypes.c_longlong
    library.emulator_set.argtypes = [ctypes.c_char_p, ctypes.c_longlong]
    library.emulator_reset()
    return library


def check(library, name, planted=False, seed=0):
    return library.check(name.encode(), planted, seed)


def run(program, *arguments):
    """Exit status and standard error; TSan may need addresses that are not random."""
    environment = os.environ | {"TSAN_OPTIONS": "atexit_sleep_ms=0"}
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    if "unexpected memory mapping" in done.stderr and shutil.which("setarch"):
        command = ["setarch", "-R", *command]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    return done.returncode, done.stderr


@pytest.mark.parametrize("blocks_in_flight", [1, 4, 16])
@pytest.mark.parametrize("name", RIGHT)
def test_right_in_every_order(library, name, blocks_in_flight):
    library.emulator_set(b"blocks_in_flight", blocks_in_flight)
    assert {check(library, name, seed=seed) for seed in range(100)} == {0}
    assert library.emulator_get(b"launches") == 100


@pytest.mark.parametrize("name, blocks_in_flight", [("take_ticket", 1), ("hand_over", 4)])
def test_seeds_give_orders(library, name, blocks_in_flight):
    """Which block starts first, and what `hand_over` gives without its wait; in every run the same."""

    def run_all():
        library.emulator_reset()
        library.emulator_set(b"blocks_in_flight", blocks_in_flight)
        return [check(library, name, planted=True, seed=seed) for seed in range(50)]

    results = run_all()
    assert {0, -1} == set(results)
    assert results == run_all()


@pytest.mark.slow
@pytest.mark.parametrize("blocks_in_flight", [1, 4])
@pytest.mark.parametrize("name", ["sum_blocks", "swap_in_warp", "sum_clusters", "hand_over"])
def test_thread_sanitizer_sees_missing_synchronisation(planted, name, blocks_in_flight):
    program = planted("thread")
    assert run(program, name, "right", 10, blocks_in_flight) == (0, "")
    code, errors = run(program, name, "wrong", 1, blocks_in_flight)
    assert code != 0 and "data race" in errors and name in errors


@pytest.mark.parametrize("name", ["use_all", "past_shared"])
def test_thread_sanitizer_lets_pass(planted, name):
    assert run(planted("thread"), name, "right", 10) == (0, "")


@pytest.mark.parametrize("sanitize", ["address", "thread"])
def test_sanitizers_let_failed_launches_pass(planted, sanitize):
    """Their fibers are dropped in the middle, and used again."""
    code, errors = run(planted(sanitize), "stop", "wrong", 3)
    assert code == 1 and "__trap" in errors and "Sanitizer" not in errors


@pytest.mark.parametrize("name", ["past_shared", "past_global"])
def test_address_sanitizer_sees_out_of_bounds(planted, name):
    program = planted("address")
    assert run(program, name, "right", 10) == (0, "")
    code, errors = run(program, name, "wrong", 1)
    assert code != 0 and "heap-buffer-overflow" in errors and name in errors


@pytest.mark.parametrize("name", RIGHT)
def test_address_sanitizer_lets_pass(planted, name):
    assert run(planted("address"), name, "right", 10) == (0, "")


@pytest.mark.parametrize(
    "name, parts",
    [
        ("diverge_at_shuffle", ["deadlock", "31 at __shfl_xor_sync", "33 at their end"]),
        (
            "diverge_at_barrier",
            ["deadlock", "block 0 of 64 threads", "63 at __syncthreads", "1 at __shfl_sync"],
        ),
        ("diverge_at_cluster", ["deadlock", "64 at cluster.sync", "64 at their end"]),
        ("mix_exchanges", ["__ballot_sync", "__syncwarp", "0xffffffff"]),
        ("spin", ["spin that does not end"]),
        ("stop", ["__trap in thread 5"]),
    ],
)
def test_what_cannot_end_is_an_error(library, name, parts):
    assert check(library, name) == 0
    assert check(library, name, planted=True) == LAUNCH_FAILURE
    message = library.emulator_message().decode()
    assert all(part in message for part in parts), message
    assert check(library, "sum_blocks") == 0  # the next launch is none the worse


def test_device_limits(library):
    assert check(library, "too_much_shared") == INVALID_VALUE
    library.emulator_set(b"shared_memory_per_block", 128)
    assert check(library, "sum_blocks") == INVALID_VALUE
    library.emulator_reset()
    library.emulator_set(b"cluster_launch", 0)
    assert check(library, "sum_clusters") == NOT_SUPPORTED
    library.emulator_set(b"driver_version", 11080)
    assert check(library, "sum_blocks") == INSUFFICIENT_DRIVER
    assert library.emulator_get(b"launches") == 0
    assert library.emulator_set(b"no such name", 1) == library.emulator_get(b"no such name") == -1


def test_a_launch_told_to_fail(library):
    library.emulator_set(b"fail_launch", 2)
    assert [check(library, "sum_blocks") for _ in range(3)] == [0, LAUNCH_FAILURE, 0]


@pytest.mark.parametrize("name, dtype", [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_conversions(library, name, dtype):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)  # every value
    wide = torch.empty(2**16)
    getattr(library, f"from_{name}")(pointer(bits), pointer(wide), bits.numel())
    expected = bits.view(dtype).float()
    torch.testing.assert_close(wide, expected, rtol=0, atol=0, equal_nan=True)

    finite = expected[expected.isfinite()].sort().values
    middle = (finite[1:].double() + finite[:-1].double()).div(2).float()  # ties
    up, down = middle.nextafter(torch.tensor(torch.inf)), middle.nextafter(torch.tensor(-torch.inf))
    anything = torch.randint(-(2**31), 2**31, (10**6,)).to(torch.int32).view(torch.float32)
    floats = torch.cat([expected, middle, up, down, anything])
    rounded = torch.empty(floats.numel(), dtype=torch.int16)
    getattr(library, f"to_{name}")(pointer(floats), pointer(rounded), floats.numel())
    same = (rounded == floats.to(dtype).view(torch.int16)) | floats.isnan()
    assert same.all()
    assert (rounded.view(dtype).isnan() == floats.isnan()).all()


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())
