"""Describes ProxSGD as an OptimizerInfo for torch's own tests, and holds the problem that they solve."""

import copy
from unittest import mock

import pytest
import torch
from helpers.right import device_of
from torch import nn
from torch.optim import SGD

from cges_kernels import ProxSGD

pytest.importorskip("expecttest", reason="torch.testing's internals need expecttest, of the extra `test`")
TESTED = "2.13"  # the torch version whose internals are used here; another may have changed them
try:
    # Without the mock this import would freeze torch.backends' flags for all tests of the process.
    with mock.patch("torch.backends.disable_global_flags"):
        from torch.testing._internal import common_optimizers as torchs
    from torch.testing._internal.common_optimizers import OptimizerInfo, OptimizerInput

    SGDS = next(info for info in torchs.optim_db if info.optim_cls is SGD)
    PENALTIES = [
        dict(group_lasso=0.1),
        dict(exclusive_lasso=0.01, l1=0.1, momentum=0.9, group_by="filter"),
        dict(group_lasso=0.1, exclusive_lasso=0.01, prox_mode="exact", group_by="channel"),
        dict(group_lasso=0.1, momentum=0.9, dampening=0.5, freeze_zeros="element", lr=torch.tensor(0.001)),
    ]

    def inputs(device, dtype=None):
        """The options that torch tries on its SGD, and PENALTIES; capturable too on a GPU."""
        more = [OptimizerInput(None, copy.deepcopy(options), desc=str(options)) for options in PENALTIES]
        if device != "cpu":
            more.append(OptimizerInput(None, dict(capturable=True, momentum=0.9), desc="capturable"))
        return SGDS.optim_inputs_func(device, dtype) + more

    INFO = OptimizerInfo(
        ProxSGD,
        optim_inputs_func=inputs,
        optim_error_inputs_func=SGDS.optim_error_inputs_func,
        scheduler_inputs=SGDS.scheduler_inputs,
        supported_impls=SGDS.supported_impls,
        not_og_supported_flags=SGDS.not_og_supported_flags,
        has_capturable_arg=True,
        supports_complex=False,
        supports_fused_on=("cpu", "cuda"),
    )
except (ImportError, AttributeError, TypeError) as error:
    if torch.__version__.startswith(TESTED):
        raise
    pytest.skip(f"torch's OptimizerInfo is not that of torch {TESTED}: {error}", allow_module_level=True)


def every_config(backend, skip=("differentiable",)):
    """Every input's options with all of torch's flags False, and with each flag alone True."""
    found = torchs._get_optim_inputs_including_global_cliquey_kwargs(
        device_of(backend), torch.float32, INFO, skip=skip
    )
    return [config.kwargs for config in found]


def make(backend, params, **options):
    """A ProxSGD on ``backend``, but "auto" where some option asks for the reference."""
    params = list(params)
    everyone = [options, *(group for group in params if isinstance(group, dict))]
    unfused = any(o.get("foreach") or o.get("differentiable") or o.get("fused") is False for o in everyone)
    return ProxSGD(params, **options, backend="auto" if unfused else backend)


class Problem:
    """The problem of torch's own tests: least squares of weight @ x + bias."""

    def __init__(self, transposed=False):
        weight = torch.randn(5, 10).t() if transposed else torch.randn(10, 5)
        self.params = [nn.Parameter(weight), nn.Parameter(torch.randn(10))]
        self.x = torch.randn(5)

    def loss(self):
        """Computes fresh gradients and returns the loss."""
        for p in self.params:
            p.grad = None
        loss = (self.params[0].mv(self.x) + self.params[1]).square().sum()
        loss.backward()
        return loss.detach()

    def twin(self):
        """The same problem with copies of the parameters."""
        other = copy.copy(self)
        other.params = [nn.Parameter(p.detach().clone()) for p in self.params]
        return other

    def named(self, with_names):
        """The parameters, with names where asked for."""
        return [(f"name{i}", p) for i, p in enumerate(self.params)] if with_names else self.params
