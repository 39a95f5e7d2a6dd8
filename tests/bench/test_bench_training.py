"""Whole training iterations in miniature: the contenders' steps, rows, files, the README's table."""

import copy
import json
from functools import partial

import pytest
import torch
from torch import nn

from bench import pages, training
from bench.lab import Cpu
from cges_kernels import sparsity_param_groups

STRONG = {"group_lasso": 0.3, "exclusive_lasso": 0.2}  # so strong that weights die in two steps
pytestmark = pytest.mark.filterwarnings("ignore:param_groups:UserWarning")


def conv_net(device):
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()]
    return training.images(nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 6 * 6, 10)), 8, 16, 10, device)


SMALL = {"small conv net": conv_net}
SMALL["small transformer"] = partial(training.transformer, width=32, depth=2, batch=4, tokens=6)


@pytest.fixture(params=list(SMALL))
def task(request, threads):
    threads(1)
    task = SMALL[request.param]("cpu")
    return task


@pytest.fixture
def strong(monkeypatch):
    monkeypatch.setattr(training, "COEFFICIENTS", STRONG)
    monkeypatch.setattr(training, "LR", 0.05)


def trained(task, name):
    return training.Training(task._replace(model=copy.deepcopy(task.model)), name, "cpu")


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


def test_the_penalty_is_in_the_loss(task, strong):
    plain, penalised = trained(task, "fused_sgd"), trained(task, "penalty")
    plain.backward(), penalised.backward()
    weights = regularised(task.model)
    for name, p in task.model.named_parameters():
        added = torch.zeros_like(p)
        if name in weights:
            omega = STRONG["group_lasso"] * p.norm(dim=0).sum()
            omega = omega + STRONG["exclusive_lasso"] / 2 * p.abs().sum(0).square().sum()
            (added,) = torch.autograd.grad(omega, p)
        got, without = (t.task.model.get_parameter(name).grad for t in (penalised, plain))
        torch.testing.assert_close(got - without, added, rtol=1e-4, atol=1e-5)


def run(out, monkeypatch, name, commit):
    monkeypatch.setattr(training, "SECONDS", 0.0)
    monkeypatch.setattr(training, "MODELS", {name: SMALL[name]})
    good = training.run(Cpu(), ["--out", str(out), "--runs", "1", "--commit", commit])
    return good, json.loads((out / f"training-{Cpu().name()}.json").read_text())


def test_the_whole_flow(tmp_path, monkeypatch, capsys, threads):
    """A run of one model alone keeps the earlier results of the others."""
    threads(1)
    good, report = run(tmp_path, monkeypatch, "small conv net", "abc")
    (result,) = report["results"]
    assert good and list(result["contenders"]) == list(training.CONTENDERS)
    for of in result["contenders"].values():
        assert of["ms"] > 0 and of["ratio"] == of["to_fused_sgd"]
    assert (result["suite"], result["workload"], result["commit"]) == ("training", "small conv net", "abc")
    (printed,) = capsys.readouterr().out.splitlines()
    assert printed.startswith("small conv net") and "penalty " in printed

    good, report = run(tmp_path, monkeypatch, "small transformer", "def")
    assert good
    found = [(r["row"], r["commit"]) for r in report["results"]]
    assert found == [("small conv net", "abc"), ("small transformer", "def")]

    text = "\n\n".join(pages.training_part(report))
    assert "1 row at commit abc (" in text and "| ms per step | small conv net | small transformer |" in text
    assert "| SGD, fused, the penalty in the loss | " in text
    cpus, gpus, _ = pages.reports()
    assert text in pages.pages(cpus, gpus, [report])[pages.ROOT / "docs" / "speed.md"]
