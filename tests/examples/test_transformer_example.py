"""The transformer example: its groups are as documented, and the command runs from end to end."""

import json

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from examples import transformer


def test_a_dead_head_and_a_dead_unit_give_nothing():
    torch.manual_seed(0)
    model = transformer.Transformer(11)
    x = torch.randint(11, (2, 9))
    block = model.blocks[0]
    with torch.no_grad():
        block.heads[1].out.weight.zero_()
        block.down.weight[:, 5] = 0
        before = model(x)
        block.heads[1].value.weight.normal_()
        block.up.weight[5].normal_()
        assert torch.equal(model(x), before)
    everything = transformer.BLOCKS * transformer.HEADS, transformer.BLOCKS * transformer.HIDDEN
    assert transformer.alive(model) == (everything[0] - 1, everything[1] - 1)


def test_every_parameter_is_in_one_group():
    model = transformer.Transformer(11)
    params = [p for group in transformer.param_groups(model, 0.1) for p in group["params"]]
    assert len(params) == len(set(params)) and set(params) == set(model.parameters())


def test_the_command(tmp_path, capsys):
    """Far too strong a penalty kills all that it reaches, which compact then removes."""
    assert transformer.main(["--steps", "12", "--group-lasso", "60", "--out", str(tmp_path / "new")]) == 0
    report = json.loads((tmp_path / "new" / "transformer.json").read_text())
    assert (tmp_path / "new" / "transformer.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "hidden units" in printed and "compacted" in printed
    assert [row[0] for row in report["curves"]["dense"]] == [1, 12]
    parameters = report["compact"]["parameters"]
    assert parameters["after"] < parameters["before"] / 2
    assert report["compact"]["max_difference"] < 1e-4


def test_steps_that_are_none_are_refused(capsys):
    with pytest.raises(SystemExit):
        transformer.main(["--steps", "0"])
    assert "expected a whole number of at least 1, got '0'" in capsys.readouterr().err
