"""Gradients, parameters and momentum buffers that come late, move in memory or are replaced."""

import copy

import torch
from helpers.scenarios.registry import scenario
from helpers.steps import everything, give_grads, parameters, train
from torch import nn


@scenario
def gradients_that_are_missing_at_times(make):
    """Each parameter's gradient is None in every third step."""
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
    """A parameter that gets its first gradient, and so its state, after the others."""
    params = parameters()
    optimizer = make(params, lr=0.1, momentum=0.9, dampening=0.3)
    late = params[1]
    for step in range(10):
        give_grads(params, step)
        if step < 7:
            late.grad = None
        optimizer.step()
        assert bool(optimizer.state.get(late)) == (step >= 7)
    return everything(optimizer)


@scenario
def parameters_moved_in_memory(make):
    """The memory of every parameter is replaced after each step."""
    params = parameters()
    optimizer = make(params, lr=0.1, momentum=0.9)
    for step in range(6):
        train(optimizer, params, [step])
        for p in params:
            p.data = p.data.clone()
    return everything(optimizer)


@scenario
def parameters_replaced_in_the_param_group(make):
    """Every parameter is replaced by another object, to which its state moves."""
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
    """One parameter is replaced by a new one of another shape."""
    params = parameters()
    optimizer = make(params, lr=0.1, momentum=0.9)
    train(optimizer, params, range(3))
    params[1] = optimizer.param_groups[0]["params"][1] = parameters([(7, 2)], seed=5)[0]
    train(optimizer, params, range(3, 6))
    return everything(optimizer)


@scenario
def parameters_given_another_stride_order(make):
    """Parameters change their memory format while their buffers do not."""
    params = parameters()
    optimizer = make(params, lr=0.1, momentum=0.9)
    train(optimizer, params, range(3))
    params[1].data = params[1].data.to(memory_format=torch.channels_last)
    params[0].data = params[0].data.t().contiguous().t()
    train(optimizer, params, range(3, 6))
    return everything(optimizer)


@scenario
def model_made_float64_between_steps(make):
    """The dtype of all parameters changes before the first step."""
    params = parameters(dtype=torch.float32)
    optimizer = make(params, lr=0.125)
    for p in params:
        p.data = p.data.double()
    train(optimizer, params, range(3))
    return everything(optimizer)


@scenario
def state_cleared(make):
    """The state is cleared, for all parameters and for single ones."""
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
    """Momentum buffers are replaced, set to None and zeroed, and an entry of the caller's own is kept."""
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
def states_given_other_memory(make):
    """The memory of every state is replaced."""
    params = parameters()
    optimizer = make(params, lr=0.1, momentum=0.9)
    train(optimizer, params, range(3))
    for p in params:
        for state in optimizer.state[p].values():
            state.data = state.data.clone()
    train(optimizer, params, range(3, 6))
    return everything(optimizer)


@scenario
def states_in_another_memory_format(make):
    """States change their memory format while their parameters do not."""
    params = parameters([(4, 3, 3, 3), (6, 5)])
    optimizer = make(params, lr=0.1, momentum=0.9)
    train(optimizer, params, range(2))
    one, two = (optimizer.state[p] for p in params)
    for key, state in one.items():
        one[key] = state.to(memory_format=torch.channels_last) if state.dim() else state
    for key, state in two.items():
        two[key] = state.t().contiguous().t() if state.dim() else state
    train(optimizer, params, range(2, 5))
    return everything(optimizer)


@scenario
def channels_last_parameters_with_contiguous_gradients(make):
    """Gradients whose strides differ from those of the parameters."""
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
    """Transposed, strided, expanded and conjugated gradients, and one with a pending minus sign."""
    params = parameters([(6, 5)] * 5)
    optimizer = make(params, lr=0.1, momentum=0.9)
    for step in range(4):
        give_grads(params, step)
        grads = [p.grad for p in params]
        params[0].grad = grads[0].t().contiguous().t()
        params[1].grad = torch.stack([grads[1]] * 2, dim=2)[..., 0]
        params[2].grad = grads[2][:1].expand(6, 5)
        params[3].grad = torch.complex(grads[3], grads[3]).conj().imag
        params[4].grad = torch._neg_view(grads[4])  # dense, but its minus sign is not applied yet
        optimizer.step()
    return everything(optimizer)


@scenario
def one_gradient_shared_by_two_parameters(make):
    """Two parameters that hold the same gradient tensor."""
    params = parameters([(6, 5)] * 2)
    optimizer = make(params, lr=0.1, momentum=0.9)
    for step in range(3):
        give_grads(params, step)
        params[1].grad = params[0].grad
        optimizer.step()
    return everything(optimizer)
