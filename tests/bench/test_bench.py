"""The GPU benchmarks without a GPU: their workloads, the rows and their targets, the clock, the lab."""

import warnings
from functools import partial

import pytest
import torch
from helpers.cpu_lab import CpuLab

from bench import baselines, gpu, lab, timing, workloads
from bench.rows import Bench
from bench.workloads import Case
from cges_kernels.core import reference


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
    assert workloads.bytes_moved([(3, 5), (2,)], torch.float32, states=0) == 17 * 12
    assert workloads.bytes_moved([(3, 5), (2,)], torch.float32, states=2) == 17 * 28
    assert workloads.bytes_moved([(3, 5), (2,)], torch.bfloat16) == 17 * 10


def test_rows_know_their_targets_and_names():
    case = Case("filter 4x4", "filter", [(4, 4)], {"triton": (80, 80), "cuda": (85, 72)})
    model, host = case._replace(name="ResNet-50 model"), case._replace(name="host")
    rows = gpu.rows(CpuLab(), ["cuda", "triton"], [case], [model], [(4, 4), (512, 32768)], host)
    assert len({row.name for row in rows}) == len(rows) == 2 * (1 + 2 * (1 + 1 + 2 + 6)) + 2
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
        three_points_less = 100 / (100 / fp32 - 3)
        assert targets[f"{backend}: AdamW, filter 4x4 fp32"] == ("copy", pytest.approx(three_points_less))
        assert targets[f"{backend}: AdamW, ResNet-50 model bf16"] == ("fused_adamw", None)
        assert targets[f"{backend}: ResNet-50 model bf16"] == ("fused_sgd", model)
        assert targets[f"{backend}: exact 512x32768, 50% left bf16"] == ("sequential", exact)
        assert targets[f"{backend}: exact 4x4, 50% left fp32"] == ("sequential", None)
        assert targets[f"{backend}: host fp32"] == ("allowed", host)
    assert targets["cuda: filter 4x4, 90% dead bf16"] == ("fused_sgd", None)


def test_a_copy_is_scaled_to_the_bytes_of_the_row():
    here = CpuLab()
    here.clock = lambda: lambda step, once: 1.0  # every call takes a second
    (times,) = Bench(here).sgd("a", [(2**12,)]).measure()
    assert set(times) == {"fused_sgd", "prox_sgd", "copy"} and set(times["prox_sgd"]) == {1.0}
    assert set(times["copy"]) == {20 * 2**12 / 2**13}


def test_tensors_rotate_until_the_cache_is_cold():
    made = []

    def make(shapes, dtype, device):
        made.append((shapes, dtype, device))
        return baselines.Contender(partial(int, len(made)), [])

    step = CpuLab().contender(make, [(10, 10)], torch.bfloat16).step
    sets = 4 * 1024 // (3 * 2 * 100) + 1
    assert made == [([(10, 10)], torch.bfloat16, "cpu")] * sets
    assert [step() for _ in range(sets + 1)] == [*range(1, sets + 1), 1]
    assert sets * 3 * 2 * 100 > 2 * CpuLab.cache_bytes
    assert CpuLab().sets([(2, 2)], torch.bfloat16) == CpuLab.most_sets


def test_turns_warm_up_then_alternate_each_after_what_prepares_it():
    calls = []

    def clock(step, once):
        calls.append((step(), once))
        return float(len(calls))

    steps, before = {"a": lambda: "a", "b": lambda: "b"}, {"b": lambda: calls.append("before")}
    times = timing.take_turns(steps, clock, seconds=0.0, before=before)
    assert calls == [("a", False), "before", ("b", True)] * 7
    assert times == {"a": [7.0, 10.0, 13.0, 16.0, 19.0], "b": [9.0, 12.0, 15.0, 18.0, 21.0]}


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
        warnings.simplefilter("ignore")  # torch warns that there is no GPU to profile
        assert CpuLab().launches(lambda: w.add_(1)) is None


def test_the_gpu_names_the_files(monkeypatch):
    for name, short in [("NVIDIA H200", "gpu-h200"), ("NVIDIA A100-SXM4-80GB", "gpu-a100-sxm4-80gb")]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert lab.Lab.name(CpuLab()) == short


@pytest.mark.parametrize("said", ["570.1, 1980 MHz, 3201 MHz\n570.1, 345 MHz, 3201 MHz", None])
def test_environment_of_a_gpu(monkeypatch, said):
    monkeypatch.setattr(lab, "output", lambda name, *rest: said if name == "nvidia-smi" else None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    found = lab.Lab.environment(CpuLab(), "abc")
    assert found["commit"] == "abc" and found["gpu"] == "NVIDIA H200"
    assert found["driver"] == ("570.1" if said else "")
    assert found["clocks"] == ({"sm": "1980 MHz", "memory": "3201 MHz"} if said else {"sm": "", "memory": ""})


def test_quick_rows_are_those_of_one_backend_without_the_slow_ones(monkeypatch):
    slow = []
    make = Bench.row
    monkeypatch.setattr(Bench, "row", lambda *a, **o: slow.append(bool(o.get("slow"))) or make(*a, **o))
    case, host = (Case(name, "feature", [(4, 4)], slow=True) for name in ("model", "host"))
    weight = case._replace(name="weight")
    rows = gpu.rows(CpuLab(), ["triton"], [weight], [case], [], host, slow=False)
    names = ["host fp32", "weight fp32", "weight bf16", "AdamW, weight fp32", "AdamW, weight bf16"]
    names += ["model fp32", "model bf16"]
    assert [row.name for row in rows] == [f"triton: {name}" for name in names] and slow == [False] * 7
    slow.clear()
    gpu.rows(CpuLab(), ["cuda", "triton"], [weight], [case], [], host)
    assert slow == [False] * 12 + [True] * 2  # the last backend has the slow contenders
    assert gpu.arguments(["--quick"]).runs == 1 and gpu.arguments([]).runs == 3


@pytest.mark.full("torch.compile, which takes seconds, makes a contender of the reference")
def test_the_compiled_contender_takes_the_step_of_the_reference():
    shapes = [(6, 4), (5, 2, 3)]
    torch.manual_seed(1)
    step, params = baselines.compiled(shapes)
    step()
    torch.manual_seed(1)
    again = [p.detach() for p in baselines.parameters(shapes)]
    grads, bufs = ([torch.randn_like(p) for p in again] for _ in range(2))
    options = {"lr": baselines.LR, "momentum": baselines.MOMENTUM, **baselines.COEFFICIENTS}
    for got, w, grad, buf in zip(params, again, grads, bufs):
        torch.testing.assert_close(got, reference.step(w, grad, buf, **options)[0])
        assert not torch.equal(got, w)
