"""What training loops do to an optimizer, as functions that take its constructor.

Each returns the tensors by which two optimizers are compared.
"""

import copy

import pytest
import torch
from helpers.steps import assert_same_bits, everything, give_grads, parameters, train
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR

SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def with_scheduler(make, schedule, **options):
    params = parameters()
    optimizer = make(params, lr=0.1, momentum=0.9, **options)
    scheduler = schedule(optimizer)
    seen = []
    for step in range(12):
        train(optimizer, params, [step])
        scheduler.step()
        group = optimizer.param_groups[0]
        seen.append([float(group["lr"]), float(group["momentum"])])
    assert len({lr for lr, _ in seen}) > 2
    return everything(optimizer) + [torch.tensor(seen)]


@scenario
def step_lr(make):
    return with_scheduler(make, lambda optimizer: StepLR(optimizer, 3, gamma=0.3))


@scenario
def cosine_annealing_lr(make):
    return with_scheduler(make, lambda optimizer: CosineAnnealingLR(optimizer, 12))


@scenario
def one_cycle_lr_cycles_momentum_too(make):
    return with_scheduler(make, lambda optimizer: OneCycleLR(optimizer, 0.2, total_steps=13))


@scenario
def scheduled_tensor_lr(make):
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
    params, lr = parameters(), torch.tensor(0.1)
    optimizer = make(params, lr=lr)
    for step in range(6):
        train(optimizer, params, [step])
        lr.mul_(0.7)
    return everything(optimizer)


@scenario
def tensor_lr_of_one_dimension(make):
    params = parameters()
    optimizer = make(params, lr=torch.tensor([0.1], dtype=torch.float64))
    train(optimizer, params, range(3))
    return everything(optimizer)


@scenario
def tensor_weight_decay(make):
    params = parameters()
    optimizer = make(params, lr=0.1, weight_decay=torch.tensor(0.01))
    train(optimizer, params, range(3))
    return everything(optimizer)


@scenario
def every_hyperparameter_changed_by_hand(make):
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
    """Checkpoint loaders make a step with lr = 0 so that the buffers exist."""
    params = parameters()
    optimizer = make(params, lr=0.0, momentum=0.9)
    train(optimizer, params, range(2))
    assert_same_bits([p.detach() for p in params], [p.detach() for p in parameters()])
    optimizer.param_groups[0]["lr"] = 0.1
    train(optimizer, params, range(2, 4))
    return everything(optimizer)


@scenario
def add_param_group_mid_training(make):
    first, second = parameters(), parameters(seed=1)
    optimizer = make(first, lr=0.1, momentum=0.9)
    train(optimizer, first, range(3))
    optimizer.add_param_group({"params": second, "lr": 0.01, "momentum": 0.5})
    train(optimizer, first + second, range(3, 6))
    return everything(optimizer)


@scenario
def empty_param_group_filled_later(make):
    first, second = parameters(), parameters(seed=1)
    optimizer = make([{"params": first}, {"params": []}], lr=0.1, momentum=0.9)
    train(optimizer, first, range(3))
    optimizer.param_groups[1]["params"].extend(second)
    train(optimizer, first + second, range(3, 6))
    return everything(optimizer)


@scenario
def params_held_in_a_tuple(make):
    params = parameters()
    optimizer = make(params, lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["params"] = tuple(params)
    train(optimizer, params, range(3))
    return everything(optimizer)


@scenario
def parameter_handed_to_the_next_group(make):
    params = parameters()
    optimizer = make([{"params": params[:3]}, {"params": params[3:], "lr": 0.5}], lr=0.1, momentum=0.9)
    train(optimizer, params, range(3))
    first, second = (group["params"] for group in optimizer.param_groups)
    second.insert(0, first.pop())
    train(optimizer, params, range(3, 6))
    return everything(optimizer)


@scenario
def param_groups_removed_and_reordered(make):
    params = parameters()
    optimizer = make([{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(params)], momentum=0.9)
    train(optimizer, params, range(2))
    optimizer.param_groups.reverse()
    train(optimizer, params, range(2, 4))
    optimizer.param_groups.pop(1)
    train(optimizer, params, range(4, 6))
    return [p.detach() for p in params]


@scenario
def gradients_that_are_missing_at_times(make):
    params = parameters()
    optimizer = make(params, lr=0.1, momentum=0.9, dampening=0.3)
    for step in range(10):
        give_grads(params, step)
        for i, p in enumerate(params):
            if (step + i) % 3 == 0:
                p.grad = None
        optimizer.step()
    return everything(optimizer)


@scenario
def gradient_that_first_appears_at_step_7(make):
    params = parameters()
    optimizer = make(params, lr=0.1, momentum=0.9, dampening=0.3)
    late = params[1]
    for step in range(10):
        give_grads(params, step)
        if step < 7:
            late.grad = None
        optimizer.step()
        assert ("momentum_buffer" in optimizer.state.get(late, {})) == (step >= 7)
    return everything(optimizer)


@scenario
def parameters_moved_in_memory(make):
    params = parameters()
    optimizer = make(params, lr=0.1, momentum=0.9)
    for step in range(6):
        train(optimizer, params, [step])
        for p in params:
            p.data = p.data.clone()
    return everything(optimizer)


@scenario
def parameters_replaced_in_the_param_group(make):
    params = parameters()
    optimizer = make(params, lr=0.1, momentum=0.9)
    for step in range(6):
        train(optimizer, params, [step])
        fresh = {p: nn.Parameter(p.detach().clone()) for p in params}
        for group in optimizer.param_groups:
            group["params"] = [fresh[p] for p in group["params"]]
        for p in params:
            optimizer.state[fresh[p]] = optimizer.state.pop(p)
        params = [fresh[p] for p in params]
    return everything(optimizer)


@scenario
def one_parameter_replaced_by_another_shape(make):
    params = parameters()
    optimizer = make(params, lr=0.1, momentum=0.9)
    train(optimizer, params, range(3))
    params[1] = optimizer.param_groups[0]["params"][1] = parameters([(7, 2)], seed=5)[0]
    train(optimizer, params, range(3, 6))
    return everything(optimizer)


@scenario
def parameters_given_another_stride_order(make):
    params = parameters()
    optimizer = make(params, lr=0.1, momentum=0.9)
    train(optimizer, params, range(3))
    params[1].data = params[1].data.to(memory_format=torch.channels_last)
    params[0].data = params[0].data.t().contiguous().t()
    train(optimizer, params, range(3, 6))
    return everything(optimizer)


@scenario
def model_made_float64_between_steps(make):
    params = parameters(dtype=torch.float32)
    optimizer = make(params, lr=0.125)
    for p in params:
        p.data = p.data.double()
    train(optimizer, params, range(3))
    return everything(optimizer)


@scenario
def state_cleared(make):
    params = parameters()
    optimizer = make(params, lr=0.1, momentum=0.9, dampening=0.3)
    train(optimizer, params, range(3))
    optimizer.state.clear()
    train(optimizer, params, range(3, 5))
    optimizer.state[params[0]].clear()
    train(optimizer, params, range(5, 7))
    optimizer.state = copy.copy(optimizer.state)
    del optimizer.state[params[1]]
    train(optimizer, params, range(7, 9))
    return everything(optimizer)


@scenario
def state_entries_replaced(make):
    params = parameters()
    optimizer = make(params, lr=0.1, momentum=0.9)
    train(optimizer, params, range(3))
    optimizer.state[params[0]] = {"momentum_buffer": torch.ones_like(params[0]), "mine": 3}
    optimizer.state[params[1]]["momentum_buffer"] = torch.full_like(params[1], 2)
    optimizer.state[params[2]]["momentum_buffer"] = None
    optimizer.state[params[5]]["momentum_buffer"].zero_()
    train(optimizer, params, range(3, 6))
    assert optimizer.state[params[0]]["mine"] == 3
    return everything(optimizer)


@scenario
def momentum_buffer_given_other_memory(make):
    params = parameters()
    optimizer = make(params, lr=0.1, momentum=0.9)
    train(optimizer, params, range(3))
    for p in params:
        buf = optimizer.state[p]["momentum_buffer"]
        buf.data = buf.data.clone()
    train(optimizer, params, range(3, 6))
    return everything(optimizer)


@scenario
def momentum_buffer_in_another_memory_format(make):
    params = parameters([(4, 3, 3, 3), (6, 5)])
    optimizer = make(params, lr=0.1, momentum=0.9)
    train(optimizer, params, range(2))
    one, two = (optimizer.state[p] for p in params)
    one["momentum_buffer"] = one["momentum_buffer"].to(memory_format=torch.channels_last)
    two["momentum_buffer"] = two["momentum_buffer"].t().contiguous().t()
    train(optimizer, params, range(2, 5))
    return everything(optimizer)


@scenario
def channels_last_parameters_with_contiguous_gradients(make):
    params = parameters([(4, 3, 3, 3), (8, 4, 2, 2)])
    for p in params:
        p.data = p.data.to(memory_format=torch.channels_last)
    optimizer = make(params, lr=0.1, momentum=0.9)
    for step in range(4):
        give_grads(params, step)
        for p in params:
            p.grad = p.grad.contiguous()
        optimizer.step()
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in params)
    return everything(optimizer)


@scenario
def gradients_of_odd_strides(make):
    params = parameters([(6, 5)] * 5)
    optimizer = make(params, lr=0.1, momentum=0.9)
    for step in range(4):
        give_grads(params, step)
        grads = [p.grad for p in params]
        params[0].grad = grads[0].t().contiguous().t()
        params[1].grad = torch.stack([grads[1]] * 2, dim=2)[..., 0]
        params[2].grad = grads[2][:1].expand(6, 5)
        params[3].grad = torch.complex(grads[3], grads[3]).conj().imag
        params[4].grad = torch._neg_view(grads[4])  # dense, the minus sign still to be applied
        optimizer.step()
    return everything(optimizer)


@scenario
def one_gradient_shared_by_two_parameters(make):
    params = parameters([(6, 5)] * 2)
    optimizer = make(params, lr=0.1, momentum=0.9)
    for step in range(3):
        give_grads(params, step)
        params[1].grad = params[0].grad
        optimizer.step()
    return everything(optimizer)


def model_and_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, torch.randn(9, 5, 6, dtype=torch.float64)


@scenario
def zero_grad_both_ways(make):
    model, batches = model_and_batches()
    optimizer = make(model.parameters(), lr=0.1, momentum=0.9)
    for i, x in enumerate(batches):
        optimizer.zero_grad(set_to_none=i % 2 == 0)
        assert all((p.grad is None) if i % 2 == 0 else not p.grad.any() for p in model.parameters())
        if i not in (3, 8):  # without a backward: a zero moves on by momentum, a None is skipped
            model(x).square().sum().backward()
        optimizer.step()
    return everything(optimizer)


@scenario
def gradients_accumulated(make):
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
    model, batches = model_and_batches()
    optimizer = make(model.parameters(), lr=0.01, momentum=0.9)
    scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=4.0, growth_interval=2)
    for i, x in enumerate(batches):
        optimizer.zero_grad()
        scaler.scale(model(x).square().sum()).backward()
        if i == 4:
            model[0].weight.grad[0, 0] = float("inf")  # this step is skipped
        scaler.step(optimizer)
        scaler.update()
    assert all(p.isfinite().all() for p in model.parameters())
    return everything(optimizer)


@scenario
def named_parameters(make):
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
    model, batches = model_and_batches()
    model[0].requires_grad_(False)
    optimizer = make(model.parameters(), lr=0.01, momentum=0.9)
    for x in batches:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return everything(optimizer)
