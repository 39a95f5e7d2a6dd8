"""What README and docs say is true: their code runs, their tables are those of the results, the site builds.

The code of docs/training.md and docs/trainers.md is tried in tests/training.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.pages import Net, blocks
from helpers.programs import ROOT
from torch import nn

from bench import pages
from cges_kernels import ProxSGD, cges_param_groups, prox, sparsity_param_groups

README = (ROOT / "README.md").read_text()


def batches(count):
    return [(torch.randn(5, 1, 8, 8), torch.randint(3, (5,))) for _ in range(count)]


def test_use(capsys):
    """The first example trains and reports as it stands, and what it makes small computes the same."""
    (use,) = blocks("README.md")
    model, data = Net(), batches(3)
    scope = {"model": model, "data": data, "loss_fn": nn.CrossEntropyLoss()}
    exec(use, scope)
    printed = capsys.readouterr().out
    assert "conv1" in printed and "FLOPs" in printed
    assert scope["optimizer"].param_groups[0]["group_lasso"] > 0
    x = data[0][0]
    torch.testing.assert_close(scope["small"](x), model(x))


def test_equivalent_pytorch():
    """The few lines of plain PyTorch compute the same step as prox."""
    equivalent, _ = blocks("docs/penalties.md")
    z = torch.randn(40, 30, dtype=torch.float64)
    scope = {"torch_sgd_update": lambda w: w, "w": z, "lr": 0.5}
    scope |= {"l1": 0.1, "group_lasso": 2.0, "exclusive_lasso": 0.02}
    exec(equivalent, scope)
    expected = prox(z, l1=0.05, group_lasso=1.0, exclusive_lasso=0.01, backend="reference")
    torch.testing.assert_close(scope["w"], expected, rtol=1e-12, atol=1e-14)
    assert (expected == 0).any() and (expected != 0).any()


def test_the_authors_configuration():
    """The configuration of the method's authors is cges_param_groups with their factors."""
    _, authors = blocks("docs/penalties.md")
    scope = {"model": Net(), "ProxSGD": ProxSGD, "torch": torch}
    scope["sparsity_param_groups"] = sparsity_param_groups
    exec(authors, scope)
    shorter = cges_param_groups(scope["model"], 6e-5, m=0.2, scale=scope["factors"])
    for ours, theirs in zip(scope["optimizer"].param_groups, ProxSGD(shorter, lr=0.05).param_groups):
        assert ours["param_names"] == theirs["param_names"]
        for key in ("group_lasso", "exclusive_lasso"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-12)
    assert scope["groups"][3]["group_lasso"] == pytest.approx(6e-5 * 0.2 / 144)
    assert scope["groups"][3]["exclusive_lasso"] == pytest.approx(6e-5 * 0.8 * 144)


def test_fractions_left_by_the_modes():
    """The table of docs/penalties.md, on normal random groups of 1,024."""
    page = (ROOT / "docs" / "penalties.md").read_text()
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    z = torch.randn(1024, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for bn, *said in rows:
        for mode, fraction in zip(("sequential", "exact"), said):
            left = prox(z, exclusive_lasso=float(bn) / 1024, prox_mode=mode, backend="reference") != 0
            assert left.double().mean() == pytest.approx(float(fraction), abs=0.012)


def test_groups_of_a_reshaped_weight():
    """A weak head and a weak LSTM unit become zero as one group each, and nothing else does."""
    (views,) = blocks("docs/groups.md")
    attention, lstm = nn.MultiheadAttention(64, 4), nn.LSTM(8, 32)
    scope = {"attention": attention, "lstm": lstm, "ProxSGD": ProxSGD}
    exec(views, scope)
    for p in (attention.out_proj.weight, lstm.weight_ih_l0):
        p.grad = torch.zeros_like(p)
    head, unit = attention.out_proj.weight.view(64, 4, 16)[:, 2], lstm.weight_ih_l0.view(4, 32, 8)[:, 5]
    with torch.no_grad():
        head *= 1e-6
        unit *= 1e-6
    scope["optimizer"].step()
    assert (head == 0).all() and (unit == 0).all()
    assert (attention.out_proj.weight == 0).sum() == 64 * 16 and (lstm.weight_ih_l0 == 0).sum() == 4 * 8


def trained(scope):
    """The names that the code of docs/smaller.md needs, beside all of cges_kernels."""
    scope |= {"Net": Net, "model": Net(), "loss_fn": nn.CrossEntropyLoss(), "torch": torch}
    exec("from cges_kernels import *", scope)
    return scope


def test_the_recipe_from_dense_to_small(tmp_path, monkeypatch, capsys):
    """The recipe ends with zeros that are held, and a smaller network that computes the same."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    data = batches(100)
    scope = trained({"batches": data, "steps": len(data)})
    recipe, *_ = blocks("docs/smaller.md")
    exec(recipe.replace("group_lasso=0.03", "group_lasso=0.3"), scope)
    assert {g["freeze_zeros"] for g in scope["optimizer"].param_groups} == {"group"}
    assert "parameters" in capsys.readouterr().out
    assert scope["result"].parameters[1] < scope["result"].parameters[0]
    x = data[0][0]
    torch.testing.assert_close(scope["small"](x), scope["model"].eval()(x))


@pytest.mark.full("trains for seconds, as the page on going from dense to small does")
def test_a_density_and_rounds_of_pruning(tmp_path, monkeypatch):
    """The code reaches the densities that it asks for."""
    pytest.importorskip("matplotlib")
    _, density, rounds = blocks("docs/smaller.md")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)  # in so few steps on noise some draws end points below the density
    data = batches(20)
    scope = trained({"data": data, "epochs": 10})
    exec(density, scope)
    assert abs(scope["control"].measure() - 0.1) <= 0.01
    assert {path.name for path in tmp_path.iterdir()} == {"sparsity.csv", "last_layer.png"}

    def train(model, optimizer):
        for x, y in data:
            optimizer.zero_grad()
            scope["loss_fn"](model(x), y).backward()
            optimizer.step()

    scope |= {"model": Net(), "train": train}
    exec(rounds, scope)
    assert scope["sparsity_report"](scope["model"]).total.percent_nonzero <= 10.1


def test_tables_are_those_of_the_results():
    """The tables are those that are made from bench/results."""
    found = pages.pages(*pages.reports())
    assert len(found) == 2
    for path, text in found.items():
        assert path.read_text() == text, f"{path.name}: run `make tables`"


def test_the_readme_stays_short():
    """A newcomer reads it once."""
    assert README.count("\n") <= 160


BREAKS = {
    "nothing": (None, "", ""),
    "a dead link": ("docs/groups.md", "# Groups\n", "# Groups\n\n[gone](gone.md)\n"),
    "a dead link to a source": ("docs/groups.md", "# Groups\n", "# Groups\n\n[gone](../csrc/gone.h)\n"),
    "a link in HTML": ("docs/groups.md", "# Groups\n", '# Groups\n\n<img src="gone.svg">\n'),
    "a dead anchor": ("docs/groups.md", "# Groups\n", "# Groups\n\n[gone](install.md#gone)\n"),
    "a missing picture": ("docs/groups.md", "# Groups\n", "# Groups\n\n![gone](figures/gone.svg)\n"),
    "a name without a reference": ("docs/api.md", "::: cges_kernels.prox_\n", ""),
    "a reference without a docstring": (
        "cges_kernels/__init__.py",
        "__all__ = [\n",
        'def silent(): pass\n\n\n__all__ = [\n    "silent",\n',
    ),
}


@pytest.mark.full("builds the site once for each way in which it must not build")
@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: `make docs` does"
)
@pytest.mark.parametrize("broken", BREAKS)
def test_the_site(broken, tmp_path):
    """A dead link or anchor, a missing picture, and a public name without text fail the build."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "*.so"))
    name, old, new = BREAKS[broken]
    if name:
        text = (copy / name).read_text()
        assert text.count(old) == 1
        (copy / name).write_text(text.replace(old, new))
    if broken == "a reference without a docstring":
        with (copy / "docs" / "api.md").open("a") as page:
            page.write("\n::: cges_kernels.silent\n")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build"],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    assert (built.returncode == 0) == (broken == "nothing"), built.stderr
    if broken == "nothing":
        index = (copy / "build" / "site" / "index.html").read_text()
        assert "ProxSGD" in index and "](docs/" not in index
        site = copy / "build" / "site"
        for page in site.rglob("*.html"):
            for link in re.findall(r'(?:href|src)="([^"#:?]+)[#"?]', page.read_text()):
                assert (page.parent / link).exists() or page.name == "404.html", f"{page}: {link}"
