"""The GPU benchmarks' whole flows in miniature, on emulated kernels and with Triton interpreted.

The file itself runs a flow, in a process of its own, as the tests start it.
"""

import json
import math
import subprocess
import sys

import gpu_smoke as smoke
import pytest
import torch
from cuda_emulator.build import compiler
from helpers import emulated
from helpers.cpu_lab import NO_GPU, CpuLab
from helpers.programs import PATHS, ROOT

from bench import baselines, gpu, pages, table, workloads
from bench.workloads import Case
from cges_kernels import available_backends
from cges_kernels.backends.extension import BUILT

EMULATED = "cuda" in BUILT and BUILT["cuda"].emulated


def tiny(case, most=12):
    shapes = [tuple(min(n, most) for n in shape) for shape in case.shapes[:4]]
    return case._replace(shapes=shapes)


def interpreted(program, *arguments):
    """Runs this file's ``program`` with Triton's kernels interpreted."""
    command = [sys.executable, __file__, program, *map(str, arguments)]
    env = {**NO_GPU, "TRITON_INTERPRET": "1", "PYTHONPATH": PATHS}
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@pytest.mark.full("rows, files and plots of a whole run; the first tier measures made-up rows")
def test_the_whole_flow_of_bench_gpu(tmp_path):
    pytest.importorskip("triton")
    printed = interpreted("gpu", tmp_path)
    report = json.loads((tmp_path / "gpu-cpu.json").read_text())
    results = {result["row"]: result for result in report["results"]}
    backends = [b for b in gpu.BACKENDS if any(row.startswith(b) for row in results)]
    assert len(results) == len(printed.splitlines())
    assert len(results) == len(backends) * (1 + 2 * (3 + 3 + 8 + 3))
    assert not any("error" in result or "facts_error" in result for result in results.values())
    assert {path.name for path in tmp_path.iterdir()} == {"gpu-cpu.json", "gpu-cpu-models.svg"}
    for backend in backends:
        host = results[f"{backend}: 4 tensors, host fp32"]["contenders"]
        assert {"fused_sgd", "empty", "allowed", "prox_sgd"} <= set(host)
        exact = results[f"{backend}: exact 16x12, 50% left fp32"]
        assert 20 < exact["percent_nonzero_exact"] < 80
    model = results["triton: ResNet-50 feature bf16"]
    assert model["compiled_error"] == "ValueError: no compiler" and table.percent_of_copy(model) > 0
    everyone = {"copy", "fused_sgd", "prox_sgd", *baselines.others()}
    assert everyone - {"compiled"} == set(model["contenders"])
    assert "eager" not in results["triton: AlexNet feature bf16"]["contenders"]
    assert all(c["host_us"] > 0 and c["ops"] >= 0 for n, c in model["contenders"].items() if n != "copy")
    text = "\n".join(pages.gpu_part({"name": "gpu-cpu", **report}))
    assert "| feature 50257x1024 | a copy | 55% |" in text and "| tensor 4096x4096 | a copy | - |" in text
    assert "](../bench/results/gpu-cpu-models.svg)" in text and "| None" not in text
    if "cuda" in backends:
        assert "eager" not in results["cuda: ResNet-50 feature bf16"]["contenders"]
        assert "| feature 50257x1024 | a copy | 70%/45% |" in text
        assert "| 4 tensors, host | an empty step and 20 µs | 1.00 |" in text


@pytest.mark.full("that the smoke test runs with triton too; the first tier runs it with cuda")
def test_the_smoke_test_is_right_with_triton():
    pytest.importorskip("triton")
    assert "right with triton" in interpreted("smoke")


@pytest.mark.skipif(not EMULATED, reason="its kernels are not emulated here")
def test_the_smoke_test_is_right_with_cuda(capsys):
    smoke.main(["cuda"], "cpu")
    assert "right with cuda" in capsys.readouterr().out


@pytest.mark.skipif(not EMULATED, reason="its kernels are not emulated here")
def test_the_smoke_test_takes_every_path(monkeypatch):
    device = emulated.Device(BUILT["cuda"].__file__)
    try:
        for shared in (228, 164, 100):  # KB of a multiprocessor: H200, A100, consumer GPUs
            device["shared_memory_per_multiprocessor"] = shared << 10
            device["shared_memory_per_block"] = (shared - 1) << 10
            for dtype in smoke.DTYPES.values():
                smoke.check_paths(dtype)
    finally:
        device.reset()
    monkeypatch.setitem(smoke.GROUPS, "feature", [(37, 51)])
    monkeypatch.setitem(smoke.GROUPS, "filter", [(33, 7)])
    with pytest.raises(SystemExit, match="expected blocks on every path"):
        smoke.check_paths(torch.float32)


def flow_of_gpu(out):
    def fails(*arguments, **options):
        raise ValueError("no compiler")

    others = baselines.others()
    baselines.others = lambda: {**others, "compiled": fails}
    cases, models = ([tiny(case) for case in found] for found in (workloads.gpu_cases(), workloads.models()))
    host = Case("4 tensors, host", "feature", [(4, 4)] * 4)
    backends = [b for b in gpu.BACKENDS if b in available_backends()]
    rows = gpu.rows(CpuLab(), backends, cases[-3:], models, [(16, 12)], host)
    assert gpu.run(CpuLab(), rows, gpu.arguments(["--out", out, "--runs", "1"]))


def flow_of_smoke():
    del smoke.DTYPES["bf16"]
    for shapes in smoke.GROUPS.values():  # the large ones would take minutes
        shapes[:] = [shape for shape in shapes if math.prod(shape) < 50_000]
    smoke.main(["triton"], "cpu")


if __name__ == "__main__":
    if compiler():
        BUILT["cuda"] = emulated.load()
    {"gpu": flow_of_gpu, "smoke": flow_of_smoke}[sys.argv[1]](*sys.argv[2:])
