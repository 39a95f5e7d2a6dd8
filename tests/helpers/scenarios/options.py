"""Learning rates, hyperparameters and param groups that change between steps."""

import pytest
import torch
from helpers.scenarios.registry import scenario
from helpers.steps import assert_same_bits, everything, parameters, train
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR


def with_scheduler(make, schedule, **options):
    """Twelve steps under a scheduler; the rates and momenta seen are compared as well."""
    params = parameters()
    optimizer = make(params, lr=0.1, momentum=0.9, **options)
    scheduler = schedule(optimizer)
    seen = []
    for step in range(12):
        train(optimizer, params, [step])
        scheduler.step()
        group = optimizer.param_groups[0]
        seen.append(
            [float(group["lr"]), float(group["momentum"] if "momentum" in group else group["betas"][0])]
        )
    assert len({lr for lr, _ in seen}) > 2
    return everything(optimizer) + [torch.tensor(seen)]


@scenario
def step_lr(make):
    """A learning rate that drops every three steps."""
    return with_scheduler(make, lambda optimizer: StepLR(optimizer, 3, gamma=0.3))


@scenario
def cosine_annealing_lr(make):
    """A learning rate that changes at every step."""
    return with_scheduler(make, lambda optimizer: CosineAnnealingLR(optimizer, 12))


@scenario
def one_cycle_lr_cycles_momentum_too(make):
    """A scheduler that changes momentum (or beta1) as well as the learning rate."""
    return with_scheduler(make, lambda optimizer: OneCycleLR(optimizer, 0.2, total_steps=13))


@scenario
def scheduled_tensor_lr(make):
    """A tensor as the learning rate, changed by a scheduler."""
    params = parameters()
    optimizer = make(params, lr=torch.tensor(0.1), momentum=0.9)
    scheduler = StepLR(optimizer, 2, gamma=0.5)
    for step in range(6):
        train(optimizer, params, [step])
        scheduler.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1 / 8)
    return everything(optimizer)


@scenario
def tensor_lr_changed_in_place(make):
    """A tensor as the learning rate, changed in place by the caller."""
    params, lr = parameters(), torch.tensor(0.1)
    optimizer = make(params, lr=lr)
    for step in range(6):
        train(optimizer, params, [step])
        lr.mul_(0.7)
    return everything(optimizer)


@scenario
def tensor_lr_of_one_dimension(make):
    """A learning rate of shape (1,), in float64."""
    params = parameters()
    optimizer = make(params, lr=torch.tensor([0.1], dtype=torch.float64))
    train(optimizer, params, range(3))
    return everything(optimizer)


@scenario
def tensor_weight_decay(make):
    """A tensor as the weight decay."""
    params = parameters()
    optimizer = make(params, lr=0.1, weight_decay=torch.tensor(0.01))
    train(optimizer, params, range(3))
    return everything(optimizer)


@scenario
def every_hyperparameter_changed_by_hand(make):
    """A param group's options overwritten between steps."""
    params = parameters()
    optimizer = make(params, lr=0.1, momentum=0.9)
    changes = [
        dict(lr=0.2, momentum=0.5),
        dict(dampening=0.2),
        dict(weight_decay=0.1, maximize=True),
        dict(dampening=0, nesterov=True),
        dict(nesterov=False, momentum=0),
        dict(momentum=0.9),
    ]
    for step, change in enumerate(changes):
        optimizer.param_groups[0].update(change)
        train(optimizer, params, [step])
    return everything(optimizer)


@scenario
def lr_zero_at_first(make):
    """A first step with lr = 0, which loaders of checkpoints make so that the buffers exist."""
    params = parameters()
    optimizer = make(params, lr=0.0, momentum=0.9)
    train(optimizer, params, range(2))
    assert_same_bits([p.detach() for p in params], [p.detach() for p in parameters()])
    optimizer.param_groups[0]["lr"] = 0.1
    train(optimizer, params, range(2, 4))
    return everything(optimizer)


@scenario
def add_param_group_mid_training(make):
    """A param group added after some steps."""
    first, second = parameters(), parameters(seed=1)
    optimizer = make(first, lr=0.1, momentum=0.9)
    train(optimizer, first, range(3))
    optimizer.add_param_group({"params": second, "lr": 0.01, "momentum": 0.5})
    train(optimizer, first + second, range(3, 6))
    return everything(optimizer)


@scenario
def empty_param_group_filled_later(make):
    """A param group without parameters that gets some after some steps."""
    first, second = parameters(), parameters(seed=1)
    optimizer = make([{"params": first}, {"params": []}], lr=0.1, momentum=0.9)
    train(optimizer, first, range(3))
    optimizer.param_groups[1]["params"].extend(second)
    train(optimizer, first + second, range(3, 6))
    return everything(optimizer)


@scenario
def params_held_in_a_tuple(make):
    """A param group whose list of parameters was replaced by a tuple."""
    params = parameters()
    optimizer = make(params, lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["params"] = tuple(params)
    train(optimizer, params, range(3))
    return everything(optimizer)


@scenario
def parameter_handed_to_the_next_group(make):
    """A parameter moved from one param group to another."""
    params = parameters()
    optimizer = make([{"params": params[:3]}, {"params": params[3:], "lr": 0.5}], lr=0.1, momentum=0.9)
    train(optimizer, params, range(3))
    first, second = (group["params"] for group in optimizer.param_groups)
    second.insert(0, first.pop())
    train(optimizer, params, range(3, 6))
    return everything(optimizer)


@scenario
def param_groups_removed_and_reordered(make):
    """Param groups reversed, and one of them removed."""
    params = parameters()
    optimizer = make([{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(params)], momentum=0.9)
    train(optimizer, params, range(2))
    optimizer.param_groups.reverse()
    train(optimizer, params, range(2, 4))
    optimizer.param_groups.pop(1)
    train(optimizer, params, range(4, 6))
    return [p.detach() for p in params]
