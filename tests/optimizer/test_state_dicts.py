"""State dicts in plain files: from and to torch.optim.SGD, and matched by the parameters' names."""

import pytest
import torch
from helpers.steps import (
    PENALTY,
    assert_as_near_as,
    assert_same_bits,
    copy_values,
    everything,
    parameters,
    through_a_file,
    train,
    two_groups,
)
from torch import nn
from torch.optim import SGD

from cges_kernels import ProxSGD


@pytest.mark.parametrize("options", [dict(), dict(momentum=0.9), dict(momentum=0.9, nesterov=True)], ids=str)
def test_training_begun_with_torch_sgd_goes_on_here(checked_backend, options):
    """A file of torch.optim.SGD loads, and training goes on as with torch."""
    groups, params = two_groups()
    sgd = SGD(groups, lr=0.1, weight_decay=0.01, **options)
    train(sgd, params, range(3))
    groups, others = two_groups()
    optimizer = ProxSGD(groups, lr=7.0, backend=checked_backend)
    copy_values(others, params)
    optimizer.load_state_dict(through_a_file(sgd.state_dict()))
    sgd.param_groups[0]["foreach"] = sgd.param_groups[1]["foreach"] = False
    train(optimizer, others, range(3, 6))
    train(sgd, params, range(3, 6))
    assert_as_near_as(checked_backend, everything(optimizer), everything(sgd))


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_a_file_of_torch_sgd_leaves_the_coefficients_alone(checked_backend, momentum):
    """Each param group keeps its own coefficients, and the next step uses them."""
    groups, params = two_groups()
    sgd = SGD(groups, lr=0.1, momentum=momentum)
    train(sgd, params, range(2))
    mine = [
        dict(group_lasso=0.25, exclusive_lasso=0.001, l1=0.01, group_by="filter", prox_mode="exact"),
        dict(group_lasso=0.5, exclusive_lasso=0.002, l1=0.02, group_by="channel", freeze_zeros="group"),
    ]
    groups, others = two_groups()
    optimizer = ProxSGD([{**g, **m} for g, m in zip(groups, mine)], backend=checked_backend)
    train(optimizer, others, range(1))  # so that there is a plan already
    copy_values(others, params)
    optimizer.load_state_dict(through_a_file(sgd.state_dict()))
    for group, m, lr in zip(optimizer.param_groups, mine, (0.1, 0.05)):
        assert {key: group[key] for key in m} == m
        assert (group["lr"], group["momentum"]) == (lr, momentum)

    groups, twins = two_groups()
    twin = ProxSGD(
        [{**g, **m} for g, m in zip(groups, mine)], lr=0.1, momentum=momentum, backend=checked_backend
    )
    copy_values(twins, params)
    for p, q in zip(twins, params):
        if momentum:
            twin.state[p]["momentum_buffer"] = sgd.state[q]["momentum_buffer"].clone()
    train(optimizer, others, range(2, 4))
    train(twin, twins, range(2, 4))
    assert_same_bits(everything(optimizer), everything(twin))


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_training_begun_here_goes_on_with_torch_sgd(checked_backend, momentum):
    """A file of ours loads into torch.optim.SGD, and training goes on as with ours without penalties."""
    groups, params = two_groups()
    optimizer = ProxSGD(groups, lr=0.1, momentum=momentum, **PENALTY, backend=checked_backend)
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
    assert_as_near_as(checked_backend, everything(optimizer), everything(sgd))


def test_a_checkpoint_restores_everything(checked_backend):
    """Options, coefficients and momentum come back, and training goes on with the same bits."""
    groups, params = two_groups(group_lasso=0.5, freeze_zeros="group", prox_mode="sequential")
    options = dict(
        lr=0.1, momentum=0.9, **PENALTY, group_by="channel", prox_mode="exact", backend=checked_backend
    )
    optimizer = ProxSGD(groups, **options)
    train(optimizer, params, range(3))
    state = through_a_file(optimizer.state_dict())
    groups, others = two_groups()
    resumed = ProxSGD(groups, backend=checked_backend)
    train(resumed, others, range(1))  # so that there is a plan already
    copy_values(others, params)
    resumed.load_state_dict(state)
    for one, other in zip(optimizer.param_groups, resumed.param_groups):
        assert {**one, "params": None} == {**other, "params": None}
    train(optimizer, params, range(3, 6))
    train(resumed, others, range(3, 6))
    assert_same_bits(everything(optimizer), everything(resumed))


def test_tuples_and_tensors_survive_a_file(checked_backend):
    """Tuples and a tensor lr pass through torch.load(weights_only=True)."""
    p = nn.Parameter(torch.randn(6, 4))
    optimizer = ProxSGD([p], group_by=(1,), view=(2, 3, 4), lr=torch.tensor(0.5), backend=checked_backend)
    state = through_a_file(optimizer.state_dict())
    group = state["param_groups"][0]
    assert (group["group_by"], group["view"], group["lr"]) == ((1,), (2, 3, 4), torch.tensor(0.5))
    optimizer.load_state_dict(state)
    p.grad = torch.zeros_like(p)
    optimizer.step()


def test_no_state_dict_holds_the_backend(fastest_backend):
    """A file can be loaded where another executor serves."""
    optimizer = ProxSGD(parameters(), backend=fastest_backend)
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert "backend" not in state["param_groups"][0] and "backend" not in optimizer.defaults
    assert fastest_backend not in state["param_groups"][0].values()


@pytest.mark.parametrize("saved", [1, 3])
def test_another_number_of_param_groups_is_an_error(fastest_backend, saved):
    """The error names both numbers, and nothing was loaded."""
    groups, params = two_groups()
    optimizer = ProxSGD(groups, lr=0.1, momentum=0.9, backend=fastest_backend)
    train(optimizer, params, range(2))
    before = everything(optimizer)
    other = SGD([{"params": parameters()} for _ in range(saved)], lr=0.5)
    with pytest.raises(ValueError, match=rf"expected 2 param groups.*got {saved}"):
        optimizer.load_state_dict(other.state_dict())
    assert_same_bits(before, everything(optimizer))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05]


def test_another_number_of_parameters_is_an_error(fastest_backend):
    """torch's own check for sizes is in force."""
    groups, _ = two_groups()
    optimizer = ProxSGD(groups, backend=fastest_backend)
    other = SGD([{"params": parameters()}, {"params": parameters()}])
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(other.state_dict())


# Matched by name


def named_optimizer(params, names, **options):
    """An optimizer of parameters with these names."""
    return ProxSGD(list(zip(names, params)), lr=0.1, momentum=0.9, l1=0.01, **options)


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.module.", "block._checkpoint_wrapped_module."])
def test_state_goes_by_name_in_whatever_order(fastest_backend, wrapper):
    """Momentum goes to the parameter of its name, in whatever order.

    DDP, torch.compile or a checkpoint wrapper may have put a prefix before the saved names.
    """
    names = [f"{'block.' if 'block' in wrapper else ''}{name}" for name in "abc"]
    saved = [f"{wrapper}{name}" for name in "abc"]
    params = [
        nn.Parameter(torch.randn(3, 4, dtype=dtype))
        for dtype in (torch.float32, torch.float64, torch.float32)
    ]
    first = named_optimizer(params, saved, backend=fastest_backend)
    train(first, params, range(2))
    order = [2, 0, 1]
    second = named_optimizer([params[i] for i in order], [names[i] for i in order], backend=fastest_backend)
    second.load_state_dict(through_a_file(first.state_dict()))
    for p in params:
        assert_same_bits([second.state[p]["momentum_buffer"]], [first.state[p]["momentum_buffer"]])
        assert second.state[p]["momentum_buffer"].dtype == p.dtype
    assert second.param_groups[0]["param_names"] == [names[i] for i in order]


def test_names_that_are_not_ours_are_refused(fastest_backend):
    """Other names are an error that lists both; a file without names goes by order."""
    params = parameters()[:2]
    first, second = (
        named_optimizer(params, names, backend=fastest_backend) for names in (["a", "b"], ["a", "c"])
    )
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


def test_names_that_differ_by_a_wrapper_alone_are_told_apart(fastest_backend):
    """ "module.a" and "a" in one model are two parameters."""
    params = [nn.Parameter(torch.randn(3, 4)) for _ in range(2)]
    first = named_optimizer(params, ["module.a", "a"], backend=fastest_backend)
    train(first, params, range(1))
    second = named_optimizer(params[::-1], ["a", "module.a"], backend=fastest_backend)
    second.load_state_dict(first.state_dict())
    for p in params:
        assert_same_bits([second.state[p]["momentum_buffer"]], [first.state[p]["momentum_buffer"]])


def test_names_that_stand_twice_are_refused(fastest_backend):
    """Names that are not unique cannot be matched, and nothing was loaded."""
    params = [nn.Parameter(torch.randn(3, 4)) for _ in range(3)]
    first, second = (named_optimizer(params, "abc", backend=fastest_backend) for _ in range(2))
    train(first, params, range(1))
    state = first.state_dict()
    state["param_groups"][0]["param_names"] = ["a", "c", "c"]
    second.param_groups[0]["param_names"] = ["c", "a", "c"]
    with pytest.raises(ValueError, match=r"to hold \['c', 'a', 'c'\] in some order"):
        second.load_state_dict(state)
    assert not second.state


def test_a_hook_may_give_the_names(fastest_backend):
    """A load hook that renames parameters runs before names are compared."""
    params = [nn.Parameter(torch.randn(3, 4)) for _ in range(2)]
    first = named_optimizer(params, ["x", "y"], backend=fastest_backend)
    train(first, params, range(1))
    second = named_optimizer(params[::-1], ["b", "a"], backend=fastest_backend)

    def rename(optimizer, state):
        groups = [{**group, "param_names": ["a", "b"]} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    second.register_load_state_dict_pre_hook(rename)
    for _ in range(2):
        second.load_state_dict(first.state_dict())
        for p in params:
            assert_same_bits([second.state[p]["momentum_buffer"]], [first.state[p]["momentum_buffer"]])
