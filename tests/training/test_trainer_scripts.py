"""The example scripts run as users run them, and go on from a checkpoint to the same weights."""

import importlib.util
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers.scripts import run_script, torchrun
from helpers.steps import assert_same_bits
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

pytest.importorskip("sklearn", reason="scikit-learn, whose digits the scripts train on, is not installed")
pytestmark = pytest.mark.xdist_group("trainers")
EPOCHS = ("--epochs", 4)  # the warm-up takes two; the first ends in its middle


def needs(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def check_output(printed):
    """A sparsity report of all layers, and an accuracy."""
    assert "total" in printed and "38,160" in printed
    assert 0 < float(printed.partition("test accuracy: ")[2].partition("%")[0]) <= 100


def assert_goes_on(run, weights_of, first, last):
    """Resumed from the first epoch's checkpoint, a script ends with the weights of the run that went on."""
    check_output(run(*EPOCHS, "--out", "whole"))
    check_output(run(*EPOCHS, "--out", "resumed", "--resume", f"whole/{first}"))
    before, whole, resumed = map(weights_of, (f"whole/{first}", f"whole/{last}", f"resumed/{last}"))
    assert whole.keys() == resumed.keys()
    assert_same_bits(list(whole.values()), list(resumed.values()))
    assert not all(torch.equal(whole[key], before[key]) for key in whole)


def safetensors_in(folder):
    load_file = pytest.importorskip("safetensors.torch").load_file
    return lambda path: load_file(folder / path / "model.safetensors")


@pytest.mark.full("the script for Lightning, which takes seconds to import")
def test_lightning(tmp_path):
    needs("lightning")

    def weights(path):
        return torch.load(tmp_path / path, weights_only=True)["state_dict"]

    run = partial(run_script, "train_with_lightning", cwd=tmp_path)
    assert_goes_on(run, weights, "epoch=0.ckpt", "epoch=3.ckpt")


@pytest.mark.full("the script for the Hugging Face Trainer, which takes seconds to import")
def test_hf_trainer(tmp_path):
    needs("transformers")
    needs("accelerate")
    run = partial(run_script, "train_with_hf_trainer", cwd=tmp_path)
    assert_goes_on(run, safetensors_in(tmp_path), "checkpoint-12", "checkpoint-48")


@pytest.mark.full("the script for accelerate, which takes seconds to import")
def test_accelerate(tmp_path):
    needs("accelerate")
    run = partial(run_script, "train_with_accelerate", cwd=tmp_path)
    assert_goes_on(run, safetensors_in(tmp_path), "epoch-1", "epoch-4")


@pytest.mark.full("the script for FSDP2, in two processes that torchrun starts")
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs a torch with gloo")
def test_fsdp2(tmp_path):
    def weights(path):
        dcp_to_torch_save(tmp_path / path, tmp_path / "one.pt")
        return torch.load(tmp_path / "one.pt", weights_only=True)["model"]

    run = partial(torchrun, 2, "train_with_fsdp2", cwd=tmp_path)
    assert_goes_on(run, weights, "epoch-1", "epoch-4")


@pytest.mark.full("the script that makes a ResNet-18 smaller: a minute of training")
def test_small_resnet(tmp_path):
    """A penalty that is far too strong kills within an epoch all that it reaches, which then leaves."""
    needs("torchvision")
    printed = run_script("small_resnet", "--epochs", 1, "--group-lasso", 0.1, cwd=tmp_path)
    before, after = map(int, rows(printed)["parameters"])
    assert after < before / 2
    flops, fewer = map(int, rows(printed)["FLOPs"])
    assert fewer < flops and "latency, ms" in printed
    own, loaded = printed.rpartition("test accuracy: ")[2].split(", and ")
    assert own == loaded.partition(" from ")[0] and (tmp_path / "small_resnet.pt").exists()


def rows(printed):
    """{name: [before, after]} of the lines of compact()'s table that hold two numbers and a percentage."""
    cells = (line.replace(",", "").split() for line in printed.splitlines())
    return {cell[0]: cell[1:3] for cell in cells if len(cell) == 4 and cell[3].endswith("%")}
