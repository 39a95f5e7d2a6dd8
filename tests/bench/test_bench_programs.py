"""The GPU benchmarks' programs without a GPU, and the stages of `make gpu` and `make gpu-quick`."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers.cpu_lab import NO_GPU
from helpers.programs import ROOT

STARTS = pytest.mark.full("starts of Python for what one shows: all ask the same function")


@pytest.mark.parametrize(
    "program", [["-m", "bench.gpu"], pytest.param(["tests/gpu_smoke.py"], marks=STARTS)], ids=" ".join
)
def test_without_a_gpu_programs_say_so(program):
    command = [sys.executable, *program]
    ended = subprocess.run(command, cwd=ROOT, env=NO_GPU, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and ended.stdout == ""
    *_, last = ended.stderr.splitlines()  # torch may warn before
    assert "expected a CUDA device, found none" in last and "Traceback" not in ended.stderr


def test_make_gpu_says_that_there_is_none(tmp_path):
    env = {**NO_GPU, "PY": sys.executable, "OUT": str(tmp_path / "out")}
    ended = subprocess.run(["bash", "tests/gpu.sh"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith("make gpu: expected a CUDA device")
    assert not (tmp_path / "out").exists()


def make_gpu_quick(*variables, **environment):
    """Runs `make gpu-quick` without the variables of a make that may be running these tests."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    env = {**NO_GPU, "MAKEFLAGS": "", "BACKEND": "", **environment}
    command = ["make", "--silent", "gpu-quick", *variables]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_make_gpu_quick_says_that_there_is_none(tmp_path):
    ended = make_gpu_quick(f"PY={sys.executable}", f"OUT={tmp_path / 'out'}")
    assert ended.returncode == 2 and ended.stderr.startswith("make gpu: expected a CUDA device")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wish", ["", "triton"])
def test_make_gpu_quick_builds_for_the_gpu_that_is_there(tmp_path, wish):
    python = tmp_path / "python"  # a stand-in that prints the GPU's capability, or its own arguments
    python.write_text('#!/bin/sh\n[ "$1" != -c ] || exec echo 9.0\necho "$TORCH_CUDA_ARCH_LIST: $*"\n')
    python.chmod(0o755)
    out, only = tmp_path / "out", f"--backend {wish or 'cuda'}"
    for given, built in (("", "9.0"), ("8.0 9.0", "8.0 9.0")):
        ended = make_gpu_quick(
            *(f"PY={python}", f"OUT={out}", f"BACKEND={wish}"), TORCH_CUDA_ARCH_LIST=given, COMMIT="abc"
        )
        assert ended.returncode == 0, ended.stdout
        logs = {path.name: path.read_text().strip() for path in out.iterdir()}
        measured = f"-m bench.gpu --quick --minutes 0.8 {only} --out {out} --commit abc"
        assert logs == {
            "gpu-quick-build.log": f"{built}: setup.py --quiet build_ext --inplace --force",
            "gpu-quick-smoke.log": f"{given}: tests/gpu_smoke.py {only}",
            "gpu-quick-bench.log": f"{given}: {measured}",
        }


def test_make_gpu_goes_on_after_a_stage_that_fails(tmp_path):
    for name, fails in (("python", '"$2" = pytest'), ("compute-sanitizer", '"$2" = racecheck')):
        program = tmp_path / name  # a stand-in that prints its arguments, and fails for one of them
        program.write_text(f'#!/bin/sh\necho "asked for $*"\n[ ! {fails} ] || exit 3\n')
        program.chmod(0o755)
    out, path = tmp_path / "out", f"{tmp_path}:{os.environ['PATH']}"
    env = {**NO_GPU, "PY": "python", "PATH": path, "OUT": str(out), "COMMIT": "abc", "BACKEND": "cuda"}
    ended = subprocess.run(["bash", "tests/gpu.sh"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert ended.returncode == 1
    stages = [
        "build",
        "tests",
        "smoke",
        "memcheck",
        "racecheck",
        "synccheck",
        "initcheck",
        "bench",
        "training",
    ]
    failed = ("tests", "racecheck")
    said = [f"{s}: {'FAILED with exit status 3' if s in failed else 'passed'}" for s in stages]
    assert ended.stdout.splitlines()[-len(said) :] == said
    log = (out / "gpu-bench.log").read_text()
    assert log == f"asked for -m bench.gpu --backend cuda --out {out} --commit abc\n"
    log = (out / "gpu-initcheck.log").read_text()
    assert log == "asked for --tool initcheck --error-exitcode 9 python tests/gpu_smoke.py --backend cuda\n"
