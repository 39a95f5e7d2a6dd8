"""Checkpoints of other dtypes, devices and shapes, and those of torch.distributed.checkpoint."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.refusals import rejected
from helpers.right import DTYPES
from helpers.steps import PENALTY, assert_same_bits, everything, give_grads, parameters, through_a_file, train
from helpers.tiers import covering
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, AdamW

from cges_kernels import ProxAdamW, ProxSGD, available_backends, cges_param_groups

SHAPES = [(6, 5), (4, 3, 3, 3), (9,), ()]


def buffers(optimizer):
    """All momentum buffers."""
    return [state["momentum_buffer"] for state in optimizer.state.values()]


# Other dtypes, devices and shapes


@covering(saved=DTYPES, dtype=DTYPES, executor=available_backends())
def test_a_file_of_another_dtype_loads_as_in_torch(executor, saved, dtype):
    """Buffers take their parameter's dtype with one rounding, as in torch.optim.SGD."""
    first = parameters(SHAPES, saved)
    sgd = SGD(first, lr=0.125, momentum=0.875)
    train(sgd, first, range(2))
    loaded = []
    for make in (SGD, lambda ps, **kw: ProxSGD(ps, **kw, backend=executor)):
        params = parameters(SHAPES, dtype)
        optimizer = make(params, lr=0.1, momentum=0.9)
        optimizer.load_state_dict(copy.deepcopy(sgd.state_dict()))
        loaded.append(optimizer)
    assert_same_bits(*map(buffers, loaded))
    assert all(buf.dtype == dtype for buf in buffers(loaded[1]))
    train(loaded[1], params, [2])
    assert not torch.equal(buffers(loaded[0])[0], buffers(loaded[1])[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saving_and_copying_leave_the_buffers_their_dtype(fastest_backend, dtype):
    """Saving and deep-copying convert no buffer, even where the parameter's dtype has changed."""
    params = parameters(SHAPES, dtype)
    optimizer = ProxSGD(params, lr=0.1, momentum=0.9, backend=fastest_backend)
    train(optimizer, params, range(2))
    for p in params:
        p.data = p.data.to(torch.float32)
    held = through_a_file(optimizer.state_dict())["state"].values()
    assert {state["momentum_buffer"].dtype for state in held} == {dtype}
    assert {buf.dtype for buf in buffers(copy.deepcopy(optimizer))} == {dtype}


@pytest.mark.gpu
@pytest.mark.parametrize("there", ["cpu", "cuda"])
@pytest.mark.parametrize("here", ["cpu", "cuda"])
def test_a_file_moves_between_devices(there, here):
    """A file saved on one device loads on the other and trains on."""
    params, others = ([nn.Parameter(p.to(device)) for p in parameters(SHAPES)] for device in (there, here))
    optimizer, moved = (ProxSGD(ps, lr=0.1, momentum=0.9, **PENALTY) for ps in (params, others))
    train(optimizer, params, range(2))
    moved.load_state_dict(through_a_file(optimizer.state_dict()))
    assert {buf.device.type for buf in buffers(moved)} == {here}
    for p, q in zip(params, others):
        q.data.copy_(p)
    train(optimizer, params, range(2, 4))
    train(moved, others, range(2, 4))
    for p, q in zip(everything(optimizer), everything(moved)):
        torch.testing.assert_close(q, p, check_device=False, rtol=1e-12, atol=1e-12)


def half_way(backend):
    """An optimizer in the middle of training, with gradients, and its state_dict."""
    params = parameters(SHAPES)
    optimizer = ProxSGD(params, lr=0.1, momentum=0.9, **PENALTY, backend=backend)
    train(optimizer, params, range(2))
    give_grads(params, 2)
    return optimizer, copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("shape", [(5, 6), (30,), (6, 5, 1), (6, 4), ()], ids=str)
def test_a_file_of_another_shape_is_refused_before_anything_changes(fastest_backend, shape):
    """Even a shape that would broadcast is refused, and lr was not loaded either."""
    optimizer, state = half_way(fastest_backend)
    state["param_groups"][0]["lr"] = 0.5
    state["state"][0]["momentum_buffer"] = torch.randn(shape)
    words = (r"params'\]\[0\]", "momentum_buffer", r"expected.*shape \(6, 5\)")
    with rejected(optimizer, (ValueError, RuntimeError), *words):
        optimizer.load_state_dict(state)
    optimizer.step()


def test_a_file_without_values_is_refused_before_anything_changes(checked_backend):
    """Buffers on the meta device cannot be loaded, and nothing else was."""
    optimizer, state = half_way(checked_backend)
    state["param_groups"][0]["lr"] = 0.5
    state["state"][3]["momentum_buffer"] = torch.empty((), device="meta")
    with rejected(optimizer, NotImplementedError, "meta tensor"):
        optimizer.load_state_dict(state)
    optimizer.step()


# torch.distributed.checkpoint. Where there are no states yet, it makes them by a step with lr = 0 and zero
# gradients, both in the optimizer that is saved and in the one that is loaded.


def network():
    """A grouped convolution, a batch norm and a Linear."""
    torch.manual_seed(0)
    grouped, normed = nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)
    return nn.Sequential(grouped, normed, nn.ReLU(), nn.Flatten(), nn.Linear(24, 5))


def fit(model, optimizer, seeds, without=()):
    """Trains for a step on each seed's batch; parameters in ``without`` get no gradient."""
    for seed in seeds:
        x = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(seed), device="cpu")
        optimizer.zero_grad()
        model(x.to(model[0].weight)).square().mean().backward()
        for p in without:
            p.grad = None
        optimizer.step()


def sparse_sgd(model, backend, lam=0.3, **options):
    """A ProxSGD under the CGES penalty."""
    return ProxSGD(
        cges_param_groups(model, lam=lam), **{"lr": 0.1, "momentum": 0.9, **options}, backend=backend
    )


def sparse_adamw(model, backend, lam=0.3, **options):
    """A ProxAdamW under the CGES penalty."""
    return ProxAdamW(cges_param_groups(model, lam=lam), **{"lr": 0.02, **options}, backend=backend)


MAKERS = (sparse_sgd, sparse_adamw)


# Options under which a step with lr = 0 could change a parameter, or leave other buffers.
FIRST_STEP = [
    dict(),
    dict(momentum=0),
    dict(weight_decay=0.1, maximize=True, dampening=0.5),
    dict(lr=torch.tensor(0.1), prox_mode="exact"),
    dict(freeze_zeros="element"),
]


@pytest.mark.parametrize("options", FIRST_STEP, ids=str)
def test_the_step_that_makes_the_states_changes_no_parameter(checked_backend, options):
    """That step keeps every bit of the parameters, and leaves the states that torch's would have."""
    check_first_step(sparse_sgd, SGD, {"momentum": 0.9, **options}, checked_backend)
    options = {key: x for key, x in options.items() if key not in ("momentum", "dampening")}
    check_first_step(sparse_adamw, AdamW, options, checked_backend)


def check_first_step(make, torchs, options, backend):
    """Lets torch.distributed.checkpoint make the states of a network's optimizer, and of torch's."""
    model = network()
    with torch.no_grad():
        model[4].weight[:, ::3] = 0
        model[0].weight[1] = 0
    before = [p.detach().clone() for p in model.parameters()]
    options = {"lr": 0.1, **options}
    optimizer = make(model, backend, **options)
    state = get_optimizer_state_dict(model, optimizer)
    assert_same_bits(before, list(model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert all(group["lr"] == options["lr"] for group in optimizer.param_groups)

    of_torch = {k: v for k, v in options.items() if k not in ("prox_mode", "freeze_zeros")}
    wanted = get_optimizer_state_dict(model, torchs(model.parameters(), **of_torch, foreach=False))["state"]
    assert {name: set(entry) for name, entry in state["state"].items()} == {
        name: set(entry) for name, entry in wanted.items()
    }
    for name, entry in wanted.items():
        for key, value in entry.items():
            torch.testing.assert_close(state["state"][name][key], value, rtol=1e-6, atol=0)


WAYS = {
    "plain": None,
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}


@pytest.mark.filterwarnings("ignore:.*torch.distributed is")
@pytest.mark.parametrize("way", WAYS)
def test_a_distributed_checkpoint_restores_everything(checked_backend, way, tmp_path):
    """Training goes on with the same bits; the saved coefficients replace those of the constructor."""
    for make in MAKERS:
        model, resumed = network(), network()
        optimizer, other = make(model, checked_backend), make(resumed, checked_backend, lam=0.7)
        fit(model, optimizer, range(3))
        state = {
            "model": model.state_dict(),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=WAYS[way]),
        }
        dcp.save(state, checkpoint_id=tmp_path / make.__name__)

        state = {
            "model": resumed.state_dict(),
            "optimizer": get_optimizer_state_dict(resumed, other, options=WAYS[way]),
        }
        dcp.load(state, checkpoint_id=tmp_path / make.__name__)
        resumed.load_state_dict(state["model"])
        set_optimizer_state_dict(resumed, other, state["optimizer"], options=WAYS[way])
        for group, restored in zip(optimizer.param_groups, other.param_groups):
            assert restored["param_names"] == group["param_names"]
            assert restored["group_lasso"] == group["group_lasso"]
            spec = restored["group_by"]
            assert spec == group["group_by"] or tuple(spec) == group["group_by"]
        fit(model, optimizer, range(3, 6))
        fit(resumed, other, range(3, 6))
        assert_same_bits(everything(optimizer), everything(other))
        assert any((p == 0).any() and (p != 0).any() for p in model.parameters())


@pytest.mark.parametrize("make", MAKERS)
def test_parameters_that_have_not_begun_yet_begin_after_a_checkpoint(fastest_backend, make):
    """A layer without gradients so far has no state, in a plain file or torch.distributed.checkpoint's.

    In the resumed training it joins with the bits of the training that went on. One that joins in a new param
    group does so as well.
    """
    model = network()
    optimizer = make(model, fastest_backend)
    fit(model, optimizer, range(2), without=list(model[4].parameters()))
    partial = StateDictOptions(strict=False)  # torch refuses a missing state otherwise
    trained, plain = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    named = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=partial))
    for state in (plain, named):
        assert sum(map(bool, state["state"].values())) == len(list(model.parameters())) - 2
    late = parameters([(3, 4)], torch.float32)
    optimizer.add_param_group({"params": [("late", *late)], "l1": 0.1})
    fit(model, optimizer, range(2, 4))
    train(optimizer, late, [0])
    for way in ("plain", "named"):
        resumed = network()
        resumed.load_state_dict(trained)
        other = make(resumed, fastest_backend, lam=0.7)
        if way == "plain":
            other.load_state_dict(plain)
        else:
            set_optimizer_state_dict(resumed, other, named, options=partial)
        joined = parameters([(3, 4)], torch.float32)
        other.add_param_group({"params": [("late", *joined)], "l1": 0.1})
        fit(resumed, other, range(2, 4))
        train(other, joined, [0])
        assert_same_bits(everything(other), everything(optimizer))
    if make is sparse_adamw:
        counts = {float(entry["step"]) for entry in optimizer.state.values()}
        assert counts == {1.0, 3.0, 5.0}


@pytest.mark.filterwarnings("ignore:.*torch.distributed is")
def test_a_distributed_checkpoint_of_torch_sgd_goes_on_here(checked_backend, tmp_path):
    """Such a file has no penalties; a partial load keeps the constructed ones."""
    model, resumed = network(), network()
    sgd = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    fit(model, sgd, range(3))
    dcp.save({"optimizer": get_optimizer_state_dict(model, sgd)}, checkpoint_id=tmp_path)
    resumed.load_state_dict(model.state_dict())
    optimizer = ProxSGD(resumed.parameters(), lr=7.0, momentum=0.9, l1=0.5, backend=checked_backend)
    state = {"optimizer": get_optimizer_state_dict(resumed, optimizer)}
    dcp.load(state, checkpoint_id=tmp_path, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_optimizer_state_dict(resumed, optimizer, state["optimizer"])
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["l1"]) == (0.1, 0.01, 0.5)
    group["l1"], sgd.param_groups[0]["foreach"] = 0.0, False
    fit(model, sgd, range(3, 6))
    fit(resumed, optimizer, range(3, 6))
    for p, q in zip(everything(sgd), everything(optimizer)):
        torch.testing.assert_close(q, p)


@pytest.mark.parametrize("flat", [False, True])
def test_a_distributed_state_dict_of_another_order_goes_by_name(flat):
    """Buffers go by name, although torch reorders them before load_state_dict."""

    class Pair(nn.Module):
        def __init__(self, order):
            super().__init__()
            for name in order:
                setattr(self, name, nn.Linear(2, 2, bias=False))

    def built(order):
        model = Pair(order)
        groups = [{"params": [(f"{n}.weight", model.get_submodule(n).weight) for n in order]}]
        return model, ProxSGD(groups, lr=0.1, momentum=0.9, l1=1e-4)

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = built("ab")
    for value, name in enumerate("ab", 1):
        weight = model.get_submodule(name).weight
        weight.grad = torch.full_like(weight, value)
    optimizer.step()
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    model, optimizer = built("ba")
    set_optimizer_state_dict(model, optimizer, saved, options=options)
    for value, name in enumerate("ab", 1):
        assert (optimizer.state[model.get_submodule(name).weight]["momentum_buffer"] == value).all()
    assert optimizer.param_groups[0]["param_names"] == ["b.weight", "a.weight"]
