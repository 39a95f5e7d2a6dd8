"""ProxAdamW is torch.optim.AdamW, or Adam, where nothing is penalised; and what it keeps of a parameter."""

import copy
import pickle
import sys

import pytest
import torch
from helpers.right import INTERPRETED, device_of
from helpers.scenarios import SCENARIOS
from helpers.steps import (
    PENALTY,
    assert_as_near_as,
    assert_same_bits,
    copy_values,
    everything,
    give_grads,
    parameters,
    through_a_file,
    train,
)
from helpers.tiers import covering, each_value, fused_backends
from torch import nn
from torch.optim import Adam, AdamW

from cges_kernels import ProxAdamW, ProxSGD, available_backends, explain, prune_to_density

OPTIONS = dict(
    weight_decay=(0.0, 0.1),
    maximize=(False, True),
    betas=[(0.9, 0.999), (0.3, 0.6), (0.0, 0.0)],
    eps=(1e-8, 0.01),
    decoupled=(True, False),
)


def torchs(decoupled):
    return AdamW if decoupled else Adam


@covering(**OPTIONS, amsgrad=(False, True), dtype=[torch.float32, torch.float64], way=["host", "tensor"])
def test_reference_is_torch_bit_for_bit(
    monkeypatch, weight_decay, maximize, betas, eps, decoupled, amsgrad, dtype, way
):
    """With capturable=True torch has another formula, which counts steps in a tensor."""
    monkeypatch.setattr(
        sys.modules[AdamW.__module__.replace("adamw", "adam")],
        "_get_capturable_supported_devices",
        lambda *_: ["cpu", "cuda"],
    )
    options = dict(lr=0.03, weight_decay=weight_decay, maximize=maximize, betas=betas, eps=eps)
    options |= dict(amsgrad=amsgrad, capturable=way == "tensor")
    params, others = parameters(dtype=dtype), parameters(dtype=dtype)
    ours = ProxAdamW(params, decoupled_weight_decay=decoupled, backend="reference", **options)
    theirs = torchs(decoupled)(others, foreach=False, **options)
    train(ours, params, range(50))
    train(theirs, others, range(50))
    assert_same_bits(everything(ours), everything(theirs))
    assert list(ours.state[params[0]]) == list(theirs.state[others[0]])


def test_differentiable_is_torch_bit_for_bit():
    results = []
    for make in (AdamW, ProxAdamW):
        params = [p.detach() for p in parameters()]
        optimizer = make(params, lr=0.03, differentiable=True)
        train(optimizer, params, range(20))
        results.append(everything(optimizer))
    assert_same_bits(*results)


def test_a_step_is_differentiable_by_its_learning_rate():
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def after_two_steps(lr):
        w = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3).requires_grad_().clone()
        optimizer = ProxAdamW([w], lr=lr, differentiable=True, l1=0.3, group_lasso=0.2)
        for step in range(2):
            w.grad = torch.full_like(w, 1.0 + step)
            optimizer.step()
        return w

    assert torch.autograd.gradcheck(after_two_steps, (lr,))


@covering(**OPTIONS, dtype=[torch.float32, torch.bfloat16], executor=fused_backends())
def test_as_near_to_torch_as_its_fused_kernel_is(
    executor, weight_decay, maximize, betas, eps, decoupled, dtype
):
    """Truth is torch's in float64 from the same numbers; see test_sgd_options.py."""
    options = dict(lr=0.03, weight_decay=weight_decay, maximize=maximize, betas=betas, eps=eps)

    def run(make, to, **more):
        params = [nn.Parameter(p.to(to)) for p in parameters(dtype=dtype)]
        optimizer = make(params, **options, **more)
        for step in range(3 if INTERPRETED and executor == "triton" else 50):
            give_grads(params, step)
            for p in params:
                p.grad = p.grad.to(dtype).to(to)
            optimizer.step()
        states = [optimizer.state[p] for p in params]
        return [
            [p.detach() for p in params],
            *([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq")),
        ]

    truth = run(torchs(decoupled), torch.float64, foreach=False)
    fused = run(torchs(decoupled), dtype, fused=True)
    ours = run(ProxAdamW, dtype, backend=executor, decoupled_weight_decay=decoupled)
    for true, near, got in zip(truth, fused, ours):

        def error(xs, true=true):
            return max(float((x - t).abs().max()) for x, t in zip(xs, true) if t.numel())

        rounding = torch.finfo(dtype).eps * max(float(t.abs().max()) for t in true if t.numel())
        assert error(got) <= 2 * error(near) + rounding


# Scenarios are written for SGD: its options mean nothing here, and one writes its state.
SGD_ALONE = ("momentum", "dampening", "nesterov")
RUNS = {name: run for name, run in SCENARIOS.items() if name != "state_entries_replaced"}


def of_sgd(make, **more):
    def made(params, **options):
        return make(params, **{k: x for k, x in options.items() if k not in SGD_ALONE}, **more)

    return made


# What a scenario changes, plans see; executors see addresses.
@each_value(run=RUNS.values(), executor=available_backends())
def test_every_scenario_is_torchs_and_with_penalties_the_references(executor, run):
    wanted = run(of_sgd(AdamW, foreach=False))
    got = run(of_sgd(ProxAdamW, backend=executor))
    check(run, executor, got, wanted)
    if executor != "reference":
        got, wanted = (run(of_sgd(ProxAdamW, backend=b, **PENALTY)) for b in (executor, "reference"))
        check(run, executor, got, wanted)


def check(run, executor, got, wanted):
    """torch's for-loop, and so the reference, computes in float32 with a tensor of that; kernels do not."""
    if "tensor" not in run.__name__ or executor == "reference":
        return assert_as_near_as(executor, got, wanted)
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


# State


def started(backend, steps=3, **options):
    params = parameters()
    optimizer = ProxAdamW(params, lr=0.01, backend=backend, **PENALTY, **options)
    train(optimizer, params, range(steps))
    return optimizer, params


def test_state_is_named_and_placed_as_torchs(checked_backend):
    optimizer, params = started(checked_backend)
    for p in params:
        entry = optimizer.state[p]
        assert list(entry) == ["step", "exp_avg", "exp_avg_sq"]
        assert entry["step"].shape == () and float(entry["step"]) == 3 and entry["step"].is_cpu
        assert entry["step"].dtype == torch.float32
        for key in ("exp_avg", "exp_avg_sq"):
            assert entry[key].shape == p.shape and entry[key].stride() == p.stride()


def test_parameters_that_join_late_have_their_own_corrections(backend):
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
    optimizer, params = started(fastest_backend)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] = 3
    optimizer.load_state_dict(state)
    assert all(torch.equal(optimizer.state[p]["step"], torch.tensor(3.0)) for p in params)
    train(optimizer, params, [3])
    assert float(optimizer.state[params[0]]["step"]) == 4


def test_copies_and_pickles_go_on_as_the_original(checked_backend):
    optimizer, params = started(checked_backend)
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        theirs = again.param_groups[0]["params"]
        for p, q in zip(params, theirs):
            p.data.copy_(q)  # the second finds them moved on by the first
        state = copy.deepcopy(optimizer.state_dict())
        train(again, theirs, [3])
        train(optimizer, params, [3])
        assert_same_bits(everything(again), everything(optimizer))
        optimizer.load_state_dict(state)


def test_the_default_dtype_is_that_of_the_count(fastest_backend):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        optimizer, params = started(fastest_backend)
        assert optimizer.state[params[0]]["step"].dtype == torch.float64
        assert float(optimizer.state[params[0]]["step"]) == 3
    finally:
        torch.set_default_dtype(before)


def test_versions_move_on(checked_backend):
    optimizer, params = started(checked_backend)
    kept = [params[0], *optimizer.state[params[0]].values()]
    before = [x._version for x in kept]
    train(optimizer, params, [3])
    assert all(x._version > version for x, version in zip(kept, before))
    assert all(x is y for x, y in zip(kept[1:], optimizer.state[params[0]].values()))


# Overflow


@covering(first=[True, False], fused=[True, None], executor=fused_backends())
def test_a_step_that_overflows_does_not_count(executor, first, fused):
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
        scaler.scale(torch.zeros(()))  # which makes its scale
        scaler.step(ours)
        scaler.update()
    assert_same_bits(everything(ours), everything(plain))


# Refusals


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (dict(betas=(0.9, 1.0)), ValueError, "Invalid beta parameter at index 1: 1.0"),
        (dict(betas=("0.9", 0.9)), TypeError, r"betas\[0\]: expected a number, got '0.9'"),
        (dict(eps=-1e-8), ValueError, "Invalid epsilon value: -1e-08"),
        (dict(weight_decay=torch.ones(2)), ValueError, "Tensor weight_decay must be 1-element"),
        (dict(fused=True, amsgrad=True), RuntimeError, "fused=True: expected amsgrad=False"),
        (dict(amsgrad=True, backend="cpu"), RuntimeError, "amsgrad=True takes the reference executor"),
        (
            dict(betas=(torch.tensor(0.1),) * 2, foreach=True),
            ValueError,
            "betas.* as a Tensor is not supported",
        ),
    ],
    ids=str,
)
def test_bad_options(options, error, text):
    with pytest.raises(error, match=text):
        ProxAdamW(parameters(), **options)


@pytest.mark.parametrize(
    ("break_it", "error", "text"),
    [
        (lambda s: s.pop("exp_avg"), RuntimeError, "expected its exp_avg beside exp_avg_sq, step, got none"),
        (lambda s: s.pop("step"), TypeError, "expected a tensor as its step, got NoneType"),
        (lambda s: s.update(step=3), TypeError, "expected a tensor as its step, got int"),
        (lambda s: s.update(step=torch.ones(2)), RuntimeError, r"expected a step of one element.*got \(2,\)"),
        (lambda s: s.update(exp_avg=s["exp_avg_sq"]), ValueError, "expected each tensor once"),
    ],
    ids=["no exp_avg", "no step", "number", "two steps", "one memory"],
)
def test_bad_states(checked_backend, break_it, error, text):
    if checked_backend == "reference" and error is ValueError:
        pytest.skip("the reference writes one after the other, as torch's for-loop does")
    optimizer, params = started(checked_backend)
    before = [p.detach().clone() for p in params]
    break_it(optimizer.state[params[1]])
    give_grads(params, 3)
    with pytest.raises(error, match=text):
        optimizer.step()
    assert_same_bits([p.detach() for p in params], before)


def test_a_file_whose_moments_do_not_fit_loads_nothing(checked_backend):
    optimizer, _ = started(checked_backend)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["exp_avg_sq"] = torch.ones(3)
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match="expected a exp_avg_sq of shape"):
        optimizer.load_state_dict(state)
    assert_same_bits(everything(optimizer), before)


# What is around it


def test_explain_and_penalty(fastest_backend):
    optimizer, _ = started(fastest_backend)
    assert "0.02" in str(explain(optimizer)) and float(optimizer.penalty()) > 0


def test_pruned_weights_lose_both_moments(fastest_backend):
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


# What changes in place, what is shared, what is another's


@each_value(executor=available_backends(), kind=[list, torch.tensor])
def test_betas_that_change_in_place_are_seen(executor, kind):
    params, others = parameters(), parameters()
    device = device_of(executor)
    betas = [0.9, 0.99]
    if kind is not list:
        betas = tuple(torch.tensor(x, device=device, dtype=torch.float64) for x in betas)
    ours = ProxAdamW(params, lr=0.05, betas=betas, backend=executor)
    theirs = AdamW(others, lr=0.05, betas=(0.9, 0.99), foreach=False)
    train(ours, params, range(2))
    train(theirs, others, range(2))
    if kind is list:
        ours.param_groups[0]["betas"][0] = 0.3
    else:
        ours.param_groups[0]["betas"][0].fill_(0.3)
    theirs.param_groups[0]["betas"] = (0.3, 0.99)
    train(ours, params, range(2, 5))
    train(theirs, others, range(2, 5))
    for x, y in zip(params, others):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    if kind is list:
        before = [p.detach().clone() for p in params]
        ours.param_groups[0]["betas"][1] = 7.0
        with pytest.raises(ValueError, match=r"Invalid beta parameter at index 1: 7\.0"):
            ours.step()
        assert_same_bits([p.detach() for p in params], before)


def test_a_step_is_differentiable_by_all_that_torchs_is():
    def gradients(make):
        given = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.1, 0.8, 0.9, 0.2)]
        lr, beta1, beta2, weight_decay = given
        w = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3).requires_grad_().clone()
        options = dict(lr=lr, betas=(beta1, beta2), weight_decay=weight_decay)
        optimizer = make([w], differentiable=True, **options)
        for step in range(3):
            w.grad = (
                torch.full_like(w, 1.0) * torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(4, 3) + step
            )
            optimizer.step()
        return torch.autograd.grad(w.square().sum(), given)

    for ours, theirs in zip(gradients(ProxAdamW), gradients(AdamW)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_count_shared_by_two_parameters_is_refused(fused_backend):
    optimizer, params = started(fused_backend)
    optimizer.state[params[1]]["step"] = optimizer.state[params[0]]["step"]
    before = [p.detach().clone() for p in params]
    give_grads(params, 3)
    with pytest.raises(ValueError, match=r"the step of .* expected each tensor once"):
        optimizer.step()
    assert_same_bits([p.detach() for p in params], before)


def test_fused_counts_in_float32(checked_backend):
    before = torch.get_default_dtype()
    try:
        for default in (torch.float32, torch.float64):
            torch.set_default_dtype(default)
            fused = True if checked_backend != "reference" else None
            optimizer, params = started(checked_backend, fused=fused)
            expected = torch.float32 if fused else default
            assert optimizer.state[params[0]]["step"].dtype == expected
    finally:
        torch.set_default_dtype(before)


def test_another_optimizers_state_is_refused():
    params, others = parameters(), parameters()
    sgd, ours = ProxSGD(params, lr=0.1, momentum=0.9), ProxAdamW(others, lr=0.1)
    train(sgd, params, range(1))
    train(ours, others, range(1))
    for to, source, names in ((ours, sgd, "exp_avg, exp_avg_sq"), (sgd, ours, "momentum_buffer")):
        before = everything(to)
        with pytest.raises(RuntimeError, match=f"expected {names} as its state, got .* another optimizer's"):
            to.load_state_dict(source.state_dict())
        assert_same_bits(everything(to), before)


@pytest.mark.parametrize("left", ["step", "exp_avg"])
def test_a_file_that_lacks_some_of_a_state_is_refused(fastest_backend, left):
    optimizer, _ = started(fastest_backend)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][1] = {left: state["state"][1][left]}
    with pytest.raises((RuntimeError, TypeError), match="expected"):
        optimizer.load_state_dict(state)
        train(optimizer, optimizer.param_groups[0]["params"], [4])


def test_entries_of_state_may_be_replaced(checked_backend):
    results = []
    for make in (of_sgd(AdamW, foreach=False), of_sgd(ProxAdamW, backend=checked_backend)):
        params = parameters()
        optimizer = make(params, lr=0.1)
        train(optimizer, params, range(3))
        entries = [optimizer.state[p] for p in params]
        optimizer.state[params[0]] = {**{k: x.clone() for k, x in entries[0].items()}, "mine": 3}
        entries[1]["exp_avg"] = torch.full_like(params[1], 2)
        entries[2]["step"] = torch.tensor(7.0, device="cpu")
        entries[3]["step"].fill_(1.0)
        entries[5]["exp_avg_sq"].zero_()
        train(optimizer, params, range(3, 6))
        assert optimizer.state[params[0]]["mine"] == 3
        results.append(everything(optimizer))
    assert_as_near_as(checked_backend, *reversed(results))


# On a GPU the count of steps lies there, if the options say so


KERNELS = [name for name in available_backends() if name in ("cuda", "triton")]


@pytest.mark.gpu
@pytest.mark.parametrize("executor", KERNELS)
def test_the_gpu_counts(executor):
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
    train(ours, params, [5])  # an overflow
    assert_same_bits(everything(ours), before)


@pytest.mark.gpu
@pytest.mark.parametrize("executor", KERNELS)
def test_replays_of_a_captured_step_count(executor):
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
