"""The CUDA kernels on the emulator under AddressSanitizer, UBSan and ThreadSanitizer.

ASan reports reads and writes outside of an array, in shared memory too. TSan reports a missing barrier or
wait, because each thread of a kernel is a fiber of its own. Each test runs pytest again, with the sanitizer's
library loaded before anything else.
"""

import os
import shutil
import subprocess
import sys

import pytest
from cuda_emulator.build import compiler, has_sanitizer, sanitizer_library
from helpers.emulated import build_extension
from helpers.programs import ROOT

HERE = ROOT / "tests" / "backends"
# tests that are slow, or that make the same accesses as others
LEFT_OUT = "longer_than_any_tile or same_bits or nan_and_inf or blocks_of or every_wait or step_after_step"
PARTS = ("failures", "paths", "rows", "rows_bits", "shared", "skip_dead", "steps", "tiles", "tiles_bits")
ALL_OF_IT = [
    *(f"cuda/test_cuda_{part}.py" for part in PARTS),
    "test_executors.py",
    "-k",
    f"cuda and not ({LEFT_OUT})",
]
SMALL_CASES = ["cuda/test_cuda_paths.py", "cuda/test_cuda_skip_dead.py", "-k", "one_small_step"]

pytestmark = [
    pytest.mark.full(
        "finds what only a sanitizer sees: accesses beyond arrays, and missing barriers and waits"
    ),
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler"),
    pytest.mark.xdist_group("sanitizers"),
]


@pytest.mark.parametrize(
    ("sanitize", "tests"),
    [("address,undefined", ALL_OF_IT), ("thread", SMALL_CASES)],
    ids=["address", "thread"],
)
def test_clean_under(sanitize, tests):
    """The tests of the kernels pass under the sanitizer and it reports nothing."""
    if not has_sanitizer(sanitize):
        pytest.skip(f"{compiler()} cannot link -fsanitize={sanitize}")
    build_extension(sanitize)
    environment = os.environ | {
        "CGES_SANITIZE": sanitize,
        "LD_PRELOAD": sanitizer_library(sanitize),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "atexit_sleep_ms=0",
        "OMP_NUM_THREADS": "1",  # TSan does not know the synchronisation of torch's own threads
    }
    # TSan needs addresses that are not random
    command = ["setarch", "-R"] if sanitize == "thread" and shutil.which("setarch") else []
    command += [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:xdist", "-m", "not gpu"]
    done = subprocess.run([*command, *tests], cwd=HERE, env=environment, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0 and "Sanitizer" not in report and "runtime error" not in report, report[
        -5000:
    ]
