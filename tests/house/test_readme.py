"""What the README says is true: its code runs, its tables are those of bench/results, its files exist."""

import re

import pytest
import torch
from helpers.programs import ROOT
from helpers.readme import BLOCKS, README, Net
from torch import nn

from bench import pages
from cges_kernels import ProxSGD, cges_param_groups, prox, sparsity_param_groups

USE, EQUIVALENT, AUTHORS = BLOCKS[:3]


def test_use(capsys):
    data = [(torch.randn(5, 1, 8, 8), torch.randint(3, (5,))) for _ in range(3)]
    scope = {"model": Net(), "data": data, "loss_fn": nn.CrossEntropyLoss()}
    exec(USE, scope)
    printed = capsys.readouterr().out
    assert "conv1.weight" in printed and "FLOPs" in printed
    assert scope["optimizer"].param_groups[0]["group_lasso"] > 0


def test_equivalent_pytorch():
    z = torch.randn(40, 30, dtype=torch.float64)
    scope = {"torch_sgd_update": lambda w: w, "w": z, "lr": 0.5}
    scope |= {"l1": 0.1, "group_lasso": 2.0, "exclusive_lasso": 0.02}
    exec(EQUIVALENT, scope)
    expected = prox(z, l1=0.05, group_lasso=1.0, exclusive_lasso=0.01, backend="reference")
    torch.testing.assert_close(scope["w"], expected, rtol=1e-12, atol=1e-14)
    assert (expected == 0).any() and (expected != 0).any()


def test_the_authors_configuration():
    scope = {"model": Net(), "ProxSGD": ProxSGD, "torch": torch}
    scope["sparsity_param_groups"] = sparsity_param_groups
    exec(AUTHORS, scope)
    shorter = cges_param_groups(scope["model"], 6e-5, m=0.2, scale=scope["factors"])
    for ours, theirs in zip(scope["optimizer"].param_groups, ProxSGD(shorter, lr=0.05).param_groups):
        assert ours["param_names"] == theirs["param_names"]
        for key in ("group_lasso", "exclusive_lasso"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-12)
    assert scope["groups"][3]["group_lasso"] == pytest.approx(6e-5 * 0.2 / 144)
    assert scope["groups"][3]["exclusive_lasso"] == pytest.approx(6e-5 * 0.8 * 144)


def section(title):
    """The code blocks under a heading."""
    text = README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.full("trains for seconds as the README's way from dense to small does")
def test_from_dense_to_small(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    small, rounds = section("From dense to small")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)  # in so few steps on noise some draws end points below the density
    data = [(torch.randn(5, 1, 8, 8), torch.randint(3, (5,))) for _ in range(20)]
    scope = {"Net": Net, "model": Net(), "data": data, "loss_fn": nn.CrossEntropyLoss(), "epochs": 10}
    exec("from cges_kernels import *", scope)
    exec(small, scope)
    assert abs(scope["control"].measure() - 0.1) <= 0.01
    assert "parameters" in capsys.readouterr().out
    assert scope["result"].parameters[1] < scope["result"].parameters[0]
    x = data[0][0]
    torch.testing.assert_close(scope["small"](x), scope["model"](x))
    assert {path.name for path in tmp_path.iterdir()} == {"sparsity.csv", "last_layer.png", "small.pt"}

    def train(model, optimizer):
        for x, y in data:
            optimizer.zero_grad()
            scope["loss_fn"](model(x), y).backward()
            optimizer.step()

    scope |= {"model": Net(), "train": train}
    exec(rounds, scope)
    assert scope["sparsity_report"](scope["model"]).total.percent_nonzero <= 10.1


def test_tables_are_those_of_the_results():
    found = pages.pages(*pages.reports())
    assert len(found) == 2
    for path, text in found.items():
        assert path.read_text() == text, f"{path.name}: run `make tables`"
    short = README.partition(pages.BEGIN)[2].partition(pages.END)[0]
    assert len(short.strip().splitlines()) <= 20


def test_linked_files_exist():
    for page, least in ((ROOT / "README.md", 10), (ROOT / "docs" / "speed.md", 8)):
        links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
        assert len(links) > least
        assert [link for link in links if not (page.parent / link).exists()] == []
