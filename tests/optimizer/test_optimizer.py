"""ProxSGD behaves as torch.optim.SGD does, whatever a training loop does to it."""

import copy
import itertools
from functools import partial

import pytest
import torch
from helpers.right import INTERPRETED
from helpers.steps import (
    FASTEST,
    PENALTY,
    SHAPES,
    assert_as_near_as,
    assert_same_bits,
    everything,
    give_grads,
    needs_cpu,
    parameters,
    train,
)
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR
from torch.testing._internal.two_tensor import TwoTensor

from cges_kernels import ProxSGD, available_backends, prox, prox_

# Every option of torch.optim.SGD

SGD_OPTIONS = [
    dict(momentum=m, dampening=d, nesterov=n, weight_decay=w, maximize=x)
    for m, d, n, w, x in itertools.product((0, 0.9), (0, 0.3), (False, True), (0, 1e-2), (False, True))
    if not n or (m > 0 and d == 0)
]


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_is_torch_sgd_bit_for_bit(options, dtype):
    results = []
    for make in (SGD, lambda *args, **kw: ProxSGD(*args, **kw, backend="reference")):
        params = parameters(dtype=dtype)
        foreach = False if make is SGD else None
        optimizer = make(params, lr=0.03, foreach=foreach, **options)
        train(optimizer, params, range(50))
        results.append(everything(optimizer))
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_as_near_to_torch_sgd_as_fused_sgd_is(fused_backend, options, dtype):
    """Truth is SGD in float64 from the same numbers.

    A fused kernel rounds at other places than foreach=False does (fused multiply-adds; one rounding per
    step in bfloat16), so bits may differ. What may not differ is the size of the error: at most twice that
    of torch's own fused kernel, plus one rounding of the largest value.
    """

    def run(make, dtype, **more):
        params = parameters(dtype=start_dtype)
        for p in params:
            p.data = p.data.to(dtype)
        optimizer = make(params, lr=0.03, **options, **more)
        for step in range(3 if INTERPRETED and fused_backend == "triton" else 50):
            give_grads(params, step)
            for p in params:
                p.grad = p.grad.to(start_dtype).to(dtype)
            optimizer.step()
        return everything(optimizer)

    start_dtype = dtype
    truth = run(SGD, torch.float64, foreach=False)
    fused, ours = run(SGD, dtype, fused=True), run(ProxSGD, dtype, backend=fused_backend)
    assert len(truth) == len(fused) == len(ours)
    for kind in (slice(0, len(SHAPES)), slice(len(SHAPES), None)):  # parameters, buffers

        def error(xs, kind=kind):
            return max(
                (float((x - t).abs().max()) for x, t in zip(xs[kind], truth[kind]) if t.numel()), default=0
            )

        rounding = torch.finfo(dtype).eps * max(
            (float(t.abs().max()) for t in truth[kind] if t.numel()), default=0
        )
        assert error(ours) <= 2 * error(fused) + rounding


# Scenarios: what training loops do. Each takes a constructor and returns the tensors to compare.

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


@pytest.mark.parametrize("run", SCENARIOS.values(), ids=SCENARIOS)
def test_without_penalties_every_scenario_is_torch_sgd(backend, run):
    wanted = run(lambda params, **options: SGD(params, foreach=False, **options))
    assert_as_near_as(
        backend, run(lambda params, **options: ProxSGD(params, backend=backend, **options)), wanted
    )


@pytest.mark.parametrize("run", SCENARIOS.values(), ids=SCENARIOS)
@pytest.mark.parametrize("prox_mode", ["sequential", "exact"])
def test_with_penalties_every_scenario_is_the_reference(fused_backend, run, prox_mode):
    def with_backend(backend):
        options = dict(PENALTY, prox_mode=prox_mode, backend=backend)
        return run(lambda params, **more: ProxSGD(params, **options, **more))

    assert_as_near_as(fused_backend, with_backend(fused_backend), with_backend("reference"))


# Which executor serves, and what it gives

SERVED_BY = [
    (dict(), FASTEST),
    (dict(fused=None), FASTEST),
    (dict(fused=True), "cpu"),
    (dict(fused=True, backend="cpu"), "cpu"),
    (dict(backend="cpu"), "cpu"),
    (dict(fused=False), "reference"),
    (dict(foreach=True), "reference"),
    (dict(foreach=False), FASTEST),
    (dict(differentiable=True), "reference"),
    (dict(backend="reference"), "reference"),
    (dict(backend="reference", foreach=True), "reference"),
]


@pytest.mark.parametrize("options,executor", SERVED_BY, ids=str)
def test_options_select_the_executor(options, executor):
    if executor not in available_backends():
        pytest.skip("the C++ extension is not built")
    params = parameters()
    optimizer = ProxSGD(params, **options)
    if options.get("differentiable"):
        params = optimizer.param_groups[0]["params"] = [p.detach() for p in params]
    train(optimizer, params, range(1))
    assert optimizer._planner.executors == [executor]


@needs_cpu
def test_param_groups_select_the_executor_each_and_may_change_their_mind():
    params = parameters()
    groups = [{"params": params[:2]}, {"params": params[2:4], "foreach": True}, {"params": params[4:]}]
    optimizer = ProxSGD(groups, lr=0.1, momentum=0.9, **PENALTY)
    other = parameters()
    reference = ProxSGD(other, lr=0.1, momentum=0.9, **PENALTY, backend="reference")
    for steps, changed, executors in (
        (range(3), {}, ["cpu", "reference", "cpu"]),
        (range(3, 6), {"foreach": False}, ["cpu", "cpu", "cpu"]),
        (range(6, 9), {"fused": False}, ["cpu", "reference", "cpu"]),
    ):
        optimizer.param_groups[1].update(changed)
        train(optimizer, params, steps)
        train(reference, other, steps)
        assert optimizer._planner.executors == executors
    assert_as_near_as("cpu", [p.detach() for p in params], [p.detach() for p in other])


def test_param_group_without_parameters_has_an_executor_that_is_there():
    params = parameters()
    optimizer = ProxSGD([{"params": []}, {"params": params}])
    train(optimizer, params, range(1))
    assert set(optimizer._planner.executors) <= set(available_backends())


def test_bfloat16_and_float64_beside_float32_in_one_optimizer(backend):
    dtypes = (torch.bfloat16, torch.float32, torch.float64, torch.float16)
    params = [p for dtype in dtypes for p in parameters([(6, 5), (4,)], dtype)]
    optimizer = ProxSGD(params, lr=0.1, momentum=0.9, **PENALTY, backend=backend)
    train(optimizer, params, range(4))
    for i, dtype in enumerate(dtypes):
        alone = parameters([(6, 5), (4,)], dtype)
        single = ProxSGD(alone, lr=0.1, momentum=0.9, **PENALTY, backend=backend)
        for step in range(4):
            give_grads([*parameters([()] * 2 * i), *alone], step)
            single.step()
        assert_same_bits([p.detach() for p in params[2 * i : 2 * i + 2]], [p.detach() for p in alone])
        assert all(optimizer.state[p]["momentum_buffer"].dtype == p.dtype for p in params)


def test_step_moves_version_counters(backend):
    p = parameters([(6, 5)])[0]
    optimizer = ProxSGD([p], lr=0.1, momentum=0.9, backend=backend)
    loss = p.square().sum()
    give_grads([p], 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    buf = optimizer.state[p]["momentum_buffer"]
    version = buf._version
    optimizer.step()
    assert buf._version > version


def test_the_default_device_is_no_concern(backend):
    params, others = parameters([(6, 5), (9,)]), parameters([(6, 5), (9,)])
    optimizer, other = (ProxSGD(ps, momentum=0.9, **PENALTY, backend=backend) for ps in (params, others))
    for step in range(2):
        for ps in (params, others):
            give_grads(ps, step)
        with torch.device("meta"):
            optimizer.step()
            prox_([p.detach() for p in params], l1=0.1, backend=backend)
        other.step()
        prox_([p.detach() for p in others], l1=0.1, backend=backend)
    assert_same_bits(everything(optimizer), everything(other))


@pytest.mark.parametrize("prox_mode", ["sequential", "exact"])
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_differentiable_step_has_the_right_gradient(momentum, prox_mode):
    """With respect to the weights, the gradient and the momentum buffer that went in."""
    w, grad, buf = (p.detach().requires_grad_() for p in parameters([(4, 3)] * 3))

    def one_step(w, grad, buf):
        p = w.clone()
        p.grad = grad
        options = dict(lr=0.3, momentum=momentum, weight_decay=0.1, prox_mode=prox_mode, **PENALTY)
        optimizer = ProxSGD([p], differentiable=True, **options)
        if momentum:
            optimizer.state[p]["momentum_buffer"] = buf.clone()
        optimizer.step()
        return p

    assert torch.autograd.gradcheck(one_step, (w, grad, buf))


def test_differentiable_step_has_the_right_gradient_for_a_tensor_lr():
    """The learning rate is in the update and in the thresholds."""
    w, grad = (p.detach() for p in parameters([(4, 3)] * 2))
    lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def one_step(lr):
        p = w.clone()
        p.grad = grad
        ProxSGD([p], lr=lr, differentiable=True, **PENALTY).step()
        return p

    assert torch.autograd.gradcheck(one_step, (lr,))


# The same bits, however it is run

SIZES = [(130, 70), (3, 5), (7,), (16, 8, 3, 3), (1, 40), (40, 1), (257, 513), (70000, 2)]
SIZES += [(2, 600_000), (40_000, 16)]  # groups that fit no cache


def run_once(backend, sizes=SIZES, dtype=torch.float32, seed=0, steps=3, **options):
    params = parameters(sizes, dtype, seed)
    optimizer = ProxSGD(params, lr=0.1, momentum=0.9, **PENALTY, **options, backend=backend)
    train(optimizer, params, range(steps))
    return everything(optimizer)


@needs_cpu
@pytest.mark.filterwarnings("ignore:.*sequential mode zeroes")
@pytest.mark.parametrize("group_by", ["feature", "filter", "channel", "tensor"])
@pytest.mark.parametrize("prox_mode", ["sequential", pytest.param("exact", marks=pytest.mark.slow)])
def test_bits_depend_neither_on_the_threads_nor_on_the_run(threads, group_by, prox_mode):
    results = []
    for n in (1, 2, 2):
        threads(n)
        results.append(run_once("cpu", group_by=group_by, prox_mode=prox_mode, steps=2))
    for other in results[1:]:
        assert_same_bits(results[0], other)


@needs_cpu
@pytest.mark.filterwarnings("ignore:.*sequential mode zeroes")
def test_bits_do_not_depend_on_the_neighbours():
    params, alone, shuffled = (parameters(SIZES, torch.float32) for _ in range(3))
    order = [5, 8, 1, 3, 0, 7, 2, 9, 6, 4]
    options = dict(lr=0.1, momentum=0.9, **PENALTY, backend="cpu")
    optimizers = [ProxSGD(params, **options), ProxSGD([shuffled[i] for i in order], **options)]
    optimizers += [ProxSGD([p], **options) for p in alone]
    for step in range(3):
        for group in (params, alone, shuffled):
            give_grads(group, step)
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(params, alone)
    assert_same_bits(params, shuffled)


@needs_cpu
@pytest.mark.parametrize("prox_mode", ["sequential", "exact"])
def test_500_tiny_tensors_equal_the_reference(prox_mode):
    sizes = ([(3, 5), (7,), (2, 3, 2, 2), (1,), (4, 1), (), (1, 9), (8, 8)] * 63)[:500]
    cpu, reference = (
        run_once(backend, sizes, torch.float64, prox_mode=prox_mode) for backend in ("cpu", "reference")
    )
    assert_as_near_as("cpu", cpu, reference)
    assert any((w == 0).any() and (w != 0).any() for w in reference)


# The objective, and the warning


def test_penalty_is_the_sum_over_the_param_groups(backend):
    params = parameters([(6, 5), (4, 3, 3, 3), (9,)])
    groups = [
        dict(params=params[:1], group_lasso=0.5, group_by="filter"),
        dict(params=params[1:], exclusive_lasso=0.25, l1=0.125),
    ]
    optimizer = ProxSGD(groups, backend=backend)
    w, conv, bias = (p.detach() for p in params)
    wanted = 0.5 * w.square().sum(1).sqrt().sum()
    wanted += 0.25 / 2 * conv.abs().sum(0).square().sum() + 0.125 * (conv.abs().sum() + bias.abs().sum())
    penalty = optimizer.penalty()
    assert penalty.dim() == 0 and not penalty.requires_grad
    torch.testing.assert_close(penalty, wanted)


def test_warns_once_where_sequential_mode_zeroes_too_much(backend, recwarn):
    params = parameters([(10, 5), (300,)])
    optimizer = ProxSGD(params, lr=0.1, exclusive_lasso=0.99, backend=backend)
    train(optimizer, params, range(2))
    assert not recwarn.list  # b*n = 0.99, and a bias has no groups
    optimizer.param_groups[0]["lr"] = 0.2
    train(optimizer, params, range(2))
    optimizer.param_groups[0]["lr"] = 0.3
    train(optimizer, params, range(2))
    (warning,) = recwarn.list
    assert "1.98 >= 1" in str(warning.message) and "exact" in str(warning.message)
    assert warning.filename == __file__


def test_exact_mode_does_not_warn(backend, recwarn):
    params = parameters([(10, 5)])
    optimizer = ProxSGD(params, lr=0.1, exclusive_lasso=9, prox_mode="exact", backend=backend)
    train(optimizer, params, range(2))
    assert not recwarn.list


@needs_cpu
def test_a_replaced_parameter_may_need_another_executor():
    """FSDP2 and accelerate put wrapped tensors into the groups, which only the reference serves."""
    params = [nn.Parameter(torch.randn(6, 5)) for _ in range(2)]
    optimizer = ProxSGD([{"params": [p]} for p in params], lr=0.1, l1=0.01)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert set(optimizer._planner.executors) == {"cpu"}
    plain = params[0].detach().clone()
    wrapped = nn.Parameter(TwoTensor(plain.clone(), plain.clone()))
    wrapped.grad = TwoTensor(torch.ones(6, 5), torch.ones(6, 5))
    optimizer.param_groups[0]["params"][0] = wrapped
    optimizer.step()
    assert optimizer._planner.executors == ["reference", "cpu"]
    torch.testing.assert_close(wrapped.a.detach(), prox(plain - 0.1, l1=0.001))


def test_a_learning_rate_that_requires_grad_is_read_at_each_step():
    p, lr = torch.ones(3), torch.tensor(0.5, requires_grad=True)
    for differentiable in (False, True):
        x = p.clone()
        optimizer = ProxSGD([x], lr=lr, backend="reference", differentiable=differentiable)
        for rate in (0.5, 0.25, 0.0):
            with torch.no_grad():
                lr.fill_(rate)
            x.grad = torch.ones(3)
            before = x.detach().clone()
            optimizer.step()
            assert torch.equal(before - x.detach(), torch.full((3,), rate))


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("declared", [torch.float32, None])
def test_gradients_of_another_dtype_are_stepped_as_in_torch(momentum, declared):
    def trained(make):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(5, 3, dtype=torch.bfloat16))
        p.grad_dtype = declared
        p.grad = torch.randn(5, 3)
        optimizer = make([p], lr=0.1, momentum=momentum, weight_decay=0.01)
        for _ in range(3):
            optimizer.step()
            p.grad = torch.randn(5, 3)
        return p, optimizer

    (p, ours), (q, theirs) = trained(ProxSGD), trained(partial(SGD, foreach=False))
    assert_same_bits([p], [q])
    assert ours._planner.executors == ["reference"]
    if momentum:
        assert_same_bits([ours.state[p]["momentum_buffer"]], [theirs.state[q]["momentum_buffer"]])
    (p, _), (q, _) = trained(partial(ProxSGD, group_lasso=100.0)), trained(partial(ProxSGD, l1=3.0))
    assert not p.any() and (q == 0).any() and q.any()


@pytest.mark.parametrize("options", [dict(), dict(fused=True)])
def test_a_gradient_of_another_dtype_may_come_later(options):
    """The executor is chosen again, or the wish refused with its reason, in the step that meets it."""
    p, q = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    q.grad_dtype = None
    optimizer = ProxSGD([p, q], lr=0.1, momentum=0.9, backend="auto", **options)
    p.grad = torch.ones(4, 4)
    optimizer.step()
    q.grad = torch.ones(4, 4, dtype=torch.bfloat16)
    if options:
        with pytest.raises(
            RuntimeError, match=r"fused=True cannot .*\[1\]: expected a gradient of its own dtype"
        ):
            optimizer.step()
        return
    optimizer.step()
    assert optimizer._planner.executors == ["reference"] and (q == 0.9).all()
    q.grad = torch.ones(4, 4)
    optimizer.state[q]["momentum_buffer"] = optimizer.state[q]["momentum_buffer"].float()
    optimizer.step()
    assert optimizer._planner.executors != ["reference"]


@pytest.mark.parametrize("key", ["lr", "group_lasso", "l1"])
def test_a_differentiable_step_checks_tensors_changed_in_place(key):
    p = torch.ones(4, 4)
    p.grad = torch.ones(4, 4)
    value = torch.tensor(0.1)
    optimizer = ProxSGD([p], differentiable=True, **{"lr": 0.1, key: value})
    optimizer.step()
    value.fill_(-5.0)
    with pytest.raises(ValueError, match="-5"):
        optimizer.step()


def test_a_list_changed_in_place_is_noticed(backend):
    p = nn.Parameter(torch.randn(4, 4))
    p.grad = torch.zeros(4, 4)
    other = nn.Parameter(p.detach().clone())
    other.grad = torch.zeros(4, 4)
    options = dict(lr=1.0, group_lasso=0.1, group_by=(1,), backend=backend)
    optimizer = ProxSGD([p], view=[2, 8], **options)
    optimizer.step()
    other.data.copy_(p.data)
    optimizer.param_groups[0]["view"][:] = [16, 1]
    optimizer.step()
    ProxSGD([other], view=[16, 1], **options).step()
    assert_same_bits([p], [other])
    optimizer.param_groups[0]["view"][:] = [3, 3]
    with pytest.raises(ValueError, match=r"view: expected .* got \(3, 3\)"):
        optimizer.step()
