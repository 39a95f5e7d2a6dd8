"""The GPU benchmarks without a GPU: rows, clock, files and README; the whole flow with Triton interpreted."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from cuda_emulator.build import compiler
from helpers import emulated
from helpers.programs import PATHS, ROOT

from bench import baselines, gpu, lab, plots, readme, smoke, suites, table, timing, workloads
from bench.table import Row
from bench.workloads import Case
from cges_kernels import available_backends
from cges_kernels.backends.extension import BUILT
from cges_kernels.core import reference

EMULATED = "cuda" in BUILT and BUILT["cuda"].emulated
NO_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


class CpuLab(lab.Lab):
    """A CPU in the place of the GPU, with an L2 small enough that tensors rotate."""

    device, copy_bytes, warm_up, seconds, l2_bytes, most_sets = "cpu", 2**12, 0.0, 0.0, 1024, 8

    def __init__(self):
        pass

    def clock(self):
        return timing.wall_clock

    def synchronize(self):
        pass

    def free(self):
        pass

    def name(self):
        return "cpu"

    def environment(self, commit=None):
        return {**timing.environment(commit), "gpu": "none", "driver": "0", "cuda": None, "triton": "3"}


def tiny(case, most=12):
    shapes = [tuple(min(n, most) for n in shape) for shape in case.shapes[:4]]
    return case._replace(shapes=shapes)


def steady(**ms):
    """What a run of contenders that take these times brings."""
    return lambda: [{name: [value / 1e3] * 5 for name, value in ms.items()}]


def made_up_rows():
    def known(workload, dtype="fp32"):
        return {"backend": "triton", "dtype": dtype, "workload": workload}

    def fails():
        raise RuntimeError("out of luck\nand more")

    model = {"copy": 3.0, "fused_sgd": 4.0, "prox_sgd": 6.0, "eager": 40.0, "foreach": 8.0}
    return [
        Row("a fp32", "copy", "prox_sgd", 100 / 90, steady(copy=1, prox_sgd=1.25), known("a")),
        Row(
            *("a bf16", "copy", "prox_sgd", 100 / 90, steady(copy=1, prox_sgd=1.0)),
            *(known("a", "bf16"), lambda: {"launches": 2.0}),
        ),
        Row(
            *("m fp32", "fused_sgd", "prox_sgd", 1.25, steady(**model)),
            {**known("m"), "compiled_error": "no compiler"},
        ),
        Row("e fp32", "sequential", "exact", None, steady(sequential=2, exact=3), known("e"), fails),
        Row("f fp32", "copy", "prox_sgd", 1.1, fails, known("f")),
    ]


def test_cases_are_what_the_targets_are_about():
    cases = workloads.gpu_cases()
    assert len({case.name for case in cases}) == len(cases)
    assert all(4 * workloads.elements(case.shapes) >= 2**26 for case in cases)
    percents = {case.name: case.percent for case in cases}
    assert percents["filter 16384x1024"] == {"triton": (90, 90), "cuda": (91, 91)}
    assert percents["feature 512x32768"] == {"triton": (85, 85), "cuda": (88, 72)}
    assert percents["feature 50257x1024"] == {"triton": (55, 55), "cuda": (70, 45)}
    assert percents["channel 8 of 512x512x3x3"] == {"cuda": (75, 60)}
    tensor = next(case for case in cases if case.group_by == "tensor")
    assert tensor.target("cuda", torch.float32) == pytest.approx(100 / 60)
    assert tensor.target("cuda", torch.bfloat16) is tensor.target("triton", torch.float32) is None


def test_models_have_the_parameters_of_their_papers():
    found = {case.name: (workloads.elements(case.shapes), len(case.shapes)) for case in workloads.models()}
    assert found == {
        "MNIST net feature": (3_274_634, 8),
        "LeNet feature": (62_006, 10),
        "ResNet-50 feature": (25_557_032, 161),
        "WRN-16-10 feature": (17_116_634, 44),
        "AlexNet feature": (61_100_840, 16),
        "ViT-L/16 feature": (304_326_632, 296),
        "transformer of 1.02e9 feature": (1_019_137_280, 292),
    }


def test_bytes_that_must_move():
    assert workloads.bytes_moved([(3, 5), (2,)], torch.float32) == 17 * 20
    assert workloads.bytes_moved([(3, 5), (2,)], torch.float32, momentum=False) == 17 * 12
    assert workloads.bytes_moved([(3, 5), (2,)], torch.bfloat16) == 17 * 10


def test_rows_know_their_targets_and_names():
    case = Case("filter 4x4", "filter", [(4, 4)], {"triton": (80, 80), "cuda": (85, 72)})
    model, host = case._replace(name="model"), case._replace(name="host")
    rows = gpu.rows(CpuLab(), ["cuda", "triton"], [case], [model], [(4, 4), (512, 32768)], host)
    assert len({row.name for row in rows}) == len(rows) == 2 * (1 + 2 * (1 + 1 + 6))
    assert [row.name for row in rows[:3]] == [
        "cuda: host fp32",
        "cuda: filter 4x4 fp32",
        "cuda: filter 4x4 bf16",
    ]
    targets = {row.name: (row.baseline, row.target) for row in rows}
    for backend, fp32, bf16, model, exact, host in (
        ("cuda", 100 / 85, 100 / 72, 1.05, 1.3, 1.0),
        ("triton", 100 / 80, 100 / 80, 1.25, None, None),
    ):
        assert targets[f"{backend}: filter 4x4 fp32"] == ("copy", pytest.approx(fp32))
        assert targets[f"{backend}: filter 4x4 bf16"] == ("copy", pytest.approx(bf16))
        assert targets[f"{backend}: model bf16"] == ("fused_sgd", model)
        assert targets[f"{backend}: exact 512x32768, 50% left bf16"] == ("sequential", exact)
        assert targets[f"{backend}: exact 4x4, 50% left fp32"] == ("sequential", None)
        assert targets[f"{backend}: host fp32"] == ("allowed", host)


def test_a_copy_is_scaled_to_the_bytes_of_the_row():
    here = CpuLab()
    here.clock = lambda: lambda step, once: 1.0  # every call takes a second
    nothing = baselines.Contender(lambda: None, [], lambda: lambda: None)
    times = here.beside_copy({"prox_sgd": nothing}, [(2**12,)], torch.float32)
    assert set(times["prox_sgd"]) == {1.0} and set(times["copy"]) == {20 * 2**12 / 2**13}


def test_tensors_rotate_until_the_cache_is_cold():
    made = []

    def make(shapes, dtype, device):
        made.append((shapes, dtype, device))
        return baselines.Contender(partial(int, len(made)), [], lambda: None)

    step = CpuLab().contender(make, [(10, 10)], torch.bfloat16).step
    sets = 4 * 1024 // (3 * 2 * 100) + 1
    assert made == [([(10, 10)], torch.bfloat16, "cpu")] * sets
    assert [step() for _ in range(sets + 1)] == [*range(1, sets + 1), 1]
    assert sets * 3 * 2 * 100 > 2 * CpuLab.l2_bytes
    assert CpuLab().cache([(10, 10)], torch.bfloat16) == "cold"
    assert CpuLab().sets([(2, 2)], torch.bfloat16) == CpuLab.most_sets
    assert CpuLab().cache([(2, 2)], torch.bfloat16) == "warm"


def test_turns_warm_up_then_alternate():
    calls = []

    def clock(step, once):
        calls.append((step(), once))
        return float(len(calls))

    times = timing.take_turns({"a": lambda: "a", "b": lambda: "b"}, lambda: None, clock, seconds=0.0)
    assert [name for name, _ in calls] == ["a", "b"] * 7 and all(once for _, once in calls)
    assert times == {"a": [5.0, 7.0, 9.0, 11.0, 13.0], "b": [6.0, 8.0, 10.0, 12.0, 14.0]}


@pytest.mark.parametrize("behind", [False, True])
def test_the_device_clock_lets_the_host_run_ahead(monkeypatch, behind):
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("record")

        def query(self):
            return behind

        def synchronize(self):
            happened.append("wait")

        def elapsed_time(self, end):
            return 8.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: happened.append(cycles))
    clock = lab.DeviceClock()
    cycles = clock.cycles
    assert clock(lambda: happened.append("step"), False) == pytest.approx(8e-3 / 4)
    assert happened == ["step", cycles, "record", *["step"] * 4, "record", "wait"]
    assert clock.cycles == (2 * cycles if behind else cycles)
    happened.clear()
    assert clock(lambda: happened.append("step"), True) == pytest.approx(8e-3)
    assert happened == [clock.cycles // (2 if behind else 1), "record", "step", "record", "wait"]


def test_only_kernels_count_as_launches():
    categories = ["kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation", "cpu_op", None, "kernel"]
    assert lab.count_kernels([{"cat": c} for c in categories] + [{"name": "no category"}]) == 2
    w = torch.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no GPU to profile
        assert CpuLab().launches(lambda: w.add_(1)) is None


def test_the_gpu_names_the_files(monkeypatch):
    for name, short in [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb")]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert lab.Lab.name(CpuLab()) == short


@pytest.mark.parametrize("said", ["570.1, 1980 MHz, 3201 MHz\n570.1, 345 MHz, 3201 MHz", None])
def test_environment_of_a_gpu(monkeypatch, said):
    monkeypatch.setattr(lab, "output", lambda *command: said)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    found = lab.Lab.environment(CpuLab(), "abc")
    assert found["commit"] == "abc" and found["gpu"] == "NVIDIA H200"
    assert found["driver"] == ("570.1" if said else "")
    assert found["clocks"] == ({"sm": "1980 MHz", "memory": "3201 MHz"} if said else {"sm": "", "memory": ""})


def test_results_csv_and_readme_of_made_up_numbers(tmp_path):
    saved = []
    results = table.measure(made_up_rows(), runs=2, save=lambda found: saved.append(len(found)))
    assert saved == [5] * (
        5 + 4 + 2
    )  # after each row in each round (one failed in the first), and with facts
    first, second, model, exact, failed = results
    assert first["met"] is False and first["percent_of_copy"] == pytest.approx(80)
    assert second["met"] is True and second["launches"] == 2.0 and second["runs"] == 2
    assert model["met"] is False and model["percent_of_copy"] == pytest.approx(50)
    assert exact["met"] is None and exact["target"] is None
    assert exact["facts_error"] == "RuntimeError: out of luck"  # its times stand
    assert failed["error"] == "RuntimeError: out of luck" and "contenders" not in failed
    assert all(table.line(result).startswith(result["row"]) for result in results)

    env = CpuLab().environment("abc") | {"gpu": "NVIDIA X", "runs": 2}
    report = {"name": "gpu-x", "environment": env, "results": results}
    table.write({"environment": env, "results": results}, "gpu-x", tmp_path / "new")
    assert {"name": "gpu-x", **json.loads((tmp_path / "new" / "gpu-x.json").read_text())} == report
    environment, lines = table.read_csv(tmp_path / "new" / "gpu-x.csv")
    assert environment == {key: str(value) for key, value in env.items()}
    assert len(lines) == 2 + 2 + 5 + 2
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"gpu-x.json", "gpu-x.csv"}
    assert lines[1]["percent_of_copy"] == "80" and lines[1]["target"] == "1.111"
    assert lines[0]["target"] == "" and lines[3]["launches"] == "2"

    text = readme.gpu_part([report])
    assert "NVIDIA X" in text and "| a | a copy | 90% | 1.250 | 80% [80, 80] (missed) |" in text
    assert "| 1.000 | 100% [100, 100] | 2 |" in text
    assert "| m | torch's fused SGD | 1.25 | 6.000 | 1.50 [1.50, 1.50], 50% (missed) |" in text
    assert "failed: RuntimeError: out of luck" in text
    assert "m, fp32: the eager reference 10.0, foreach SGD 2.0, torch.compile of it failed." in text
    assert "Measured with triton: 4 rows of commit abc (" in text and ", 2 runs)." in text
    cpu, *_ = readme.reports()
    whole = readme.with_tables((ROOT / "README.md").read_text(), cpu, [report])
    assert text in whole and readme.with_tables(whole, cpu, [report]) == whole
    assert readme.gpu_part([]) == "GPU: not yet measured."


def test_a_cpu_table_with_and_without_the_rows_of_today():
    cpu, *_ = readme.reports()
    row = Row("500 tensors, checks alone", "python", "cpp", None, steady(python=4, cpp=1))
    failed = {"row": "new", "baseline": "python", "contender": "cpp", "error": "no luck"}
    text = readme.cpu_table({**cpu, "results": [*cpu["results"], *table.measure([row], 1), failed]})
    assert "| 500 tensors, checks alone | 1.000 | the same in Python | 0.25 [0.25, 0.25] |  |  |" in text
    assert "| new | failed: no luck |" in text


def test_no_row_begins_when_time_is_up():
    results = table.measure(made_up_rows(), runs=2, minutes=0.0)
    assert [result["error"] for result in results] == ["no time was left"] * 5


def test_quick_rows_are_those_of_one_backend_without_the_slow_ones(monkeypatch):
    slow = []
    model_row = gpu.Table.model
    monkeypatch.setattr(gpu.Table, "model", lambda *a: slow.append(a[2]) or model_row(*a))
    case, host = (Case(name, "feature", [(4, 4)], slow=True) for name in ("model", "host"))
    rows = gpu.quick_rows(CpuLab(), "triton", [case._replace(name="weight")], [case], host)
    names = ["host fp32", "weight fp32", "weight bf16", "model fp32", "model bf16"]
    assert [row.name for row in rows] == [f"triton: {name}" for name in names] and slow == [False, False]
    assert gpu.arguments(["--quick"]).runs == 1 and gpu.arguments([]).runs == 3


def cut():
    raise KeyboardInterrupt


def test_a_run_that_is_cut_keeps_what_it_has(tmp_path):
    rows = [Row("a", "copy", "a", None, steady(copy=1, a=2)), Row("b", "copy", "b", None, cut)]
    with pytest.raises(KeyboardInterrupt):
        gpu.run(CpuLab(), rows, gpu.arguments(["--out", str(tmp_path), "--commit", "abc"]))
    first, second = json.loads((tmp_path / "gpu-cpu.json").read_text())["results"]
    assert first["contenders"]["a"]["ms"] == pytest.approx(2) and second["error"] == table.NO_TIME
    _, lines = table.read_csv(tmp_path / "gpu-cpu.csv")
    assert [(n["row"], n["contender"], n["commit"]) for n in lines] == [
        ("a", "copy", "abc"),
        ("a", "a", "abc"),
    ]


def test_a_quick_run_keeps_other_rows_and_each_says_when_it_was_measured(tmp_path):
    def row(name, ms, backend="cuda"):
        note = {"backend": backend, "dtype": "fp32", "workload": name}
        return Row(name, "copy", "prox_sgd", None, steady(copy=1, prox_sgd=ms) if ms else cut, note)

    def ran(rows, *arguments):
        options = gpu.arguments([*arguments, "--out", str(tmp_path), "--commit", "new"])
        with contextlib.suppress(KeyboardInterrupt):
            gpu.run(CpuLab(), rows, options)
        report = json.loads((tmp_path / "gpu-cpu.json").read_text())
        found = {r["row"]: (r["commit"], r["contenders"]["prox_sgd"]["ms"]) for r in report["results"]}
        return report, {name: (commit, pytest.approx(ms)) for name, (commit, ms) in found.items()}

    old = table.measure([row("a", 4), row("b", 4), row("t", 4, "triton")], 3)  # no row says when
    environment = CpuLab().environment("old") | {"date": "2020-01-02"}
    table.write({"environment": environment, "results": old}, "gpu-cpu", tmp_path)
    report, found = ran([row("a", 2), row("c", 2)], "--quick")
    assert found == {"a": ("new", 2), "b": ("old", 4), "t": ("old", 4), "c": ("new", 2)}
    assert list(found) == ["a", "b", "t", "c"]
    assert {r["row"]: r["date"] for r in report["results"]}["t"] == "2020-01-02"
    text = readme.gpu_part([{"name": "gpu-cpu", **report}])
    today = report["environment"]["date"]
    both = f"2 rows of commit new ({today}, 1 run), 1 row of commit old (2020-01-02, 3 runs)."
    assert f"Measured with cuda: {both}" in text
    assert "Measured with triton: 1 row of commit old (2020-01-02, 3 runs)." in text
    _, found = ran([row("c", 3), row("b", None)], "--quick")
    assert found == {"a": ("new", 2), "b": ("old", 4), "t": ("old", 4), "c": ("new", 3)}
    _, found = ran([row("a", 2), row("c", 2)], "--runs", "1")  # a whole run replaces everything
    assert found == {"a": ("new", 2), "c": ("new", 2)}


@pytest.mark.parametrize(
    "program", ["gpu", *(pytest.param(p, marks=pytest.mark.slow) for p in ("tune", "smoke"))]
)
def test_without_a_gpu_programs_say_so(program):
    command = [sys.executable, "-m", f"bench.{program}"]
    ended = subprocess.run(command, cwd=ROOT, env=NO_GPU, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.startswith(f"bench.{program}: expected a CUDA device, found none")
    assert ended.stderr.count("\n") == 1


def test_make_gpu_says_that_there_is_none(tmp_path):
    env = {**NO_GPU, "PY": sys.executable, "OUT": str(tmp_path / "out")}
    ended = subprocess.run(["bash", "bench/gpu.sh"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith("make gpu: expected a CUDA device")
    assert not (tmp_path / "out").exists()


def make_gpu_quick(*variables, **environment):
    """`make gpu-quick`, as if no make ran these tests."""
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
    python = tmp_path / "python"  # knows the GPU's capability, and says what it is asked for
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
            "gpu-quick-smoke.log": f"{given}: -m bench.smoke {only}",
            "gpu-quick-bench.log": f"{given}: {measured}",
        }


def test_make_gpu_goes_on_after_a_stage_that_fails(tmp_path):
    for name, fails in (("python", '"$2" = pytest'), ("compute-sanitizer", '"$2" = racecheck')):
        program = tmp_path / name  # says what it is asked for, and fails at one thing
        program.write_text(f'#!/bin/sh\necho "asked for $*"\n[ ! {fails} ] || exit 3\n')
        program.chmod(0o755)
    out, path = tmp_path / "out", f"{tmp_path}:{os.environ['PATH']}"
    env = {**NO_GPU, "PY": "python", "PATH": path, "OUT": str(out), "COMMIT": "abc", "BACKEND": "cuda"}
    ended = subprocess.run(["bash", "bench/gpu.sh"], cwd=ROOT, env=env, capture_output=True, text=True)
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
    assert log == "asked for --tool initcheck --error-exitcode 9 python -m bench.smoke --backend cuda\n"


def test_plans_in_python_are_put_back(monkeypatch):
    before = BUILT.get("cpu")
    with baselines.plans_in_python():
        assert "cpu" not in BUILT
    assert BUILT.get("cpu") is before


@pytest.mark.slow
def test_the_compiled_contender_takes_the_step_of_the_reference():
    shapes = [(6, 4), (5, 2, 3)]
    torch.manual_seed(1)
    step, params, _ = baselines.compiled(shapes)
    step()
    torch.manual_seed(1)
    again = [p.detach() for p in baselines.parameters(shapes)]
    grads, bufs = ([torch.randn_like(p) for p in again] for _ in range(2))
    options = {"lr": baselines.LR, "momentum": baselines.MOMENTUM, **baselines.COEFFICIENTS}
    for got, w, grad, buf in zip(params, again, grads, bufs):
        torch.testing.assert_close(got, reference.step(w, grad, buf, **options)[0])
        assert not torch.equal(got, w)


def interpreted(program, *arguments):
    """Runs this file's ``program`` with Triton's kernels interpreted."""
    command = [sys.executable, __file__, program, *map(str, arguments)]
    env = {**NO_GPU, "TRITON_INTERPRET": "1", "PYTHONPATH": PATHS}
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@pytest.mark.slow
def test_the_whole_flow_of_bench_gpu(tmp_path):
    pytest.importorskip("triton")
    printed = interpreted("gpu", tmp_path)
    report = json.loads((tmp_path / "gpu-cpu.json").read_text())
    results = {result["row"]: result for result in report["results"]}
    backends = [b for b in gpu.BACKENDS if any(row.startswith(b) for row in results)]
    assert len(results) == len(printed.splitlines())
    core = table.of_suite(report["results"], "core", "models")
    assert len(core) == len(backends) * (1 + 2 * (3 + 7 + 3))
    assert not any("error" in result or "facts_error" in result for result in results.values())
    assert table.holes(report["results"]) == []
    stems = ["models", *(f"{backend}-{suite}" for backend in backends for suite in ("grid", "scaling"))]
    pictures = {f"gpu-cpu-{stem}.{form}" for stem in stems for form in plots.FORMATS}
    assert pictures == {path.name for path in tmp_path.iterdir()} - {"gpu-cpu.json", "gpu-cpu.csv"}
    for backend in backends:
        host = results[f"{backend}: 4 tensors, host fp32"]["contenders"]
        assert {"fused_sgd", "empty", "allowed", "prox_sgd"} <= set(host)
        exact = results[f"{backend}: exact 16x12, 50% left fp32"]
        assert 20 < exact["percent_nonzero_exact"] < 80
    model = results["triton: ResNet-50 feature bf16"]
    assert model["compiled_error"] == "ValueError: no compiler" and model["percent_of_copy"] > 0
    everyone = {"copy", "fused_sgd", "prox_sgd", "foreach", *baselines.others()}
    assert everyone - {"compiled"} == set(model["contenders"])
    assert "eager" not in results["triton: AlexNet feature bf16"]["contenders"]
    text = readme.gpu_part([{"name": "gpu-cpu", **report}])
    assert "| feature 50257x1024 | a copy | 55% |" in text and "| tensor 4096x4096 | a copy | - |" in text
    assert "](bench/results/gpu-cpu-triton-grid.svg)" in text and "| None" not in text
    if "cuda" in backends:
        paths = {"rows": 0, "tile": 1, "shared": 0, "ticket": 0}
        assert results["cuda: feature 50257x1024 bf16"]["paths"] == paths
        assert "eager" not in results["cuda: ResNet-50 feature bf16"]["contenders"]
        assert "| feature 50257x1024 | a copy | 70%/45% |" in text
        assert "| 4 tensors, host | an empty step and 20 µs | 1.00 |" in text
        assert "4 tensors, host, fp32: " in text and " ms with empty." in text


@pytest.mark.slow
def test_the_whole_flow_of_bench_tune():
    pytest.importorskip("triton")
    printed = interpreted("tune")
    assert "NUM_WARPS = 8" in printed and "    COLUMNS.value: (\n        Tile(" in printed
    assert "with 4 warps: COLUMNS 16 " in printed and "bytes of a window" in printed
    assert "nan" not in printed and "inf" not in printed


@pytest.mark.slow
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

    gpu.OTHERS["compiled"] = fails
    cases, models = ([tiny(case) for case in found] for found in (workloads.gpu_cases(), workloads.models()))
    host = Case("4 tensors, host", "feature", [(4, 4)] * 4)
    backends = [b for b in gpu.BACKENDS if b in available_backends()]
    rows = gpu.rows(CpuLab(), backends, cases[-3:], models, [(16, 12)], host)
    suites.SPECS, small = ("feature", "filter"), workloads.small
    workloads.small = lambda count, elements: small(min(count, 4), min(elements, 16))
    rows += gpu.pictured(CpuLab(), backends, (18,), 2**10, (8, 6))
    assert gpu.run(CpuLab(), rows, gpu.arguments(["--out", out, "--runs", "1"]))


def flow_of_tune():
    from bench import tune
    from cges_kernels.backends.triton import tiles
    from cges_kernels.backends.triton.tiles import Tile

    tune.PART, tune.LONG["COLUMNS"], tune.WARPS, tune.WINDOWS = range(256, 512), 20, (4, 8), (0.5,)
    tiles.TILES[tune.KINDS["COLUMNS"]] = (Tile(16, 16, 16), Tile(0, 16, 16))
    print(tune.tune(CpuLab(), ["COLUMNS"], 8, 256, workers=1))


def flow_of_smoke():
    del smoke.DTYPES["bf16"]
    for shapes in smoke.GROUPS.values():  # the large ones would take minutes
        shapes[:] = [shape for shape in shapes if math.prod(shape) < 50_000]
    smoke.main(["triton"], "cpu")


if __name__ == "__main__":
    if compiler():
        BUILT["cuda"] = emulated.load()
    {"gpu": flow_of_gpu, "tune": flow_of_tune, "smoke": flow_of_smoke}[sys.argv[1]](*sys.argv[2:])
