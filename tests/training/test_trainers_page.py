"""What docs/trainers.md shows: files that exist, and a loop of one's own that runs and resumes."""

import re

import pytest
import torch
from helpers.programs import ROOT
from helpers.scripts import code_blocks
from helpers.steps import assert_same_bits
from helpers.trainers import batches, coefficients, loss_fn, network, sparse_sgd

from cges_kernels import CoefficientWarmup

pytestmark = pytest.mark.full("the page's links and code, beside the scripts that it includes")
PAGE = ROOT / "docs" / "trainers.md"
TEXT = PAGE.read_text()


def test_each_script_is_linked_and_then_included():
    included = re.findall(r'```python\n--8<-- "(.*)"\n```', TEXT)
    scripts = {path.name for path in (ROOT / "examples").glob("train_with_*.py")} | {"small_resnet.py"}
    assert sorted(included) == sorted(f"examples/{name}" for name in scripts)
    for path in included:
        link, inclusion = TEXT.index(f"](../{path})"), TEXT.index(f'--8<-- "{path}"')
        assert link < inclusion and path in TEXT[link + len(f"](../{path})") : inclusion]  # how to run it


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)#:]+)", TEXT)
    assert links and all((PAGE.parent / link).exists() for link in links)


def scope_of(model):
    optimizer = sparse_sgd(model)
    names = dict(torch=torch, device="cpu", loss_fn=loss_fn, loader=batches())
    return dict(names, model=model, optimizer=optimizer, warmup=CoefficientWarmup(optimizer, steps=4))


def test_a_loop_of_ones_own(tmp_path, monkeypatch):
    """With a scaler it steps once per two batches; loaded in mid warm-up it goes on the same."""
    _, loop, resuming = code_blocks("docs/trainers.md")
    monkeypatch.chdir(tmp_path)
    save, load = resuming.split("\n\n")
    once = {"loader": list(batches())[:4]}
    model = network()
    scope = scope_of(model)
    before = [p.detach().clone() for p in model.parameters()]
    exec(loop, scope | once)
    assert scope["warmup"].last_epoch == 2
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    exec(save, scope)
    other = network()
    again = scope_of(other)
    again["parts"] = {name: again[name] for name in ("model", "optimizer", "warmup")}
    exec(load, again)
    assert coefficients(again["optimizer"]) == coefficients(scope["optimizer"])
    for names in (scope, again):
        exec(loop, names)
    assert_same_bits(list(model.parameters()), list(other.parameters()))
    assert (
        coefficients(scope["optimizer"])[0]["exclusive_lasso"]
        == (sparse_sgd(network()).param_groups[0]["exclusive_lasso"])
    )
    assert any((p == 0).any() for p in model.parameters())
