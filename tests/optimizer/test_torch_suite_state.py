"""PyTorch's own optimizer tests, run on ProxSGD: state, hooks, copies and repr; see test_torch_suite.py."""

import copy
import io
import itertools

import pytest
import torch
from helpers.optimizer_info import INFO, Problem, every_config, inputs, make
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from cges_kernels import ProxSGD


@pytest.mark.parametrize("named", [*itertools.product((False, True), repeat=2)], ids=str)
def test_state_dict_deterministic(quick_backend, named):
    """A loaded optimizer goes on with the original's bits, whether either has names or not."""
    for options in every_config(quick_backend):
        problem = Problem()
        optimizer = make(quick_backend, problem.named(named[0]), **copy.deepcopy(options))
        for _ in range(3):
            optimizer.step(problem.loss)
        twin = problem.twin()
        resumed = make(quick_backend, twin.named(named[1]), **copy.deepcopy(options))
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert ("param_names" in resumed.param_groups[0]) == any(named)
        for _ in range(3):
            optimizer.step(problem.loss)
            resumed.step(twin.loss)
            assert all(torch.equal(p, q) for p, q in zip(problem.params, twin.params))
        states = [optimizer.state_dict(), resumed.state_dict()]
        for state in states:
            state["param_groups"][0].pop("param_names", None)
        torch.testing.assert_close(states[0]["state"], states[1]["state"], rtol=0, atol=0)
        assert states[0]["param_groups"] == states[1]["param_groups"]


def test_can_load_older_state_dict(quick_backend):
    """A file from before foreach, fused and the like loads, and these keep their values."""
    for options in every_config(quick_backend):
        problem = Problem()
        optimizer = make(quick_backend, problem.params, **options)
        optimizer.step(problem.loss)
        old, before = copy.deepcopy(optimizer.state_dict()), optimizer.state_dict()["param_groups"]
        for flag in INFO.not_og_supported_flags:
            del old["param_groups"][0][flag]
        optimizer.load_state_dict(old)
        assert optimizer.state_dict()["param_groups"] == before
        optimizer.step(problem.loss)


def test_save_load_equality_with_weights_only(quick_backend):
    """A state_dict passes through a file that torch.load(weights_only=True) reads."""
    for options, named in itertools.product(every_config(quick_backend), (False, True)):
        problem, file = Problem(), io.BytesIO()
        optimizer = make(quick_backend, problem.named(named), **options)
        optimizer.step(problem.loss)
        state = optimizer.state_dict()
        torch.save(state, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert loaded["param_groups"] == state["param_groups"]
        torch.testing.assert_close(loaded["state"], state["state"], rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_state_dict_of_the_cpu_continues_on_cuda(fused):
    """An optimizer on the GPU goes on from a state_dict of the CPU."""
    for config in inputs("cpu"):
        problem = Problem()
        optimizer = ProxSGD(problem.params, **config.kwargs, fused=fused)
        optimizer.step(problem.loss)
        twin = problem.twin()
        twin.x, twin.params = twin.x.cuda(), [nn.Parameter(p.detach().cuda()) for p in twin.params]
        moved = ProxSGD(twin.params, **config.kwargs, fused=fused)
        moved.load_state_dict(optimizer.state_dict())
        for _ in range(5):
            optimizer.step(problem.loss)
            moved.step(twin.loss)
        for p, q in zip(problem.params, twin.params):
            torch.testing.assert_close(q, p, check_device=False)


# Hooks, copies, repr


def test_step_hooks_run_in_order(quick_backend):
    """torch's global and own hooks run around a step in torch's order, until they are removed."""
    for options in every_config(quick_backend, skip=()):
        optimizer, seen = make(quick_backend, [torch.ones(2)], **options), []
        handles = [
            register_optimizer_step_pre_hook(lambda *_, seen=seen: seen.append("before all")),
            register_optimizer_step_post_hook(lambda *_, seen=seen: seen.append("after all")),
            optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append("before")),
            optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append("after")),
        ]
        optimizer.step()
        for handle in handles:
            handle.remove()
        optimizer.step()
        assert seen == ["before all", "before", "after", "after all"]


def test_state_dict_hooks(quick_backend):
    """Hooks before and after state_dict see and change what is saved."""
    for options in every_config(quick_backend, skip=()):
        optimizer = make(quick_backend, [torch.ones(2)], **options)
        optimizer.register_state_dict_pre_hook(lambda o: o.state.update(test=1))
        assert optimizer.state_dict()["state"] == {"test": 1}
        optimizer.register_state_dict_post_hook(lambda o, state: {**state, "ran": state["state"].pop("test")})
        state = optimizer.state_dict()
        assert state["ran"] == 1 and not state["state"]


def test_load_state_dict_hooks(quick_backend):
    """Hooks before load_state_dict run in their order, and the one after sees the result."""
    for options in every_config(quick_backend, skip=()):
        optimizer, seen = make(quick_backend, [torch.ones(2)], **options), []
        state = copy.deepcopy(optimizer.state_dict())

        def with_lr(lr):
            return lambda o, loaded: {**loaded, "param_groups": [dict(loaded["param_groups"][0], lr=lr)]}

        optimizer.register_load_state_dict_pre_hook(with_lr(0.002))
        optimizer.register_load_state_dict_pre_hook(with_lr(0.003), prepend=True)
        optimizer.register_load_state_dict_post_hook(
            lambda o, seen=seen: seen.append(o.param_groups[0]["lr"])
        )
        optimizer.load_state_dict(state)
        assert seen == [0.002]


def test_deepcopy_copies_all_public_attributes(quick_backend):
    """A deep copy has the same public attributes."""
    for options in every_config(quick_backend):
        problem = Problem()
        optimizer = make(quick_backend, problem.params, **options)
        optimizer.step(problem.loss)
        one, two = ({k for k in vars(o) if k[0] != "_"} for o in (optimizer, copy.deepcopy(optimizer)))
        assert one == two


def test_optimizer_can_be_printed(quick_backend):
    """repr shows the class and the penalties."""
    for options in every_config(quick_backend, skip=()):
        printed = repr(make(quick_backend, Problem().params, **options))
        assert printed.startswith("ProxSGD") and "group_lasso" in printed
