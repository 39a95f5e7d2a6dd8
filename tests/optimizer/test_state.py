"""What an optimizer keeps between steps: momentum, copies of itself, and hooks."""

import copy
import pickle

import pytest
import torch
from helpers.steps import (
    PENALTY,
    assert_same_bits,
    copy_values,
    everything,
    give_grads,
    parameters,
    train,
    two_groups,
)
from helpers.tiers import covering
from torch import nn
from torch.optim import SGD

from cges_kernels import ProxAdamW, ProxSGD, available_backends

# Momentum


def test_first_buffer_is_the_gradient_without_dampening(backend):
    """As in torch, dampening begins with the second step; weight decay and maximize are in the buffer."""
    params = parameters()
    optimizer = ProxSGD(
        params, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.25, maximize=True, backend=backend
    )
    before = [p.detach().clone() for p in params]
    for step, (old_part, new_part) in enumerate([(0, 1), (0.9, 0.5)]):
        old = [optimizer.state[p].get("momentum_buffer", torch.zeros(())).clone() for p in params]
        train(optimizer, params, [step])
        for p, w, buf in zip(params, before, old):
            wanted = old_part * buf + new_part * (0.25 * w - p.grad)
            torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], wanted)
        before = [p.detach().clone() for p in params]


def test_state_holds_what_torch_sgd_holds(checked_backend):
    """The state_dict has torch.optim.SGD's keys, and no state where there was no gradient."""
    for momentum in (0, 0.9):
        params, others = parameters(), parameters()
        optimizer = ProxSGD(params, lr=0.1, momentum=momentum, backend=checked_backend)
        sgd = SGD(others, lr=0.1, momentum=momentum)
        for step in range(2):
            for ps, opt in ((params, optimizer), (others, sgd)):
                give_grads(ps, step)
                ps[2].grad = None
                opt.step()
        ours, theirs = optimizer.state_dict(), sgd.state_dict()
        filled = [{i: list(s) for i, s in state["state"].items() if s} for state in (ours, theirs)]
        assert filled[0] == filled[1]
        assert set(theirs["param_groups"][0]) < set(ours["param_groups"][0])


def test_buffers_are_laid_out_as_their_parameters(backend):
    """A new momentum buffer has the parameter's strides, whatever the gradient's."""
    p = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    p.grad = torch.randn(4, 3, 2, 2)
    optimizer = ProxSGD([p], lr=0.1, momentum=0.9, backend=backend)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], p.grad)
    if backend != "reference":  # the reference keeps the gradient's layout, as torch.optim.SGD does
        assert optimizer.state[p]["momentum_buffer"].stride() == p.stride()


def test_float32_buffer_after_the_model_became_float64(backend):
    """As in torch: the reference goes on, a fused executor refuses, and loading converts."""

    def half_way(make):
        params = parameters(dtype=torch.float32)
        optimizer = make(params, lr=0.125, momentum=0.875)
        train(optimizer, params, range(2))
        for p in params:
            p.data = p.data.double()
        give_grads(params, 2)
        return params, optimizer

    params, optimizer = half_way(lambda ps, **kw: ProxSGD(ps, **kw, backend=backend))
    others, sgd = half_way(lambda ps, **kw: SGD(ps, **kw, foreach=False))
    if backend == "reference":
        optimizer.step()
        sgd.step()
        assert_same_bits(params, others)
    else:
        before = [p.detach().clone() for p in params]
        with pytest.raises(RuntimeError, match=r"(?i)expected a momentum_buffer .*float64.*got .*float32"):
            optimizer.step()
        assert_same_bits(params, before)
    for ps, opt in ((params, optimizer), (others, sgd)):
        copy_values(ps, parameters())
        opt.load_state_dict(opt.state_dict())
        train(opt, ps, range(3, 5))
        assert all(opt.state[p]["momentum_buffer"].dtype == torch.float64 for p in ps)
    if backend == "reference":
        assert_same_bits(everything(optimizer), everything(sgd))


# Copies


def by_pickle(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


@covering(
    duplicate=[copy.deepcopy, by_pickle],
    steps_before=[0, 3],
    executor=available_backends(),
)
def test_a_copy_trains_on_by_itself(executor, duplicate, steps_before):
    """A copy has parameters of its own and trains on with the original's bits, on the same executor."""
    groups, params = two_groups(l1=0.5)
    optimizer = ProxSGD(groups, lr=0.1, momentum=0.9, **PENALTY, backend=executor)
    train(optimizer, params, range(steps_before))
    before = everything(optimizer)
    twin = duplicate(optimizer)
    twins = [p for group in twin.param_groups for p in group["params"]]
    assert not {id(p) for p in twins} & {id(p) for p in params}
    train(twin, twins, range(3, 6))
    assert twin._planner.executors == [executor] * 2
    assert_same_bits(before, everything(optimizer))
    train(optimizer, params, range(3, 6))
    assert_same_bits(everything(optimizer), everything(twin))


class Renamed(ProxAdamW):
    """A user's own class, whose arguments are not the options."""

    def __init__(self, params, rate):
        super().__init__(params, lr=rate)


def test_a_copy_from_before_an_option_gets_its_default(monkeypatch):
    """Whichever options an older pickle lacks, it trains on, and so does a param group that is added."""
    for make in (ProxSGD, ProxAdamW, Renamed):
        check_older_copies(monkeypatch, make)


def check_older_copies(monkeypatch, make):
    """Copies an optimizer without each of its options, and without any."""
    params = parameters()
    optimizer = make(params, 0.001)
    train(optimizer, params, range(2))
    state, keys = optimizer.__getstate__(), list(optimizer.defaults)
    for missing in ([], *([key] for key in keys), keys):

        def without(options, missing=missing):
            return {key: x for key, x in options.items() if key not in missing}

        older = {**state, "defaults": without(state["defaults"])}
        older["param_groups"] = list(map(without, state["param_groups"]))
        if missing == keys:
            del older["defaults"], older["_backend"]
        with monkeypatch.context() as patch:
            patch.setattr(make, "__getstate__", lambda self, older=older: older)
            again = copy.deepcopy(optimizer)
        assert again.defaults == optimizer.defaults
        assert without(again.param_groups[0], ["params"]) == without(optimizer.param_groups[0], ["params"])
        again.add_param_group({"params": parameters(seed=1)})
        train(again, [p for group in again.param_groups for p in group["params"]], [2])


# Hooks


def test_step_hooks(fastest_backend):
    """Hooks run before and after a step, until they are removed."""
    params = parameters()
    optimizer = ProxSGD(params, lr=0.1, backend=fastest_backend)
    seen = []

    def look(hooked, args, kwargs):
        assert hooked is optimizer
        seen.append(params[0].sum().item())

    handles = [optimizer.register_step_pre_hook(look), optimizer.register_step_post_hook(look)]
    before = params[0].sum().item()
    train(optimizer, params, range(1))
    assert seen == [before, params[0].sum().item()] and seen[0] != seen[1]
    for handle in handles:
        handle.remove()
    train(optimizer, params, range(1))
    assert len(seen) == 2


def test_state_dict_hooks(fastest_backend):
    """Hooks of state_dict and load_state_dict run in torch's order and may change the file."""
    optimizer = ProxSGD(parameters(), lr=0.1, l1=0.5, backend=fastest_backend)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "mine": 3})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: calls.append(("loading", state["mine"])))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(o.param_groups[0]["lr"]))
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.25
    optimizer.load_state_dict(state)
    assert calls == ["saving", ("loading", 3), 0.25]


def test_a_load_hook_may_convert_a_foreign_file(fastest_backend):
    """The hook sees what was saved; what it returns is completed like any other file."""
    groups, params = two_groups(l1=0.75)
    optimizer = ProxSGD(groups, lr=0.1, l1=0.5, backend=fastest_backend)
    foreign = [{"params": params[:3]}, {"params": params[3:]}, {"params": parameters()}]
    saved = SGD(foreign, lr=0.5).state_dict()
    seen = []

    def drop_the_third(o, state):
        seen.append(set(state["param_groups"][0]))
        return {**state, "param_groups": state["param_groups"][:2]}

    optimizer.register_load_state_dict_pre_hook(drop_the_third)
    optimizer.load_state_dict(saved)
    assert [(group["lr"], group["l1"]) for group in optimizer.param_groups] == [(0.5, 0.5), (0.5, 0.75)]
    assert seen == [set(saved["param_groups"][0])]
