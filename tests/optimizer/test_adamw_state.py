"""ProxAdamW's states and counts of steps: names, overflows, files, copies, and counting on the GPU."""

import copy
import pickle

import pytest
import torch
from helpers.right import device_of
from helpers.steps import (
    PENALTY,
    assert_as_near_as,
    assert_same_bits,
    copy_values,
    everything,
    give_grads,
    parameters,
    started_adamw,
    through_a_file,
    train,
)
from helpers.tiers import covering, each_value, fused_backends
from torch import nn
from torch.optim import Adam, AdamW

from cges_kernels import ProxAdamW, available_backends, explain, prune_to_density


def test_state_is_named_and_placed_as_torchs(checked_backend):
    """The state has torch's keys, shapes, strides and dtypes, with the step on the CPU."""
    optimizer, params = started_adamw(checked_backend)
    for p in params:
        entry = optimizer.state[p]
        assert list(entry) == ["step", "exp_avg", "exp_avg_sq"]
        assert entry["step"].shape == () and float(entry["step"]) == 3 and entry["step"].is_cpu
        assert entry["step"].dtype == torch.float32
        for key in ("exp_avg", "exp_avg_sq"):
            assert entry[key].shape == p.shape and entry[key].stride() == p.stride()


def test_parameters_that_join_late_have_their_own_corrections(backend):
    """Each parameter counts its own steps, also one whose gradient comes late."""
    params, twins = parameters(), parameters()
    optimizer = ProxAdamW(params, lr=0.1, backend=backend)
    alone = [ProxAdamW([p], lr=0.1, backend="reference") for p in twins]
    for step in range(6):
        give_grads(params, step, twins)
        for i, (p, q) in enumerate(zip(params, twins)):
            if step < i:
                p.grad = q.grad = None
        optimizer.step()
        for each in alone:
            each.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [6.0 - i for i in range(len(params))]
    twins_state = [each.state[q] for each, q in zip(alone, twins)]
    assert_as_near_as(backend, params, twins)
    for key in ("exp_avg", "exp_avg_sq"):
        mine = [optimizer.state[p][key] for p in params]
        assert_as_near_as(backend, mine, [entry[key] for entry in twins_state])


@pytest.mark.parametrize("make", [AdamW, Adam])
def test_training_begun_with_torch_goes_on_here_and_back(checked_backend, make):
    """A file of torch's AdamW or Adam loads, training goes on as with torch, and the file goes back."""
    params = parameters()
    theirs = make(params, lr=0.02, weight_decay=0.1, foreach=False)
    train(theirs, params, range(3))
    others = parameters()
    ours = ProxAdamW(others, lr=7.0, l1=0.5, backend=checked_backend)
    copy_values(others, params)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    group = ours.param_groups[0]
    assert group["l1"] == 0.5 and group["decoupled_weight_decay"] is (make is AdamW) and group["lr"] == 0.02
    group["l1"] = 0.0
    train(ours, others, range(3, 6))
    train(theirs, params, range(3, 6))
    assert_as_near_as(checked_backend, everything(ours), everything(theirs))
    back = make(parameters(), lr=1.0)
    back.load_state_dict(through_a_file(ours.state_dict()))
    assert [float(entry["step"]) for entry in back.state.values()] == [6.0] * len(params)


def test_a_step_that_is_a_number_loads_as_torchs_does(fastest_backend):
    """A file of an old version of torch, with the step as a plain number, loads."""
    optimizer, params = started_adamw(fastest_backend)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] = 3
    optimizer.load_state_dict(state)
    assert all(torch.equal(optimizer.state[p]["step"], torch.tensor(3.0)) for p in params)
    train(optimizer, params, [3])
    assert float(optimizer.state[params[0]]["step"]) == 4


def test_copies_and_pickles_go_on_as_the_original(checked_backend):
    """A deep copy and an unpickled optimizer take the next step with the same bits."""
    optimizer, params = started_adamw(checked_backend)
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        theirs = again.param_groups[0]["params"]
        for p, q in zip(params, theirs):
            p.data.copy_(q)  # the first round has moved the originals on
        state = copy.deepcopy(optimizer.state_dict())
        train(again, theirs, [3])
        train(optimizer, params, [3])
        assert_same_bits(everything(again), everything(optimizer))
        optimizer.load_state_dict(state)


def test_the_default_dtype_is_that_of_the_count(fastest_backend):
    """Under another default dtype the step has that dtype, as in torch."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        optimizer, params = started_adamw(fastest_backend)
        assert optimizer.state[params[0]]["step"].dtype == torch.float64
        assert float(optimizer.state[params[0]]["step"]) == 3
    finally:
        torch.set_default_dtype(before)


def test_versions_move_on(checked_backend):
    """A step bumps the versions of the parameter and of all its states, and keeps the state's tensors."""
    optimizer, params = started_adamw(checked_backend)
    kept = [params[0], *optimizer.state[params[0]].values()]
    before = [x._version for x in kept]
    train(optimizer, params, [3])
    assert all(x._version > version for x, version in zip(kept, before))
    assert all(x is y for x, y in zip(kept[1:], optimizer.state[params[0]].values()))


# Overflow


@covering(first=[True, False], fused=[True, None], executor=fused_backends())
def test_a_step_that_overflows_does_not_count(executor, first, fused):
    """A step with found_inf set changes no weight, no state and no count."""
    params = parameters(dtype=torch.float32)
    optimizer = ProxAdamW(params, lr=0.1, **PENALTY, backend=executor, fused=fused)
    if not first:
        train(optimizer, params, range(2))
    before = copy.deepcopy([list(params), [dict(x) for x in optimizer.state.values()]])
    give_grads(params, 2)
    params[1].grad.view(-1)[0] = float("inf")
    optimizer.grad_scale = torch.full((1,), 4.0)
    optimizer.found_inf = torch.ones(1)
    optimizer.step()
    assert_same_bits(params, before[0])
    assert len(before[1]) == (0 if first else len(params))
    assert first == (not any(optimizer.state.values()))
    for entry, was in zip(optimizer.state.values(), before[1]):
        assert_same_bits(list(entry.values()), list(was.values()))
    optimizer.found_inf.zero_()
    optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == (1 if first else 3)


@each_value(executor=fused_backends(), fused=[True, None])
def test_a_scaler_and_a_plain_run_agree(executor, fused):
    """Training under a GradScaler, with overflows, gives the bits of training without."""
    params, twins = (parameters(dtype=torch.float32) for _ in range(2))
    ours = ProxAdamW(params, lr=0.1, **PENALTY, backend=executor, fused=fused)
    plain = ProxAdamW(twins, lr=0.1, **PENALTY, backend=executor, fused=fused)
    scaler = torch.amp.GradScaler(device_of(executor), init_scale=1024.0)
    for step in range(5):
        give_grads(params, step, twins)
        overflows = step in (0, 3)
        for p in params:
            p.grad *= scaler.get_scale() if step else 1024.0
        if overflows:
            params[0].grad[0, 0] = float("inf")
        else:
            plain.step()
        scaler.scale(torch.zeros(()))  # makes the scaler create its scale
        scaler.step(ours)
        scaler.update()
    assert_same_bits(everything(ours), everything(plain))


# Functions that take an optimizer


def test_explain_and_penalty(fastest_backend):
    """explain() and penalty() take a ProxAdamW."""
    optimizer, _ = started_adamw(fastest_backend)
    assert "0.02" in str(explain(optimizer)) and float(optimizer.penalty()) > 0


def test_pruned_weights_lose_both_moments(fastest_backend):
    """Weights that prune_to_density removed stay 0, and so do both of their moments."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    optimizer = ProxAdamW(
        [{"params": [m.weight for m in model]}, {"params": [m.bias for m in model]}],
        lr=0.05,
        backend=fastest_backend,
    )
    x = torch.randn(5, 6)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    prune_to_density(model, 0.25, optimizer=optimizer)
    dead = [m.weight == 0 for m in model]
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        for m, zeros in zip(model, dead):
            entry = optimizer.state[m.weight]
            assert not any(x[zeros].any() for x in (m.weight, entry["exp_avg"], entry["exp_avg_sq"]))
            assert m.weight[~zeros].all()


# On a GPU the count of steps lies in its memory if the options say so.


KERNELS = [name for name in available_backends() if name in ("cuda", "triton")]


@pytest.mark.gpu
@pytest.mark.parametrize("executor", KERNELS)
def test_the_gpu_counts(executor):
    """With fused or capturable the count lies on the GPU, and an overflow there changes nothing."""
    for option in ("fused", "capturable"):
        params, twins = (parameters(dtype=torch.float32) for _ in range(2))
        ours = ProxAdamW(params, lr=0.1, **PENALTY, backend=executor, **{option: True})
        plain = ProxAdamW(twins, lr=0.1, **PENALTY, backend=executor)
        for step in range(5):
            give_grads(params, step, twins)
            ours.step()
            plain.step()
        for p, q in zip(params, twins):
            count = ours.state[p]["step"]
            assert count.is_cuda and count.dtype == torch.float32 and float(count) == 5
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    before = everything(ours)
    ours.grad_scale, ours.found_inf = (torch.ones(1, device="cuda") for _ in range(2))
    train(ours, params, [5])
    assert_same_bits(everything(ours), before)


@pytest.mark.gpu
@pytest.mark.parametrize("executor", KERNELS)
def test_replays_of_a_captured_step_count(executor):
    """Each replay of a CUDA graph counts as a step and uses that count."""
    params, twins = (parameters(dtype=torch.float32) for _ in range(2))
    ours = ProxAdamW(params, lr=0.1, **PENALTY, backend=executor, capturable=True)
    plain = ProxAdamW(twins, lr=0.1, **PENALTY, backend=executor, capturable=True)
    give_grads(params, 0, twins)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ours.step()
    plain.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        ours.step()
    for _ in range(4):
        graph.replay()
        plain.step()
    torch.cuda.synchronize()
    assert float(ours.state[params[0]]["step"]) == float(plain.state[twins[0]]["step"]) == 5
    assert_same_bits([p.detach() for p in params], [p.detach() for p in twins])
