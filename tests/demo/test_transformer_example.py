"""The transformer example: its groups are what it says, and the command goes from end to end."""

import importlib.util
import json
import sys

import pytest
import torch
from helpers.programs import ROOT

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("transformer_example", ROOT / "examples" / "transformer.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_a_dead_head_and_a_dead_unit_give_nothing(example):
    torch.manual_seed(0)
    model = example.Transformer(11)
    x = torch.randint(11, (2, 9))
    block = model.blocks[0]
    with torch.no_grad():
        block.heads[1].out.weight.zero_()
        block.down.weight[:, 5] = 0
        before = model(x)
        block.heads[1].value.weight.normal_()
        block.up.weight[5].normal_()
        assert torch.equal(model(x), before)
    everything = example.BLOCKS * example.HEADS, example.BLOCKS * example.HIDDEN
    assert example.alive(model) == (everything[0] - 1, everything[1] - 1)


def test_every_parameter_is_in_one_group(example):
    model = example.Transformer(11)
    params = [p for group in example.param_groups(model, 0.1) for p in group["params"]]
    assert len(params) == len(set(params)) and set(params) == set(model.parameters())


def test_the_command(example, tmp_path, capsys):
    """Far too strong a penalty kills all that it reaches, which compact then removes."""
    assert example.main(["--steps", "12", "--group-lasso", "60", "--out", str(tmp_path / "new")]) == 0
    report = json.loads((tmp_path / "new" / "transformer.json").read_text())
    assert (tmp_path / "new" / "transformer.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "hidden units" in printed and "compacted" in printed
    assert [row[0] for row in report["curves"]["dense"]] == [1, 12]
    parameters = report["compact"]["parameters"]
    assert parameters["after"] < parameters["before"] / 2
    assert report["compact"]["max_difference"] < 1e-4


def test_steps_that_are_none_are_refused(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--steps", "0"])
    assert "expected at least 1, got 0" in capsys.readouterr().err
