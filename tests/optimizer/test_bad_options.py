"""Bad hyperparameters: the error says what was expected and what was given, and nothing has been written."""

import copy

import numpy as np
import pytest
import torch
from helpers.refusals import OPTIONS, as_bytes, assert_recovers, parameters, rejected, started
from helpers.steps import give_grads

from cges_kernels import ProxSGD, penalty, prox, prox_

NAN, INF = float("nan"), float("inf")

# (options, error, regular expressions that its text matches)
BAD_OPTIONS = [
    *((dict([(name, value)]), ValueError, [name, "expected .*>= 0", f"got {value}"])
      for name in ("group_lasso", "exclusive_lasso", "l1") for value in (-0.5, NAN, INF, -INF)),
    (dict(group_lasso="much"), TypeError, ["group_lasso", "expected a number", "got 'much'"]),
    (dict(l1=None), TypeError, ["l1", "expected a number", "got None"]),
    (dict(l1=torch.tensor(1)), TypeError, ["l1: expected .*floating-point tensor", "got torch.int64"]),
    (dict(lr=np.array(0.1)), TypeError, ["lr: expected a number", "got array"]),
    (dict(l1=torch.tensor([0.1, 0.2])), ValueError, ["l1", "expected a number", r"got shape \(2,\)"]),
    (dict(lr=-0.1), ValueError, ["Invalid learning rate: -0.1"]),
    (dict(lr=NAN), ValueError, ["Invalid learning rate: nan"]),
    (dict(lr=torch.tensor(-0.5)), ValueError, ["Invalid learning rate", "-0.5"]),
    (dict(lr=torch.tensor([0.1, 0.2])), ValueError, ["Tensor lr must be 1-element", r"got shape \(2,\)"]),
    (dict(momentum=-0.9), ValueError, ["Invalid momentum value: -0.9"]),
    (dict(momentum=NAN), ValueError, ["Invalid momentum value: nan"]),
    (dict(weight_decay=-0.1), ValueError, ["Invalid weight_decay value: -0.1"]),
    (dict(weight_decay=NAN), ValueError, ["Invalid weight_decay value: nan"]),
    (dict(dampening=NAN), ValueError, ["Invalid dampening value: nan"]),
    (dict(nesterov=True, momentum=0), ValueError,
     ["Nesterov momentum requires a momentum and zero dampening", "got momentum=0"]),
    (dict(nesterov=True, momentum=0.9, dampening=0.3), ValueError,
     ["Nesterov momentum requires a momentum and zero dampening", "dampening=0.3"]),
    (dict(group_by="features"), ValueError, ["group_by: expected one of .*'feature'", "got 'features'"]),
    (dict(group_by=None), TypeError, ["group_by: expected", "got None"]),
    (dict(group_by=0), TypeError, ["group_by: expected", "got 0"]),
    (dict(group_by=(0.0,)), TypeError, ["group_by: expected", r"got \(0.0,\)"]),
    (dict(group_by=(1,)), ValueError, [r"params'\]\[2\]", r"expected dims in \[-1, 1\)", r"got \(1,\)"]),
    (dict(group_by=(-2,)), ValueError, [r"params'\]\[2\]", r"expected dims in \[-1, 1\)", r"got \(-2,\)"]),
    (dict(group_by=(0, 0)), ValueError, ["expected each dim once", r"got \(0, 0\)"]),
    (dict(group_by=(0, -1)), ValueError, ["expected each dim once", r"got \(0, -1\)"]),
    (dict(view=(5, 5), group_by=(0,)), ValueError, ["view: expected .*4, 3", r"got \(5, 5\)"]),
    (dict(view=7), TypeError, ["view: expected", "got 7"]),
    (dict(view=(2.0, 6)), TypeError, ["view: expected", r"got \(2.0, 6\)"]),
    (dict(prox_mode="exakt"), ValueError, ["prox_mode: expected one of .*'exact'", "got 'exakt'"]),
    (dict(prox_mode=None), ValueError, ["prox_mode: expected one of", "got None"]),
    (dict(freeze_zeros="some"), ValueError, ["freeze_zeros: expected one of .*'element'", "got 'some'"]),
    (dict(freeze_zeros=True), ValueError, ["freeze_zeros: expected one of", "got True"]),
    *((dict([(name, value)]), TypeError, [f"{name}: expected a number, got {value!r}"])
      for name, value in
      (("lr", "1e-3"), ("lr", None), ("momentum", "0.9"), ("dampening", "0"), ("weight_decay", "0.1"))),
    *((dict([(name, "False")]), TypeError, [f"{name}: expected a bool", "got 'False'"])
      for name in ("nesterov", "maximize", "differentiable", "foreach", "fused")),
    (dict(fused=True, foreach=True), RuntimeError, ["`fused` and `foreach` cannot be `True` together"]),
    (dict(fused=True, differentiable=True), RuntimeError, ["`fused` does not support `differentiable`"]),
]  # fmt: skip


@pytest.fixture(params=BAD_OPTIONS, ids=lambda case: "-".join(f"{k}={v}" for k, v in case[0].items()))
def bad(request):
    """One of BAD_OPTIONS."""
    return request.param


def test_refused(fastest_backend, bad):
    """Each bad option is refused by the constructor, and in training in four ways.

    In a new param group, in a param group changed by hand (twice: a failed step must not make the next one
    succeed), and in a checkpoint. Once the cause is gone, training goes on as if nothing had happened.
    """
    options, error, words = bad
    params = parameters()
    before = [as_bytes(p) for p in params]
    with pytest.raises(error) as caught:
        ProxSGD(params, **{**OPTIONS, **options})
    for word in words:
        caught.match(word)
    assert [as_bytes(p) for p in params] == before

    optimizer, params = started(fastest_backend)
    with rejected(optimizer, error, *words):
        optimizer.add_param_group({"params": parameters(seed=1), **options})
    assert_recovers(optimizer, params, fastest_backend)

    backend = "auto" if {"fused", "foreach"} & options.keys() else fastest_backend
    optimizer, params = started(backend)
    group = optimizer.param_groups[0]
    good = {key: group[key] for key in options}
    group.update(options)
    for _ in range(2):  # a failed attempt must not make the next one succeed
        with rejected(optimizer, error, *words):
            optimizer.step()
    group.update(good)
    assert_recovers(optimizer, params, backend)

    optimizer, params = started(backend)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0].update(options)
    with rejected(optimizer, error, *words):
        optimizer.load_state_dict(state)
    assert_recovers(optimizer, params, backend)


def test_load_state_dict_refuses_full_values_that_no_schedule_could_use():
    """The values that a schedule starts from, initial_*, are checked as well."""
    optimizer, params = started("cpu")
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["initial_l1"] = "x"
    with rejected(optimizer, TypeError, "initial_l1: expected a number", "got 'x'"):
        optimizer.load_state_dict(state)
    assert_recovers(optimizer, params, "cpu")


def test_load_state_dict_refuses_a_backend_that_cannot_serve():
    """A file's flags are refused if they contradict the optimizer's backend."""
    optimizer, params = started("cpu")
    with rejected(optimizer, RuntimeError, "foreach=True takes the reference executor", "got backend='cpu'"):
        optimizer.load_state_dict(ProxSGD(parameters(), foreach=True, backend="reference").state_dict())
    assert_recovers(optimizer, params, "cpu")


def test_a_flag_as_text_is_refused_where_nothing_steps():
    """capturable="no" is an error at once; as text it would count as true."""
    with pytest.raises(TypeError, match="capturable: expected a bool, got 'no'"):
        ProxSGD(parameters(), capturable="no")


def test_step_refuses_a_tensor_lr_made_negative_in_place(checked_backend):
    """A learning rate that the host reads is checked in each step."""
    # float64: kernels read float32 tensors themselves, without a check
    lr = torch.tensor(0.1, dtype=torch.float64)
    optimizer, params = started(checked_backend, lr=lr)
    lr.neg_()
    with rejected(optimizer, ValueError, "Invalid learning rate", "-0.1"):
        optimizer.step()
    lr.neg_()
    assert_recovers(optimizer, params, checked_backend, lr=lr.clone())


def test_step_refuses_when_the_last_group_is_faulty(checked_backend):
    """The earlier param groups have not been stepped when a later one is refused."""
    params = parameters()
    optimizer = ProxSGD([{"params": [p]} for p in params], **OPTIONS, backend=checked_backend)
    give_grads(params, 0)
    optimizer.step()
    optimizer.param_groups[2]["l1"] = -1.0
    optimizer.param_groups[0]["lr"] = 0.5
    with rejected(optimizer, ValueError, "l1: expected .*>= 0", "got -1"):
        optimizer.step()


FUNCTIONAL = [
    case
    for case in BAD_OPTIONS
    if set(case[0]) <= {"group_lasso", "exclusive_lasso", "l1", "group_by", "view", "prox_mode"}
]


@pytest.mark.parametrize("case", FUNCTIONAL, ids=lambda case: str(case[0]))
def test_functions_refuse(fastest_backend, case):
    """prox, prox_ and penalty refuse the same, and prox_ does not write its first tensor either."""
    options, error, words = case
    tensors = [torch.randn(4, 3), torch.randn(6)]  # a bad spec is one for the last tensor only
    before = [as_bytes(w) for w in tensors]
    w = tensors[1]
    if "view" in options:
        options = {**options, "group_by": "feature"}
        words = [word.replace("4, 3", "4, 3|6,") for word in words]
    calls = [
        lambda: prox_(tensors, **options, backend=fastest_backend),
        lambda: prox(w, **options, backend=fastest_backend),
        lambda: prox(w.clone().requires_grad_(), **options, backend=fastest_backend),
    ]
    if "prox_mode" not in options:
        calls.append(lambda: penalty(w, **options))
    for call in calls:
        with pytest.raises(error) as caught:
            call()
        for word in words:
            if not word.startswith("params"):
                caught.match(word)
    assert [as_bytes(w) for w in tensors] == before
