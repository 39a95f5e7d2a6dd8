"""CoefficientWarmup: the values in force, resuming, and what it refuses."""

import io

import pytest
import torch
from torch import nn

from cges_kernels import ProxSGD
from cges_kernels.recipes import CoefficientWarmup, sparsity_param_groups

COEFFICIENTS = ("group_lasso", "exclusive_lasso", "l1")


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def warmed(steps=4):
    model = mlp()
    groups = sparsity_param_groups(model, group_lasso=[0.4, 0.8], exclusive_lasso=0.2)
    optimizer = ProxSGD(groups, lr=0.1, l1=0.1)
    return model, optimizer, CoefficientWarmup(optimizer, steps)


def test_warmup_values():
    _, optimizer, warmup = warmed()
    seen = []
    for _ in range(7):
        seen.append([group["group_lasso"] for group in optimizer.param_groups])
        optimizer.step()
        warmup.step()
    wanted = [[0.4 * k, 0.8 * k, 0.0] for k in (0, 0.25, 0.5, 0.75, 1, 1, 1)]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(wanted))
    assert warmup.get_last_coefficients()[:2] == [
        {"group_lasso": 0.4, "exclusive_lasso": 0.2, "l1": 0.1},
        {"group_lasso": 0.8, "exclusive_lasso": 0.2, "l1": 0.1},
    ]


def test_warmup_of_no_steps_is_full_at_once():
    _, _, warmup = warmed(steps=0)
    assert warmup.get_last_coefficients()[0]["group_lasso"] == 0.4


def test_warmup_beside_a_learning_rate_scheduler():
    _, optimizer, warmup = warmed()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(2):
        optimizer.step()
        schedule.step()
        warmup.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.025] * 3
    assert [group["group_lasso"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.4, 0.0])


def test_warmup_resumes_from_its_state():
    _, optimizer, warmup = warmed()
    warmup.step()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "warmup": warmup.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    for build_first in (True, False):
        model = mlp()
        groups = sparsity_param_groups(model, group_lasso=[0.4, 0.8], exclusive_lasso=0.2)
        other = ProxSGD(groups, lr=0.1, l1=0.1)
        resumed = CoefficientWarmup(other, 9) if build_first else None
        other.load_state_dict(saved["optimizer"])
        resumed = resumed or CoefficientWarmup(other, 9)
        resumed.load_state_dict(saved["warmup"])
        assert resumed.get_last_coefficients()[0]["group_lasso"] == pytest.approx(0.1)
        resumed.step()
        assert resumed.get_last_coefficients()[1]["group_lasso"] == pytest.approx(0.4)


def test_warmup_resumes_from_last_epoch_as_schedulers_do():
    _, optimizer, _ = warmed()
    warmup = CoefficientWarmup(optimizer, 4, last_epoch=1)
    assert warmup.last_epoch == 2
    assert optimizer.param_groups[0]["group_lasso"] == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"last_epoch=1: expected .* without .*initial_group_lasso"):
        CoefficientWarmup(ProxSGD(mlp().parameters()), 4, last_epoch=1)


def test_warmup_outlives_a_checkpoint_that_knows_no_coefficients():
    _, optimizer, warmup = warmed()
    plain = torch.optim.SGD([{"params": group["params"]} for group in optimizer.param_groups], lr=0.1)
    optimizer.load_state_dict(plain.state_dict())
    warmup.step()
    assert [group["group_lasso"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.2, 0.0])


def test_warmup_takes_in_a_later_param_group():
    _, optimizer, warmup = warmed()
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(2, 2)))], "group_lasso": 0.6})
    warmup.step()
    assert optimizer.param_groups[-1]["group_lasso"] == pytest.approx(0.15)


def test_warmup_changes_tensor_coefficients_in_place():
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([{"params": [parameter], **{key: torch.tensor(0.8) for key in COEFFICIENTS}}])
    tensor = optimizer.param_groups[0]["group_lasso"]
    warmup = CoefficientWarmup(optimizer, 4)
    assert tensor.item() == 0
    warmup.step()
    assert tensor.item() == pytest.approx(0.2)
    assert optimizer.param_groups[0]["group_lasso"] is tensor
    assert optimizer.param_groups[0]["initial_group_lasso"].item() == pytest.approx(0.8)


@pytest.mark.parametrize("steps", [-1, 1.5, True])
def test_warmup_refuses_steps(steps):
    with pytest.raises(ValueError, match="steps: expected an int >= 0, got"):
        warmed(steps=steps)


def test_warmup_refuses_an_optimizer_without_coefficients():
    with pytest.raises(
        ValueError, match=r"expected .* got SGD without \['group_lasso', 'exclusive_lasso', 'l1'\]"
    ):
        CoefficientWarmup(torch.optim.SGD(mlp().parameters()), 4)


def test_the_first_step_of_a_warmup_step_is_plain_sgd():
    model, optimizer, _ = warmed()
    before = model[0].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before - 0.1)
