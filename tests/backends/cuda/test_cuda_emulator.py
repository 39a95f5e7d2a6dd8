"""The emulator that stands in for CUDA: right kernels give right results, and planted faults are noticed.

planted.cu and planted_traffic.cu hold kernels by name, each as a right one and with a planted fault.
"""

import ctypes
import os
import shutil
import subprocess

import pytest
import torch
from cuda_emulator.build import HERE, build, compiler, has_sanitizer
from helpers import emulated
from helpers.tiers import each_value

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler"),
    pytest.mark.xdist_group("cuda_emulator"),
]

RACING = ["sum_blocks", "swap_in_warp", "sum_clusters", "hand_over"]
RACING += ["ring", "copy_fresh", "sum_grid", "sum_grid_again"]
RIGHT = [*RACING, "use_all", "copy_into_use", "copy_overwritten", "copy_with_zeros"]
SOURCES = [HERE / "planted.cu", HERE / "planted_traffic.cu"]
INVALID_VALUE, INSUFFICIENT_DRIVER, LAUNCH_FAILURE, NOT_SUPPORTED = 1, 35, 719, 801
COOPERATIVE_LAUNCH_TOO_LARGE = 720


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """Builds planted.cu and planted_traffic.cu: a library, or with a sanitizer a program."""
    folder = tmp_path_factory.mktemp("planted")

    def build_planted(sanitize=None):
        if sanitize and not has_sanitizer(sanitize):
            pytest.skip(f"{compiler()} cannot link -fsanitize={sanitize}")
        return build(folder / str(sanitize), SOURCES, sanitize, shared=sanitize is None)

    return build_planted


@pytest.fixture
def library(planted):
    """The library, with the device's attributes as they are at first."""
    library = ctypes.CDLL(str(planted()))
    library.emulator_message.restype = ctypes.c_char_p
    library.emulator_get.restype = ctypes.c_longlong
    library.emulator_set.argtypes = [ctypes.c_char_p, ctypes.c_longlong]
    library.emulator_reset()
    return library


def check(library, name, planted=False, seed=0):
    """The outcome of a kernel: 0 if its result is right, -1 if it is wrong, or the CUDA error."""
    return library.check(name.encode(), planted, seed)


def run(program, *arguments):
    """Exit status and standard error of the program. TSan may need addresses that are not random."""
    environment = os.environ | {"TSAN_OPTIONS": "atexit_sleep_ms=0"}
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    if "unexpected memory mapping" in done.stderr and shutil.which("setarch"):
        command = ["setarch", "-R", *command]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    return done.returncode, done.stderr


@each_value(name=RIGHT, blocks_in_flight=[1, 4, 16])
def test_right_in_every_order(library, name, blocks_in_flight):
    """Right kernels give right results for 100 orders of blocks and threads."""
    library.emulator_set(b"blocks_in_flight", blocks_in_flight)
    assert {check(library, name, seed=seed) for seed in range(100)} == {0}
    assert library.emulator_get(b"launches") == (200 if name == "sum_grid_again" else 100)


@pytest.mark.parametrize("name, blocks_in_flight", [("take_ticket", 1), ("hand_over", 4)])
def test_seeds_give_orders(library, name, blocks_in_flight):
    """Different seeds give different orders, and the same seed the same order.

    The orders show in which block starts first, and in what `hand_over` gives without its wait.
    """

    def run_all():
        library.emulator_reset()
        library.emulator_set(b"blocks_in_flight", blocks_in_flight)
        return [check(library, name, planted=True, seed=seed) for seed in range(50)]

    results = run_all()
    assert {0, -1} == set(results)
    assert results == run_all()


@pytest.mark.parametrize("name", ["ring", "copy_into_use", "copy_overwritten", "sum_grid", "sum_grid_again"])
def test_wrong_results_of_planted_faults(library, name):
    """A fault gives wrong results: copies too early, sums used too early, counters left by a launch."""
    results = {check(library, name, planted=True, seed=seed) for seed in range(20)}
    assert results == {-1}


@pytest.mark.full("ThreadSanitizer notices the planted races; its programs take minutes")
@pytest.mark.parametrize("blocks_in_flight", [1, 4])
@pytest.mark.parametrize("name", RACING)
def test_thread_sanitizer_sees_missing_synchronisation(planted, name, blocks_in_flight):
    """TSan reports a race of each kernel without its barrier or wait, and none of the right kernel."""
    program = planted("thread")
    assert run(program, name, "right", 10, blocks_in_flight) == (0, "")
    code, errors = run(program, name, "wrong", 1, blocks_in_flight)
    assert code != 0 and "data race" in errors and name in errors


@pytest.mark.parametrize("name", ["use_all", "past_shared"])
def test_thread_sanitizer_lets_pass(planted, name):
    """TSan reports no race of kernels that have none."""
    assert run(planted("thread"), name, "right", 10) == (0, "")


@pytest.mark.parametrize("sanitize", ["address", "thread"])
def test_sanitizers_let_failed_launches_pass(planted, sanitize):
    """A failed launch drops its fibers midway and uses them again, which no sanitizer may report."""
    code, errors = run(planted(sanitize), "stop", "wrong", 3)
    assert code == 1 and "__trap" in errors and "Sanitizer" not in errors


@pytest.mark.parametrize("name", ["past_shared", "past_global", "copy_past_global", "copy_only_zeros"])
def test_address_sanitizer_sees_out_of_bounds(planted, name):
    """ASan reports accesses and copies beyond shared and global memory."""
    program = planted("address")
    assert run(program, name, "right", 10) == (0, "")
    code, errors = run(program, name, "wrong", 1)
    assert code != 0 and "heap-buffer-overflow" in errors and name in errors


@pytest.mark.parametrize("name", RIGHT)
def test_address_sanitizer_lets_pass(planted, name):
    """ASan reports nothing of right kernels."""
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
        ("copy_odd_size", ["an asynchronous copy of 12 bytes", "thread 0"]),
        ("copy_from_misaligned", ["misaligned asynchronous copy of 16 bytes"]),
        ("copy_to_misaligned", ["misaligned asynchronous copy of 16 bytes"]),
        ("copy_past_shared", ["asynchronous copy to what is not the block's shared memory"]),
        ("copy_without_wait", ["1 asynchronous copies never waited for"]),
    ],
)
def test_what_cannot_go_on_is_an_error(library, name, parts):
    """Deadlocks, endless spins, traps and invalid copies fail the launch and say what happened."""
    assert check(library, name) == 0
    assert check(library, name, planted=True) == LAUNCH_FAILURE
    message = library.emulator_message().decode()
    assert all(part in message for part in parts), message
    assert check(library, "sum_blocks") == 0  # the next launch works


def test_device_limits(library):
    """Launches beyond the device's limits fail with CUDA's errors."""
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
    """The launch that a test chooses fails, and no other."""
    library.emulator_set(b"fail_launch", 2)
    assert [check(library, "sum_blocks") for _ in range(3)] == [0, LAUNCH_FAILURE, 0]


def test_a_cooperative_grid_is_all_in_flight(library):
    """Blocks may wait for each other in a cooperative launch only.

    In a plain launch those that run wait for those that have not started.
    """
    library.emulator_set(b"blocks_in_flight", 4)
    assert check(library, "sum_grid") == 0
    assert check(library, "sum_grid_plainly") == LAUNCH_FAILURE
    assert "spin that does not end" in library.emulator_message().decode()
    library.emulator_set(b"blocks_in_flight", 8)
    assert check(library, "sum_grid_plainly") == 0


@pytest.mark.parametrize("threads, shared, fit", [(1024, 0, 8), (64, 0, 128), (64, 100 << 10, 8)])
def test_a_cooperative_grid_must_fit(library, threads, shared, fit):
    """As many blocks as the occupancy tells can be launched together, and one more cannot.

    The limit comes from threads, blocks or shared memory.
    """
    assert library.blocks_that_fit(threads, shared) == fit
    assert library.launch_together(fit, threads, shared, True) == 0
    assert library.launch_together(fit + 1, threads, shared, True) == COOPERATIVE_LAUNCH_TOO_LARGE
    assert f"{fit + 1} blocks that must run at once" in library.emulator_message().decode()
    assert library.emulator_get(b"launches") == 1
    assert library.launch_together(fit + 1, threads, shared, False) == 0
    library.emulator_set(b"cooperative_launch", 0)
    assert library.launch_together(fit, threads, shared, True) == NOT_SUPPORTED


COPIES = ["uint4", "float4", "uint2", "double", "unsigned", "int", "float", "bfloat16", "half"]
COPIES += ["asynchronous uint4", "asynchronous uint2", "asynchronous float"]


@pytest.mark.parametrize("name", COPIES)
def test_log_of_accesses(library, planted, name):
    """The log holds each access of a copy, which reads and writes each byte once.

    With the planted fault the first element is read twice.
    """
    for planted_fault in (False, True):
        check_log(library, planted, name, planted_fault)


def check_log(library, planted, name, planted_fault):
    """Checks the log's rows, and the counts that traffic() makes from them."""
    source = torch.randint(0, 100, (4096,), dtype=torch.uint8)
    target = torch.zeros_like(source)

    def copy(planted=False):
        assert library.copy(name.encode(), pointer(source), pointer(target), 4096, planted) == 0

    accesses = emulated.Device(str(planted())).accesses(lambda: copy(planted_fault))
    assert target.equal(source)
    copy()  # this copy is not logged
    assert library.emulator_accesses(None, ctypes.c_longlong(0)) == len(accesses)

    size = int(accesses[0, 1])
    once = torch.ones(4096, dtype=torch.int64)
    more = torch.zeros_like(once)
    more[:size] = planted_fault
    for tensor, expected in [(source, (once + more, once * 0)), (target, (once * 0, once))]:
        reads, writes = emulated.traffic(accesses, tensor)
        assert reads.equal(expected[0]) and writes.equal(expected[1])
    reads, _ = emulated.traffic(accesses, source[1:9])  # a tensor that begins and ends within elements
    assert reads.equal((once + more)[1:9])

    address, _, write, block, thread = accesses.unbind(1)
    start = torch.where(write == 1, target.data_ptr(), source.data_ptr())
    mine = (block * 64 + thread) * size == address - start
    # the second read is another thread's
    assert (~mine).sum() == (planted_fault and not name.startswith("asynchronous"))
    own = accesses[(block == 1) & (thread == 3)]
    assert own[:, 2].tolist() == [0, 1]  # a read, then a write


@pytest.mark.parametrize("name, dtype", [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_conversions(library, name, dtype):
    """Conversions to and from 16 bits give torch's bits: for all values, ties and their neighbours."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)  # every 16-bit number
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


@pytest.mark.parametrize("name, dtype", [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_sums_of_pairs(library, name, dtype):
    """__hadd2 gives torch's bits, and the right sign of zero."""
    zeros = torch.tensor([[0.0, 0.0, -0.0, -0.0], [0.0, -0.0, 0.0, -0.0]])
    a, b = torch.cat([zeros, torch.randn(2, 10**5) * 10.0 ** torch.randint(-6, 4, (2, 10**5))], 1)
    total = torch.empty(a.numel(), dtype=torch.int16)
    getattr(library, f"add_{name}")(pointer(a), pointer(b), pointer(total), a.numel() // 2)
    assert total.equal((a.to(dtype) + b.to(dtype)).view(torch.int16))


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())
