"""Features of training loops: zero_grad, closures, loss scaling, names, frozen layers."""

import torch
from helpers.scenarios.registry import scenario
from helpers.steps import everything
from torch import nn


def model_and_batches():
    """A small model and nine batches, the same at every call."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, torch.randn(9, 5, 6, dtype=torch.float64)


@scenario
def zero_grad_both_ways(make):
    """Gradients that are set to None and to zero in turn."""
    model, batches = model_and_batches()
    optimizer = make(model.parameters(), lr=0.1, momentum=0.9)
    for i, x in enumerate(batches):
        optimizer.zero_grad(set_to_none=i % 2 == 0)
        assert all((p.grad is None) if i % 2 == 0 else not p.grad.any() for p in model.parameters())
        # Two steps have no backward: a parameter with a zero gradient moves on by momentum, one whose
        # gradient is None is skipped.
        if i not in (3, 8):
            model(x).square().sum().backward()
        optimizer.step()
    return everything(optimizer)


@scenario
def gradients_accumulated(make):
    """Three backward passes for each step."""
    model, batches = model_and_batches()
    optimizer = make(model.parameters(), lr=0.01, momentum=0.9)
    for i, x in enumerate(batches):
        model(x).square().sum().backward()
        if i % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    return everything(optimizer)


@scenario
def closure(make):
    """A step that evaluates the loss itself, through a closure."""
    model, batches = model_and_batches()
    optimizer = make(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for x in batches:

        def evaluate(x=x):
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            return loss

        losses.append(optimizer.step(evaluate).detach())
    return everything(optimizer) + losses


@scenario
def grad_scaler(make):
    """A GradScaler that finds an infinite gradient once."""
    model, batches = model_and_batches()
    optimizer = make(model.parameters(), lr=0.01, momentum=0.9)
    scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=4.0, growth_interval=2)
    for i, x in enumerate(batches):
        optimizer.zero_grad()
        scaler.scale(model(x).square().sum()).backward()
        if i == 4:
            model[0].weight.grad[0, 0] = float("inf")  # the scaler skips this step
        scaler.step(optimizer)
        scaler.update()
    assert all(p.isfinite().all() for p in model.parameters())
    return everything(optimizer)


@scenario
def named_parameters(make):
    """Parameters given with names, which the state_dict has to keep."""
    model, batches = model_and_batches()
    optimizer = make(model.named_parameters(), lr=0.01, momentum=0.9)
    for x in batches:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    return everything(optimizer)


@scenario
def parameters_that_need_no_gradient(make):
    """A frozen layer among the parameters."""
    model, batches = model_and_batches()
    model[0].requires_grad_(False)
    optimizer = make(model.parameters(), lr=0.01, momentum=0.9)
    for x in batches:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return everything(optimizer)
