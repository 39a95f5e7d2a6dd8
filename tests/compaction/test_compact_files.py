"""Compacted models in files."""

import copy
import io

import pytest
import torch
from helpers.compacting import kill
from helpers.networks import IMAGE, residual
from helpers.steps import assert_same_bits
from torch import nn

from cges_kernels import compact, load_compacted, save_compacted
from examples.common.networks import LeNet


def test_a_whole_module_is_saved_too():
    """torch.save of the module itself works."""
    model = nn.Sequential(nn.Linear(100, 70), nn.ReLU(), nn.Linear(70, 2))
    with torch.no_grad():
        model[0].weight[:, 10:] = 0
    small, file, x = compact(model, torch.randn(3, 100)).model, io.BytesIO(), torch.randn(3, 100)
    torch.save(small, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), small(x))


def test_files_are_plain_and_trained_further(tmp_path):
    """A file is read with weights_only=True, loads into a dense model's copy, and can be compacted again."""
    model = kill(residual())
    small = compact(model, torch.randn(IMAGE)).model
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(torch.randn(IMAGE)).sum().backward()
    optimizer.step()
    save_compacted(small, tmp_path / "small.pt")
    content = torch.load(tmp_path / "small.pt", weights_only=True)
    assert content["sizes"]["bn1"] == {"num_features": small.bn1.num_features}
    dense = residual()
    before = copy.deepcopy(dense.state_dict())
    loaded = load_compacted(dense, tmp_path / "small.pt")
    assert_same_bits(list(before.values()), list(dense.state_dict().values()))
    for key, value in small.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert compact(loaded, torch.randn(IMAGE)).parameters[0] == sum(p.numel() for p in small.parameters())


def test_files_of_something_else(tmp_path):
    """Files that are none, or of another model, are errors that say what was expected."""
    path = tmp_path / "some.pt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match=r"some\.pt: expected a file of save_compacted"):
        load_compacted(residual(), path)
    save_compacted(residual(), path)
    with pytest.raises(ValueError, match=r"some\.pt: expected modules of LeNet, got \['bn1', "):
        load_compacted(LeNet(8), path)
    save_compacted(nn.Sequential(nn.Linear(2, 3)), path)
    with pytest.raises(ValueError, match=r"some\.pt: expected the weights of Sequential, got: .*1\.weight"):
        load_compacted(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3)), path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    """When the disk is full the old file stays whole and no temporary file is left."""
    path = tmp_path / "small.pt"
    save_compacted(nn.Linear(2, 3), path)
    old = path.read_bytes()

    def fail(content, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_compacted(nn.Linear(5, 6), path)
    assert path.read_bytes() == old and [x.name for x in tmp_path.iterdir()] == ["small.pt"]
