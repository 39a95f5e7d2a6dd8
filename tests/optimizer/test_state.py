"""What an optimizer keeps between steps: momentum, checkpoints, copies, hooks, and frozen zeros."""

import copy
import io
import pickle

import pytest
import torch
from helpers.right import as_large_as_may_be
from helpers.steps import (
    PENALTY,
    assert_as_near_as,
    assert_same_bits,
    bits,
    everything,
    give_grads,
    parameters,
    train,
)
from torch import nn
from torch.optim import SGD

from cges_kernels import ProxSGD


def two_groups(**second):
    """Param groups of fresh parameters, and these parameters in one list."""
    params = parameters()
    return [{"params": params[:3]}, {"params": params[3:], "lr": 0.05, **second}], params


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copy_values(to, source):
    with torch.no_grad():
        for p, q in zip(to, source):
            p.copy_(q)


# Momentum


def test_first_buffer_is_the_gradient_without_dampening(backend):
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


def test_state_holds_what_torch_sgd_holds(backend):
    for momentum in (0, 0.9):
        params, others = parameters(), parameters()
        optimizer = ProxSGD(params, lr=0.1, momentum=momentum, backend=backend)
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
    p = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    p.grad = torch.randn(4, 3, 2, 2)
    optimizer = ProxSGD([p], lr=0.1, momentum=0.9, backend=backend)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], p.grad)
    if backend != "reference":  # which keeps the layout of the gradient, as torch.optim.SGD does
        assert optimizer.state[p]["momentum_buffer"].stride() == p.stride()


def test_float32_buffer_after_the_model_became_float64(backend):
    """As with torch: unfused goes on with the old buffer, fused refuses, and loading converts it."""

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


# Checkpoints


@pytest.mark.parametrize("options", [dict(), dict(momentum=0.9), dict(momentum=0.9, nesterov=True)], ids=str)
def test_training_begun_with_torch_sgd_goes_on_here(backend, options):
    groups, params = two_groups()
    sgd = SGD(groups, lr=0.1, weight_decay=0.01, **options)
    train(sgd, params, range(3))
    groups, others = two_groups()
    optimizer = ProxSGD(groups, lr=7.0, backend=backend)
    copy_values(others, params)
    optimizer.load_state_dict(through_a_file(sgd.state_dict()))
    sgd.param_groups[0]["foreach"] = sgd.param_groups[1]["foreach"] = False
    train(optimizer, others, range(3, 6))
    train(sgd, params, range(3, 6))
    assert_as_near_as(backend, everything(optimizer), everything(sgd))


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_a_file_of_torch_sgd_leaves_the_coefficients_alone(backend, momentum):
    """Each param group keeps its own, and the next step uses them."""
    groups, params = two_groups()
    sgd = SGD(groups, lr=0.1, momentum=momentum)
    train(sgd, params, range(2))
    mine = [
        dict(group_lasso=0.25, exclusive_lasso=0.001, l1=0.01, group_by="filter", prox_mode="exact"),
        dict(group_lasso=0.5, exclusive_lasso=0.002, l1=0.02, group_by="channel", freeze_zeros="group"),
    ]
    groups, others = two_groups()
    optimizer = ProxSGD([{**g, **m} for g, m in zip(groups, mine)], backend=backend)
    train(optimizer, others, range(1))  # there is a plan already
    copy_values(others, params)
    optimizer.load_state_dict(through_a_file(sgd.state_dict()))
    for group, m, lr in zip(optimizer.param_groups, mine, (0.1, 0.05)):
        assert {key: group[key] for key in m} == m
        assert (group["lr"], group["momentum"]) == (lr, momentum)

    groups, twins = two_groups()
    twin = ProxSGD([{**g, **m} for g, m in zip(groups, mine)], lr=0.1, momentum=momentum, backend=backend)
    copy_values(twins, params)
    for p, q in zip(twins, params):
        if momentum:
            twin.state[p]["momentum_buffer"] = sgd.state[q]["momentum_buffer"].clone()
    train(optimizer, others, range(2, 4))
    train(twin, twins, range(2, 4))
    assert_same_bits(everything(optimizer), everything(twin))


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_training_begun_here_goes_on_with_torch_sgd(backend, momentum):
    groups, params = two_groups()
    optimizer = ProxSGD(groups, lr=0.1, momentum=momentum, **PENALTY, backend=backend)
    train(optimizer, params, range(3))
    groups, others = two_groups()
    sgd = SGD(groups, lr=7.0)
    copy_values(others, params)
    sgd.load_state_dict(through_a_file(optimizer.state_dict()))
    for group in optimizer.param_groups:
        group.update(dict.fromkeys(PENALTY, 0.0))
    for group in sgd.param_groups:
        group["foreach"] = False
    train(optimizer, params, range(3, 6))
    train(sgd, others, range(3, 6))
    assert_as_near_as(backend, everything(optimizer), everything(sgd))


def test_a_checkpoint_restores_everything(backend):
    groups, params = two_groups(group_lasso=0.5, freeze_zeros="group", prox_mode="sequential")
    options = dict(lr=0.1, momentum=0.9, **PENALTY, group_by="channel", prox_mode="exact", backend=backend)
    optimizer = ProxSGD(groups, **options)
    train(optimizer, params, range(3))
    state = through_a_file(optimizer.state_dict())
    groups, others = two_groups()
    resumed = ProxSGD(groups, backend=backend)
    train(resumed, others, range(1))  # there is a plan already
    copy_values(others, params)
    resumed.load_state_dict(state)
    for one, other in zip(optimizer.param_groups, resumed.param_groups):
        assert {**one, "params": None} == {**other, "params": None}
    train(optimizer, params, range(3, 6))
    train(resumed, others, range(3, 6))
    assert_same_bits(everything(optimizer), everything(resumed))


def test_tuples_and_tensors_survive_a_file(backend):
    p = nn.Parameter(torch.randn(6, 4))
    optimizer = ProxSGD([p], group_by=(1,), view=(2, 3, 4), lr=torch.tensor(0.5), backend=backend)
    state = through_a_file(optimizer.state_dict())
    group = state["param_groups"][0]
    assert (group["group_by"], group["view"], group["lr"]) == ((1,), (2, 3, 4), torch.tensor(0.5))
    optimizer.load_state_dict(state)
    p.grad = torch.zeros_like(p)
    optimizer.step()


def test_no_state_dict_holds_the_backend(backend):
    optimizer = ProxSGD(parameters(), backend=backend)
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert "backend" not in state["param_groups"][0] and "backend" not in optimizer.defaults
    assert backend not in state["param_groups"][0].values()


@pytest.mark.parametrize("saved", [1, 3])
def test_another_number_of_param_groups_is_an_error(backend, saved):
    groups, params = two_groups()
    optimizer = ProxSGD(groups, lr=0.1, momentum=0.9, backend=backend)
    train(optimizer, params, range(2))
    before = everything(optimizer)
    other = SGD([{"params": parameters()} for _ in range(saved)], lr=0.5)
    with pytest.raises(ValueError, match=rf"expected 2 param groups.*got {saved}"):
        optimizer.load_state_dict(other.state_dict())
    assert_same_bits(before, everything(optimizer))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05]


def test_another_number_of_parameters_is_an_error(backend):
    groups, _ = two_groups()
    optimizer = ProxSGD(groups, backend=backend)
    other = SGD([{"params": parameters()}, {"params": parameters()}])
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(other.state_dict())


# Copies


def by_pickle(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_copy_trains_on_by_itself(backend, duplicate, steps_before):
    groups, params = two_groups(l1=0.5)
    optimizer = ProxSGD(groups, lr=0.1, momentum=0.9, **PENALTY, backend=backend)
    train(optimizer, params, range(steps_before))
    before = everything(optimizer)
    twin = duplicate(optimizer)
    twins = [p for group in twin.param_groups for p in group["params"]]
    assert not {id(p) for p in twins} & {id(p) for p in params}
    train(twin, twins, range(3, 6))
    assert twin._planner.executors == [backend] * 2
    assert_same_bits(before, everything(optimizer))
    train(optimizer, params, range(3, 6))
    assert_same_bits(everything(optimizer), everything(twin))


# Hooks


def test_step_hooks(backend):
    params = parameters()
    optimizer = ProxSGD(params, lr=0.1, backend=backend)
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


def test_state_dict_hooks(backend):
    optimizer = ProxSGD(parameters(), lr=0.1, l1=0.5, backend=backend)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "mine": 3})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: calls.append(("loading", state["mine"])))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(o.param_groups[0]["lr"]))
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.25
    optimizer.load_state_dict(state)
    assert calls == ["saving", ("loading", 3), 0.25]


def test_a_load_hook_may_convert_a_foreign_file(backend):
    """The hook sees what was saved; what it returns is completed as any other file is."""
    groups, params = two_groups(l1=0.75)
    optimizer = ProxSGD(groups, lr=0.1, l1=0.5, backend=backend)
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


# By name


def named_optimizer(params, names, **options):
    return ProxSGD(list(zip(names, params)), lr=0.1, momentum=0.9, l1=0.01, **options)


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.module.", "block._checkpoint_wrapped_module."])
def test_state_goes_by_name_in_whatever_order(backend, wrapper):
    names = [f"{'block.' if 'block' in wrapper else ''}{name}" for name in "abc"]
    saved = [f"{wrapper}{name}" for name in "abc"]
    params = [
        nn.Parameter(torch.randn(3, 4, dtype=dtype))
        for dtype in (torch.float32, torch.float64, torch.float32)
    ]
    first = named_optimizer(params, saved, backend=backend)
    train(first, params, range(2))
    order = [2, 0, 1]
    second = named_optimizer([params[i] for i in order], [names[i] for i in order], backend=backend)
    second.load_state_dict(through_a_file(first.state_dict()))
    for p in params:
        assert_same_bits([second.state[p]["momentum_buffer"]], [first.state[p]["momentum_buffer"]])
        assert second.state[p]["momentum_buffer"].dtype == p.dtype
    assert second.param_groups[0]["param_names"] == [names[i] for i in order]


def test_names_that_are_not_ours_are_refused(backend):
    params = parameters()[:2]
    first, second = (named_optimizer(params, names, backend=backend) for names in (["a", "b"], ["a", "c"]))
    train(first, params, range(1))
    state = first.state_dict()
    with pytest.raises(
        ValueError, match=r"expected param_groups\[0\].*\['a', 'c'\] in some order, got \['a', 'b'\]"
    ):
        second.load_state_dict(state)
    assert not second.state
    del state["param_groups"][0]["param_names"]
    second.load_state_dict(state)
    assert len(second.state) == 2


def test_names_that_differ_by_a_wrapper_alone_are_told_apart(backend):
    params = [nn.Parameter(torch.randn(3, 4)) for _ in range(2)]
    first = named_optimizer(params, ["module.a", "a"], backend=backend)
    train(first, params, range(1))
    second = named_optimizer(params[::-1], ["a", "module.a"], backend=backend)
    second.load_state_dict(first.state_dict())
    for p in params:
        assert_same_bits([second.state[p]["momentum_buffer"]], [first.state[p]["momentum_buffer"]])


def test_names_that_stand_twice_are_refused(backend):
    params = [nn.Parameter(torch.randn(3, 4)) for _ in range(3)]
    first, second = (named_optimizer(params, "abc", backend=backend) for _ in range(2))
    train(first, params, range(1))
    state = first.state_dict()
    state["param_groups"][0]["param_names"] = ["a", "c", "c"]
    second.param_groups[0]["param_names"] = ["c", "a", "c"]
    with pytest.raises(ValueError, match=r"to hold \['c', 'a', 'c'\] in some order"):
        second.load_state_dict(state)
    assert not second.state


def test_a_hook_may_give_the_names(backend):
    """It runs before names are compared."""
    params = [nn.Parameter(torch.randn(3, 4)) for _ in range(2)]
    first = named_optimizer(params, ["x", "y"], backend=backend)
    train(first, params, range(1))
    second = named_optimizer(params[::-1], ["b", "a"], backend=backend)

    def rename(optimizer, state):
        groups = [{**group, "param_names": ["a", "b"]} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    second.register_load_state_dict_pre_hook(rename)
    for _ in range(2):
        second.load_state_dict(first.state_dict())
        for p in params:
            assert_same_bits([second.state[p]["momentum_buffer"]], [first.state[p]["momentum_buffer"]])


# Frozen zeros

FREEZE_SHAPES = [(6, 5), (130, 70), (4, 3, 3, 3), (9,)]
LARGE = [("filter", [(2, 600_000)]), ("feature", [(40_000, 16)])]  # groups that fit no cache
FREEZE_CASES = [(group_by, FREEZE_SHAPES) for group_by in ("feature", "filter", "channel")]
FREEZE_CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in LARGE]


def partly_zero(shapes, dtype):
    """Parameters some of whose elements, and some of whose groups under the spec, are 0 (of either sign)."""
    params = parameters(shapes, dtype)
    for p in params:
        p.data.view(-1)[::3] = 0.0
        p.data.view(-1)[1::6] = -0.0
        if p.dim() >= 2:
            p.data[:, :1] = 0.0  # whole groups of "feature" and "channel"
            p.data[-1:] = -0.0  # and of "filter"
    return params


def frozen_entries(w, mode, group_by):
    """What the mode freezes, written naively."""
    if mode == "element":
        return w == 0
    if w.dim() < 2:
        return torch.zeros_like(w, dtype=torch.bool)
    dims = {"feature": [0], "filter": list(range(1, w.dim())), "channel": [0, *range(2, w.dim())]}[group_by]
    return (w.abs().amax(dims, keepdim=True) == 0).expand_as(w)


@pytest.mark.filterwarnings("ignore:.*sequential mode zeroes")
@pytest.mark.parametrize(("group_by", "shapes"), FREEZE_CASES)
@pytest.mark.parametrize("mode", ["element", "group"])
@pytest.mark.parametrize(
    "penalty", [{}, PENALTY, dict(PENALTY, prox_mode="exact")], ids=["none", "seq", "exact"]
)
def test_frozen_zeros_stay_zero_and_lose_their_momentum(backend, group_by, shapes, mode, penalty):
    """Within the same step, also where the frozen element's gradient is NaN; the rest is as without."""
    shapes = [as_large_as_may_be(backend, shape) for shape in shapes]
    params, free = (partly_zero(shapes, torch.float32) for _ in range(2))
    options = dict(lr=0.1, momentum=0.9, group_by=group_by, backend=backend)
    optimizer = ProxSGD(params, freeze_zeros=mode, **options, **penalty)
    unfrozen = ProxSGD(free, **options)
    frozen = [frozen_entries(p.detach(), mode, group_by) for p in params]
    assert any(f.any() and not f.all() for f in frozen)
    for p, q in zip(params, free):
        optimizer.state[p]["momentum_buffer"] = torch.ones_like(p)
        unfrozen.state[q]["momentum_buffer"] = torch.ones_like(q)
    for step in range(2):
        give_grads(params, step)
        give_grads(free, step)
        for p, f in zip(params, frozen):
            p.grad[f] = float("nan")
        optimizer.step()
        unfrozen.step()
        for p, q, f in zip(params, free, frozen):
            buf = optimizer.state[p]["momentum_buffer"]
            assert not bits(p)[f].any() and not bits(buf)[f].any()  # +0.0
            assert not torch.isnan(p).any() and not torch.isnan(buf).any()
            if not penalty:
                assert torch.equal(p[~f], q[~f])
                assert torch.equal(buf[~f], unfrozen.state[q]["momentum_buffer"][~f])


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_frozen_zeros_at_the_first_step(backend, momentum, nesterov):
    if nesterov and not momentum:
        pytest.skip("nesterov needs momentum")
    params = partly_zero(FREEZE_SHAPES, torch.float64)
    frozen = [p.detach() == 0 for p in params]
    options = dict(momentum=momentum, nesterov=nesterov, weight_decay=0.1, backend=backend)
    optimizer = ProxSGD(params, lr=0.1, freeze_zeros="element", **options)
    train(optimizer, params, range(2))
    for p, f in zip(params, frozen):
        assert not bits(p)[f].any() and (p[~f] != 0).all()
        assert not momentum or not bits(optimizer.state[p]["momentum_buffer"])[f].any()
