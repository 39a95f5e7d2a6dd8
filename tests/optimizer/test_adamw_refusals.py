"""What ProxAdamW refuses, and how it treats betas, counts and states that are changed or shared."""

import copy

import pytest
import torch
from helpers.right import device_of
from helpers.steps import (
    assert_as_near_as,
    assert_same_bits,
    everything,
    give_grads,
    parameters,
    started_adamw,
    train,
)
from helpers.tiers import each_value
from torch.optim import AdamW

from cges_kernels import ProxAdamW, ProxSGD, available_backends


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
    """Options that torch's AdamW refuses, or that no fused executor serves, fail in the constructor."""
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
    """A state with a part missing, malformed or aliased is an error, and no parameter has changed."""
    if checked_backend == "reference" and error is ValueError:
        pytest.skip("the reference writes one after the other, as torch's for-loop does")
    optimizer, params = started_adamw(checked_backend)
    before = [p.detach().clone() for p in params]
    break_it(optimizer.state[params[1]])
    give_grads(params, 3)
    with pytest.raises(error, match=text):
        optimizer.step()
    assert_same_bits([p.detach() for p in params], before)


def test_a_file_whose_moments_do_not_fit_loads_nothing(checked_backend):
    """load_state_dict refuses a moment of another shape and leaves the optimizer as it was."""
    optimizer, _ = started_adamw(checked_backend)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["exp_avg_sq"] = torch.ones(3)
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match="expected a exp_avg_sq of shape"):
        optimizer.load_state_dict(state)
    assert_same_bits(everything(optimizer), before)


# Betas changed in place, shared counts, and states of other optimizers


@each_value(executor=available_backends(), kind=[list, torch.tensor])
def test_betas_that_change_in_place_are_seen(executor, kind):
    """Betas changed in place, in a list or as tensors, are used and checked in the next step."""
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
    """Gradients by lr, both betas and weight decay are those of torch's AdamW."""

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
    """Two parameters with one tensor as their step would count twice a step; that is an error."""
    optimizer, params = started_adamw(fused_backend)
    optimizer.state[params[1]]["step"] = optimizer.state[params[0]]["step"]
    before = [p.detach().clone() for p in params]
    give_grads(params, 3)
    with pytest.raises(ValueError, match=r"the step of .* expected each tensor once"):
        optimizer.step()
    assert_same_bits([p.detach() for p in params], before)


def test_fused_counts_in_float32(checked_backend):
    """With fused=True steps are counted in float32 as in torch, otherwise in the default dtype."""
    before = torch.get_default_dtype()
    try:
        for default in (torch.float32, torch.float64):
            torch.set_default_dtype(default)
            fused = True if checked_backend != "reference" else None
            optimizer, params = started_adamw(checked_backend, fused=fused)
            expected = torch.float32 if fused else default
            assert optimizer.state[params[0]]["step"].dtype == expected
    finally:
        torch.set_default_dtype(before)


def test_another_optimizers_state_is_refused():
    """Neither ProxAdamW nor ProxSGD loads the other's state."""
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
    """A state with only a step or only one moment is an error at loading or in the next step."""
    optimizer, _ = started_adamw(fastest_backend)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][1] = {left: state["state"][1][left]}
    with pytest.raises((RuntimeError, TypeError), match="expected"):
        optimizer.load_state_dict(state)
        train(optimizer, optimizer.param_groups[0]["params"], [4])


def test_entries_of_state_may_be_replaced(checked_backend):
    """Replaced states take effect as in torch's AdamW, and the caller's own keys are kept."""
    results = []
    for make, option in ((AdamW, dict(foreach=False)), (ProxAdamW, dict(backend=checked_backend))):
        params = parameters()
        optimizer = make(params, lr=0.1, **option)
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
