"""Without penalties ProxAdamW is torch.optim.AdamW, or Adam; with them executors follow the reference."""

import sys

import torch
from helpers.right import INTERPRETED
from helpers.scenarios import SCENARIOS
from helpers.steps import (
    PENALTY,
    assert_as_near_as,
    assert_same_bits,
    everything,
    give_grads,
    parameters,
    train,
)
from helpers.tiers import covering, each_value, fused_backends
from torch import nn
from torch.optim import Adam, AdamW

from cges_kernels import ProxAdamW, available_backends

# Both kinds of weight decay; betas of 0 keep nothing of the last step, and a large eps decides the step size.
OPTIONS = dict(
    weight_decay=(0.0, 0.1),
    maximize=(False, True),
    betas=[(0.9, 0.999), (0.3, 0.6), (0.0, 0.0)],
    eps=(1e-8, 0.01),
    decoupled=(True, False),
)


def torchs(decoupled):
    """torch's optimizer with this kind of weight decay."""
    return AdamW if decoupled else Adam


@covering(
    **OPTIONS,
    amsgrad=(False, True),
    dtype=[torch.float32, torch.float64],
    way=["host", "tensor step", "tensors"],
)
def test_reference_is_torch_bit_for_bit(
    monkeypatch, weight_decay, maximize, betas, eps, decoupled, amsgrad, dtype, way
):
    """Parameters and states have torch's bits after 50 steps.

    With capturable=True torch computes by another formula, which counts steps in a tensor; it is made to
    accept the CPU. With tensors as betas or lr it computes in their dtype.
    """
    monkeypatch.setattr(
        sys.modules[AdamW.__module__.replace("adamw", "adam")],
        "_get_capturable_supported_devices",
        lambda *_: ["cpu", "cuda"],
    )
    options = dict(lr=0.03, weight_decay=weight_decay, maximize=maximize, betas=betas, eps=eps)
    options |= dict(amsgrad=amsgrad, capturable=way == "tensor step" or (way == "tensors" and decoupled))
    if way == "tensors":
        of_other_dtype = torch.float64 if dtype == torch.float32 and amsgrad else torch.float32
        options["betas"] = tuple(torch.tensor([x], dtype=of_other_dtype) for x in betas)
        options["lr"] = torch.tensor(0.03)
    params, others = parameters(dtype=dtype), parameters(dtype=dtype)
    ours = ProxAdamW(params, decoupled_weight_decay=decoupled, backend="reference", **options)
    theirs = torchs(decoupled)(others, foreach=False, **options)
    train(ours, params, range(50))
    train(theirs, others, range(50))
    assert_same_bits(everything(ours), everything(theirs))
    assert list(ours.state[params[0]]) == list(theirs.state[others[0]])


def test_differentiable_is_torch_bit_for_bit():
    """The same with differentiable=True."""
    results = []
    for make in (AdamW, ProxAdamW):
        params = [p.detach() for p in parameters()]
        optimizer = make(params, lr=0.03, differentiable=True)
        train(optimizer, params, range(20))
        results.append(everything(optimizer))
    assert_same_bits(*results)


def test_a_step_is_differentiable_by_its_learning_rate():
    """gradcheck passes through two steps under penalties."""
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
    """The error is at most twice that of torch's fused kernel, plus one rounding.

    The truth is torch's optimizer in float64; see test_sgd_options.py.
    """
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


# Scenarios are written for SGD. AdamW has no such options, and one scenario writes SGD's state.
SGD_ALONE = ("momentum", "dampening", "nesterov")
RUNS = {name: run for name, run in SCENARIOS.items() if name != "state_entries_replaced"}


def of_sgd(make, **more):
    """A constructor that drops the options which only SGD has."""

    def made(params, **options):
        return make(params, **{k: x for k, x in options.items() if k not in SGD_ALONE}, **more)

    return made


# Scenarios change what plans look at, and executors only get addresses. So not each pair has to run.
@each_value(run=RUNS.values(), executor=available_backends())
def test_every_scenario_is_torchs_and_with_penalties_the_references(executor, run):
    """Whatever a training loop does, ProxAdamW follows torch's AdamW, and with penalties the reference."""
    wanted = run(of_sgd(AdamW, foreach=False))
    got = run(of_sgd(ProxAdamW, backend=executor))
    check(run, executor, got, wanted)
    if executor != "reference":
        got, wanted = (run(of_sgd(ProxAdamW, backend=b, **PENALTY)) for b in (executor, "reference"))
        check(run, executor, got, wanted)


def test_a_schedule_may_leave_one_beta_a_tensor(fastest_backend):
    """Where both betas are tensors, torch's schedules of momentum put a number in the first one's place."""
    run = SCENARIOS["one_cycle_lr_cycles_momentum_too"]
    betas = tuple(torch.tensor(x, dtype=torch.float64) for x in (0.9, 0.99))
    wanted = run(of_sgd(AdamW, foreach=False, betas=betas))
    got = run(of_sgd(ProxAdamW, backend=fastest_backend, betas=betas))
    assert_as_near_as(fastest_backend, got, wanted)


def check(run, executor, got, wanted):
    """Compares the tensors of a scenario, loosely where it has float32 tensors as hyperparameters.

    With such tensors torch's for-loop, and so the reference, computes scalars in float32; kernels do not.
    """
    if "tensor" not in run.__name__ or executor == "reference":
        return assert_as_near_as(executor, got, wanted)
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
