"""PyTorch's own optimizer tests, run on ProxSGD.

torch's wheel holds what its test/test_optim.py needs to know of an optimizer, an OptimizerInfo: constructor
inputs, schedulers, faulty inputs, and what it supports. helpers/optimizer_info.py derives ProxSGD's from
SGD's. Here are the tests that test_optim.py makes of steps; test_torch_suite_state.py has those of what is
kept between steps. Steps that may be fused run on `quick_backend`. Steps with foreach=True,
differentiable=True or fused=False run on the reference.

These tests of torch's are left out:

- complex parameters and sparse gradients (test_complex*, test_rosenbrock_sparse): ProxSGD refuses them, which
  is tested here.
- the same parameter twice in a group: torch warns. Updates of both in one pass would race, so ProxSGD raises
  an error after torch's warning.
- parameters with gaps (the slices in test_forloop_goes_right_direction): ProxSGD refuses them, because they
  have no layout of groups, which is tested here. Transposed ones take their place.
- test_defaults_changed_to_foreach, test_peak_memory_foreach: there is no foreach implementation, and
  foreach=True means the reference. test_executor_choice.py tests which option selects which executor.
- test_mixed_device_dtype: one executor serves a param group, and the reference does if the devices differ.
- test_*_large_tensor: test_cuda_failures.py tests more than 2^31 elements.
- test_load_nontensor_step, and capturable in test_cpu_load_state_dict: SGD has no count of steps.
- test_second_order_*, and tests for machines with several GPUs: these are not for SGD.
"""

import copy
import itertools

import pytest
import torch
from helpers.optimizer_info import INFO, Problem, every_config, inputs, make
from helpers.right import DTYPES, device_of
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from cges_kernels import ProxSGD


def assert_right_direction(optimizer, problem, maximize, schedulers=(), steps=20):
    """Twenty steps lower the loss, or raise it with maximize."""
    before = problem.loss()
    for _ in range(steps):
        loss = optimizer.step(problem.loss)
        for scheduler in schedulers:
            scheduler.step(*([loss] if isinstance(scheduler, ReduceLROnPlateau) else []))
    assert problem.loss() > before if maximize else problem.loss() < before


# Errors


ERRORS = INFO.optim_error_inputs_func("cpu", torch.float32)


@pytest.mark.parametrize("faulty", ERRORS, ids=[e.optimizer_error_input.desc for e in ERRORS])
def test_errors(faulty):
    """torch's faulty constructor arguments are refused with torch's errors."""
    params, options = faulty.optimizer_error_input.params, faulty.optimizer_error_input.kwargs
    if issubclass(faulty.error_type, Warning):  # the same parameter twice, see the module's docstring
        with pytest.warns(faulty.error_type, match=faulty.error_regex):
            with pytest.raises(ValueError, match="expected each tensor once"):
                ProxSGD(params, **options)
    else:
        with pytest.raises(faulty.error_type, match=faulty.error_regex):
            ProxSGD(params, **options)


def test_complex_sparse_meta_and_strided_parameters_are_refused(quick_backend):
    """Under every combination of options."""
    refused = {
        "complex64": torch.randn(2, dtype=torch.complex64),
        "sparse_coo": torch.zeros(3, layout=torch.sparse_coo),
        "meta": torch.empty(2, 3, device="meta"),
        "non-overlapping": torch.randn(10, 5, 2)[..., 0],
    }
    for options, (word, w) in itertools.product(every_config(quick_backend), refused.items()):
        with pytest.raises(ValueError, match=word):
            make(quick_backend, [w], **options)


def test_sparse_gradients_are_refused(quick_backend):
    """Under every combination of options, and the parameter has not changed."""
    for options in every_config(quick_backend):
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3).to_sparse()
        optimizer = make(quick_backend, [p], **options)
        with pytest.raises(RuntimeError, match="sparse is not supported"):
            optimizer.step()
        assert torch.equal(p, torch.ones(3))


# Steps


@pytest.mark.parametrize("transposed", [False, True])
def test_forloop_goes_right_direction(transposed):
    """Under each of torch's inputs and schedulers the loss falls, or rises with maximize."""
    for constructors in ([], *INFO.scheduler_inputs):
        for options in (config.kwargs for config in inputs("cpu")):
            problem = Problem(transposed)
            optimizer = ProxSGD(problem.params, **options, foreach=False, fused=False)
            schedulers = [construct(optimizer) for construct in constructors]
            assert_right_direction(optimizer, problem, options.get("maximize"), schedulers)


def test_param_group_with_lrscheduler_goes_right_direction(quick_backend):
    """The same with two param groups of different learning rates."""
    for constructors in INFO.scheduler_inputs:
        problem = Problem()
        weight, bias = problem.params
        optimizer = make(quick_backend, [{"params": [weight]}, {"params": [bias], "lr": 0.01}])
        assert_right_direction(
            optimizer, problem, False, [construct(optimizer) for construct in constructors]
        )


def test_param_groups_weight_decay(quick_backend):
    """The same with weight decay in one of two param groups."""
    for options in every_config(quick_backend):
        problem = Problem()
        weight, bias = problem.params
        groups = [dict(options, params=[weight]), dict(options, params=[bias], weight_decay=0.0)]
        assert_right_direction(make(quick_backend, groups), problem, options.get("maximize"), steps=5)


def test_param_groups_lr(quick_backend):
    """A param group uses its own learning rate, and the default of 1e-28 does not move the other."""
    for options in every_config(quick_backend):
        problem, idle = Problem(), nn.Parameter(torch.randn(2))
        idle.grad, before = torch.rand(2), idle.detach().clone()
        options.setdefault("lr", 1e-3)
        groups = [dict(options, params=problem.params), dict(params=[idle])]
        optimizer = make(quick_backend, groups, lr=1e-28)
        assert_right_direction(optimizer, problem, options.get("maximize"), steps=5)
        assert torch.equal(idle, before)


def test_tensor_lr(quick_backend):
    """A tensor as lr gives the steps of a number."""
    for options in every_config(quick_backend):
        one = Problem()
        two = one.twin()
        number = make(quick_backend, one.params, **{**options, "lr": 1e-3})
        tensor = make(quick_backend, two.params, **{**options, "lr": torch.tensor(1e-3)})
        for _ in range(5):
            number.step(one.loss)
            tensor.step(two.loss)
            torch.testing.assert_close(one.params, two.params)


def network(device, dtype):
    """torch's small network, a parameter without dims whose gradient is fixed, and an input."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid())
    scalar = torch.full((), 0.5, device=device, dtype=dtype, requires_grad=True)
    scalar.grad = torch.full_like(scalar, 0.25)
    x = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], device=device, dtype=dtype).reshape(3, 2)
    return model.to(device, dtype), scalar, x


def assert_steps_match(cases):
    """Seven steps of two (optimizer, network) agree. After each, remaining differences are removed.

    Step 2 has no gradients, and from step 3 on the second layer is frozen for two steps.
    """
    for step in range(7):
        for optimizer, (model, _, x) in cases:
            model.zero_grad()
            model[2].requires_grad_(not 3 <= step < 5)
            if step != 2:
                model(x).sum().backward()
            optimizer.step()
        (one, (model, scalar, _)), (two, (twin, other, _)) = cases
        for p, q in zip([*model.parameters(), scalar], [*twin.parameters(), other], strict=True):
            values = [(p.detach(), q.detach())]
            assert one.state.get(p, {}).keys() == two.state.get(q, {}).keys()
            values += [(value, two.state[q][key]) for key, value in one.state.get(p, {}).items()]
            for wanted, got in values:
                torch.testing.assert_close(got, wanted, check_device=False)
                got.copy_(wanted)


def matching_cases(options, first, second):
    """(optimizer, network) for each of two (device, backend, more options)."""
    cases = []
    for device, backend, more in (first, second):
        model, scalar, x = network(device, options.get("dtype", torch.float64))
        chosen = {k: v for k, v in options.items() if k != "dtype"}
        optimizer = make(backend, [*model.parameters(), scalar], **copy.deepcopy(chosen), **more)
        cases.append((optimizer, (model, scalar, x)))
    return cases


def test_foreach_matches_forloop():
    """foreach=True and foreach=False give the same steps."""
    for config in inputs("cpu"):
        flags = [("cpu", "auto", dict(foreach=foreach, fused=False)) for foreach in (False, True)]
        assert_steps_match(matching_cases(config.kwargs, *flags))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_matches_forloop(quick_backend, dtype):
    """A compiled executor gives the steps of the reference in every dtype."""
    device = device_of(quick_backend)
    for config in inputs(device):
        flags = [(device, quick_backend, dict(fused=fused)) for fused in (False, True)]
        assert_steps_match(matching_cases({**config.kwargs, "dtype": dtype}, *flags))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_cpu_matches_cuda(dtype):
    """The executors of the CPU and the GPU give the same steps."""
    for config in inputs("cpu"):
        flags = [(device, "auto", dict(fused=True)) for device in ("cpu", "cuda")]
        assert_steps_match(matching_cases({**config.kwargs, "dtype": dtype}, *flags))


def test_fused_does_not_step_if_found_inf(quick_backend):
    """A skipped step changes nothing, and the next step is like an optimizer's first."""
    for config, with_scale in itertools.product(inputs(device_of(quick_backend)), (False, True)):
        params, twins = ([nn.Parameter(torch.ones(2, 3)) for _ in range(5)] for _ in range(2))
        for p in params + twins:
            p.grad = torch.ones_like(p)
        options = {**config.kwargs, "fused": True}
        optimizer = make(quick_backend, params, **copy.deepcopy(options))
        optimizer.grad_scale = torch.ones(1) if with_scale else None
        optimizer.found_inf = torch.ones(())
        optimizer.step()
        assert all(torch.equal(p, torch.ones(2, 3)) for p in params)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        make(quick_backend, twins, **copy.deepcopy(options)).step()
        assert all(torch.equal(p, q) and not torch.equal(p, torch.ones(2, 3)) for p, q in zip(params, twins))


def test_step_is_noop_when_params_have_no_grad(quick_backend):
    """A step without gradients returns the closure's loss, changes nothing and makes no state."""
    for options in every_config(quick_backend, skip=()):
        params = [torch.randn(2, 3) for _ in range(2)]
        before = [p.clone() for p in params]
        optimizer = make(quick_backend, params, **options)
        assert optimizer.step(lambda: torch.tensor([1.0])) == 1
        assert all(torch.equal(p, q) for p, q in zip(params, before)) and not any(optimizer.state.values())


def test_step_is_noop_for_zero_grads(quick_backend):
    """Zero gradients change nothing, unless weight decay or a penalty does."""
    # these change weights without a gradient
    shrinking = ("weight_decay", "group_lasso", "exclusive_lasso", "l1")
    for options in every_config(quick_backend):
        if not any(options.get(name) for name in shrinking):
            p = nn.Parameter(torch.randn(5, 1))
            p.grad, before = torch.zeros_like(p), p.detach().clone()
            make(quick_backend, [p], **options).step()
            assert torch.equal(p, before)


def test_non_empty_state(quick_backend):
    """After a step no state entry is an empty dict."""
    for options in every_config(quick_backend):
        problem = Problem()
        optimizer = make(quick_backend, problem.params, **options)
        optimizer.step(problem.loss)
        assert all(len(state) for state in optimizer.state.values())
