"""The script for accelerate trains as a plain loop does. And accelerate may replace the parameters."""

import copy

import pytest
import torch
from helpers.scripts import script
from helpers.steps import assert_same_bits
from helpers.trainers import (
    ACCUMULATED,
    EPOCHS,
    NEEDED,
    STEPS,
    assert_alike,
    batches,
    coefficients,
    network,
    of_all_epochs,
    plain,
    sparse_adamw,
    sparse_sgd,
)

from cges_kernels import CoefficientWarmup, TargetDensity

pytestmark = [
    pytest.mark.full("the script for accelerate, which takes long to import"),
    pytest.mark.xdist_group("trainers"),
    pytest.mark.usefixtures("trainers"),
    pytest.mark.filterwarnings("ignore"),  # of devices
]
pytest.importorskip("sklearn", reason="scikit-learn, whose digits the script trains on, is not installed")


@pytest.fixture
def accelerate():
    package = pytest.importorskip("accelerate", reason=NEEDED)
    yield package
    package.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def run(accelerate, tmp_path, monkeypatch):
    """Runs the script's train() on a network; returns its optimizer."""
    module = script("train_with_accelerate")

    def run(net, resume=None, make_optimizer=sparse_sgd, schedule=CoefficientWarmup):
        made = []

        def making(model):
            made.append(make_optimizer(model))
            return made[-1]

        monkeypatch.setattr(module, "make_optimizer", making)
        monkeypatch.setattr(module, "CoefficientWarmup", schedule)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
        out = tmp_path / ("resumed" if resume else "whole")
        module.train(accelerator, net, batches(), EPOCHS, out, resume and tmp_path / resume)
        return made[-1]

    return run


OPTIMIZERS = pytest.mark.parametrize("make_optimizer", [sparse_sgd, sparse_adamw])


@OPTIMIZERS
def test_it_trains_as_a_plain_loop_does(run, make_optimizer):
    net, other = network(), network()
    run(net, make_optimizer=make_optimizer)
    optimizer = make_optimizer(other)
    warmup = CoefficientWarmup(optimizer, STEPS // 2)
    assert plain(other, optimizer, of_all_epochs(), schedulers=[warmup]) > 1
    assert_alike(net, other)


def to_half(optimizer, steps):
    return TargetDensity(optimizer, 0.5, steps)


@pytest.mark.parametrize("schedule", [CoefficientWarmup, to_half])
@OPTIMIZERS
def test_it_resumes_in_the_middle_of_a_schedule(run, schedule, make_optimizer):
    net, resumed = network(), network()
    whole = run(net, make_optimizer=make_optimizer, schedule=schedule)
    again = run(resumed, "whole/epoch-1", make_optimizer, schedule)
    assert coefficients(again) == coefficients(whole)
    assert_same_bits(list(net.parameters()), list(resumed.parameters()))


def by_mapping(optimizer, old, new):
    """Replaces the parameters as accelerate does on TPUs."""
    optimizer._switch_parameters(dict(zip(old, new)))


def by_memory(optimizer, old, new):
    """Replaces them as accelerate does with FSDP2: first by stand-ins that have an address as `data_ptr`."""
    from accelerate.utils import fsdp2_switch_optimizer_parameters

    addresses = {p.data_ptr(): q for p, q in zip(old, new)}
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            group["params"][i] = torch.empty(1, dtype=p.dtype)
            group["params"][i].data_ptr = p.data_ptr()
    fsdp2_switch_optimizer_parameters(optimizer, addresses)


@pytest.mark.parametrize("switch", [by_mapping, by_memory])
@OPTIMIZERS
def test_the_parameters_may_be_replaced(accelerate, switch, make_optimizer):
    """Training goes on in the new ones, and the old ones are let alone, whose gradients are still there."""
    net = network()
    prepared = accelerate.Accelerator(cpu=True).prepare(make_optimizer(net))
    plain(net, prepared, batches())
    before = [p.detach().clone() for p in net.parameters()]
    model, other = copy.deepcopy(net), copy.deepcopy(net)
    switch(prepared, list(net.parameters()), list(model.parameters()))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    plain(model, prepared, of_all_epochs())
    plain(other, make_optimizer(other), of_all_epochs())  # afresh: the state stays with the old parameters
    assert_alike(model, other)
    assert_same_bits(before, list(net.parameters()))
