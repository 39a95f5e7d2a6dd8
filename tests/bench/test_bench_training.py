"""Whole training iterations in miniature: what the contenders do, rows, files, the README's table."""

import copy
import json

import pytest
import torch
from helpers.vision import torchvision

from bench import readme, table, training
from bench.lab import Cpu
from cges_kernels import sparsity_param_groups

STRONG = {"group_lasso": 0.3, "exclusive_lasso": 0.2}  # so strong that weights die in two steps
OUTPUTS = {
    "small conv net": 0,
    "small GPT-2": 1,
}  # the dimension of outputs: Hugging Face's Conv1D has it last
pytestmark = pytest.mark.filterwarnings("ignore:param_groups:UserWarning")


@pytest.fixture(params=list(training.SMALL_MODELS))
def task(request, threads):
    threads(1)
    package, make = training.SMALL_MODELS[request.param]
    torchvision()
    pytest.importorskip(package)
    task = make("cpu")
    for module in task.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return task


@pytest.fixture
def strong(monkeypatch):
    monkeypatch.setattr(training, "COEFFICIENTS", STRONG)
    monkeypatch.setattr(training, "LR", 0.05)


def trained(task, name):
    return training.Training(task._replace(model=copy.deepcopy(task.model)), name, Cpu())


def regularised(model):
    groups = sparsity_param_groups(model, l1=1.0)[:-1]
    return [name for group in groups for name, _ in group["params"]]


def test_every_contender_trains_and_the_proximal_ones_make_zeros(task, strong):
    after = {}
    for name in training.CONTENDERS:
        contender = trained(task, name)
        contender(), contender()
        new = contender.task.model.state_dict()
        assert any(not torch.equal(w, new[key]) for key, w in task.model.state_dict().items())
        names = regularised(task.model)
        zeros = sum((new[key] == 0).sum().item() for key in names)
        assert (zeros > 0) == (name in training.PROXIMAL), (name, zeros)
        after[name] = torch.cat([new[key].flatten() for key in names])
    for name, w in after.items():
        for other, v in after.items():
            same = name == other or {name, other} == {"prox_sgd", "eager"}
            assert torch.allclose(w, v, rtol=1e-3, atol=1e-5) == same, (name, other)


def test_the_penalty_is_in_the_loss(task, strong, request):
    plain, penalised = trained(task, "fused_sgd"), trained(task, "penalty")
    plain.backward(), penalised.backward()
    dim = OUTPUTS[request.node.callspec.params["task"]]
    weights = regularised(task.model)
    for name, p in task.model.named_parameters():
        added = torch.zeros_like(p)
        if name in weights:
            omega = STRONG["group_lasso"] * p.norm(dim=dim).sum()
            omega = omega + STRONG["exclusive_lasso"] / 2 * p.abs().sum(dim).square().sum()
            (added,) = torch.autograd.grad(omega, p)
        got, without = (t.task.model.get_parameter(name).grad for t in (penalised, plain))
        torch.testing.assert_close(got - without, added, rtol=1e-4, atol=1e-5)


def run(out, monkeypatch, *arguments):
    monkeypatch.setattr(training, "SECONDS", 0.0)
    monkeypatch.setattr(training, "RUNS", 1)
    good = training.run(Cpu(), training.arguments(["--out", str(out), *arguments]))
    path = out / f"training-{Cpu().name()}.json"
    return good, json.loads(path.read_text()) if path.exists() else None


def test_the_whole_flow(tmp_path, monkeypatch, capsys, threads):
    threads(1)
    good, report = run(tmp_path, monkeypatch, "--model", "conv", "--commit", "abc")
    (result,) = report["results"]
    assert good and list(result["contenders"]) == list(training.CONTENDERS)
    for of in result["contenders"].values():
        assert 0 < of["step_ms"] < of["ms"] and 0 < of["step_host_ms"] <= of["step_ms"] * 1.01
        assert of["wall_ms"] > 0 and of["ratio"] == of["to_fused_sgd"]
    assert (result["suite"], result["workload"], result["commit"]) == ("training", "small conv net", "abc")
    _, lines = table.read_csv(tmp_path / f"training-{Cpu().name()}.csv")
    assert [n["contender"] for n in lines] == list(training.CONTENDERS)
    assert all(float(n["wall_ms"]) > 0 and n["commit"] == "abc" for n in lines)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + 5 and printed[3].startswith("  ProxSGD  ")

    text = readme.training_part([report])
    assert "1 row of commit abc (" in text and text.count("| small conv net |") == 5
    assert "| small conv net | SGD, fused, the penalty in the loss |" in text
    whole = (readme.ROOT / "README.md").read_text()
    cpu, gpus, _ = readme.reports()
    assert text in readme.with_tables(whole, cpu, gpus, [report])
    assert readme.with_tables(whole, cpu, gpus, []) == readme.with_tables(whole, cpu, gpus)


def test_a_model_on_its_own_keeps_the_results_of_the_others(tmp_path, monkeypatch, threads):
    torchvision()
    pytest.importorskip("transformers")
    threads(1)
    for model in ("conv", "GPT"):
        good, report = run(tmp_path, monkeypatch, "--model", model, "--commit", model)
        assert good
    assert [(r["row"], r["commit"]) for r in report["results"]] == [
        ("small conv net", "conv"),
        ("small GPT-2", "GPT"),
    ]


def test_models_whose_package_is_missing_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "find_spec", lambda package: None)
    good, report = run(tmp_path, monkeypatch)
    assert not good and report is None
    said = "bench.training: small GPT-2 is left out: transformers is not installed\n"
    assert said in capsys.readouterr().err
