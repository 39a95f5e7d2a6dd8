"""Whatever a training loop does, ProxSGD follows torch.optim.SGD, and all executors the reference."""

import pytest
from helpers.right import MODES
from helpers.scenarios import SCENARIOS
from helpers.steps import PENALTY, assert_as_near_as
from helpers.tiers import each_value, fused_backends
from torch.optim import SGD

from cges_kernels import ProxSGD


@pytest.mark.parametrize("run", SCENARIOS.values(), ids=SCENARIOS)
def test_without_penalties_every_scenario_is_torch_sgd(checked_backend, run):
    """Parameters and buffers at the end of each scenario are those of torch.optim.SGD."""
    wanted = run(lambda params, **options: SGD(params, foreach=False, **options))
    got = run(lambda params, **options: ProxSGD(params, backend=checked_backend, **options))
    assert_as_near_as(checked_backend, got, wanted)


# Scenarios change what plans look at, and executors only get addresses. So not each pair has to run.
@each_value(run=SCENARIOS.values(), executor=fused_backends(), prox_mode=MODES)
def test_with_penalties_every_scenario_is_the_reference(executor, run, prox_mode):
    """With penalties, every executor ends each scenario where the reference does."""

    def with_backend(backend):
        options = dict(PENALTY, prox_mode=prox_mode, backend=backend)
        return run(lambda params, **more: ProxSGD(params, **options, **more))

    assert_as_near_as(executor, with_backend(executor), with_backend("reference"))
