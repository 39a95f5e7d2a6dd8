"""Schedules of the coefficients: values, resuming, use beside torch's schedulers, what they refuse."""

import copy
import io

import pytest
import torch
from helpers.recipes import COEFFICIENTS, mlp
from helpers.schedules import warmed
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, SequentialLR, StepLR

from cges_kernels import CubicRamp, ProxSGD, TargetDensity
from cges_kernels.training.recipes import sparsity_param_groups
from cges_kernels.training.schedules import CoefficientWarmup


def test_warmup_values():
    """Coefficients rise evenly from 0 to their full values, keep their ratios, and stay there."""
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
    """steps=0 means no warm-up."""
    _, _, warmup = warmed(steps=0)
    assert warmup.get_last_coefficients()[0]["group_lasso"] == 0.4


def test_warmup_beside_a_learning_rate_scheduler():
    """Neither schedule disturbs the other's values."""
    _, optimizer, warmup = warmed()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(2):
        optimizer.step()
        schedule.step()
        warmup.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.025] * 3
    assert [group["group_lasso"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.4, 0.0])


def test_warmup_resumes_from_its_state():
    """A loaded warm-up goes on from its step, built before or after the optimizer was loaded."""
    _, optimizer, warmup = warmed()
    warmup.step()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "warmup": warmup.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    for build_first in (True, False):
        model = mlp(3, 4, 2)
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
    """last_epoch continues from full values kept in the param groups, and is an error without them."""
    _, optimizer, _ = warmed()
    warmup = CoefficientWarmup(optimizer, 4, last_epoch=1)
    assert warmup.last_epoch == 2
    assert optimizer.param_groups[0]["group_lasso"] == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"last_epoch=1: expected .* without .*initial_group_lasso"):
        CoefficientWarmup(ProxSGD(mlp(3, 4, 2).parameters()), 4, last_epoch=1)


def test_warmup_outlives_a_checkpoint_that_knows_no_coefficients():
    """Loading a file of torch.optim.SGD in mid-warm-up keeps the full values."""
    _, optimizer, warmup = warmed()
    plain = torch.optim.SGD([{"params": group["params"]} for group in optimizer.param_groups], lr=0.1)
    optimizer.load_state_dict(plain.state_dict())
    warmup.step()
    assert [group["group_lasso"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.2, 0.0])


def test_warmup_takes_in_a_later_param_group():
    """A param group added later is warmed up with the others."""
    _, optimizer, warmup = warmed()
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(2, 2)))], "group_lasso": 0.6})
    warmup.step()
    assert optimizer.param_groups[-1]["group_lasso"] == pytest.approx(0.15)


SCHEDULES = {
    "warmup": lambda optimizer: CoefficientWarmup(optimizer, 4),
    "cubic": lambda optimizer: CubicRamp(optimizer, 4),
    "target": lambda optimizer: TargetDensity(optimizer, 0.5, 4),
}


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("share", ["groups", "coefficients", "memory"])
def test_a_shared_tensor_goes_as_a_number_does(make, share):
    """A tensor shared by groups, coefficients or a view is scaled once a step, not once a use."""

    def run(one, other):
        params = [nn.Parameter(torch.tensor([[1.0, 0.0], [2.0, 3.0]])) for _ in range(2)]
        groups = [{"params": [params[0]], **one}, {"params": [params[1]], **other}]
        optimizer = ProxSGD(groups, lr=0.0)
        schedule = make(optimizer)
        seen = []
        for _ in range(5):
            seen.append([row[key] for row in schedule.get_last_coefficients() for key in COEFFICIENTS])
            schedule.step()
        return torch.tensor(seen), optimizer.param_groups

    tensor = torch.tensor(0.8)
    if share == "groups":
        given = dict(l1=tensor), dict(l1=tensor)
    elif share == "coefficients":
        given = dict(l1=tensor, group_lasso=tensor), dict(l1=0.1)
    else:
        given = dict(l1=tensor), dict(group_lasso=tensor.view(1))
    wanted, _ = run(*({key: float(x) for key, x in group.items()} for group in given))
    found, groups = run(*given)
    torch.testing.assert_close(found, wanted)
    assert found.any() and groups[0]["l1"] is tensor
    assert tensor._version == 1 + 5  # written once when the schedule was made, and once in each step


def test_a_later_group_may_share_a_tensor_that_was_scaled():
    """Its full value is the tensor's full value, not the scaled one."""
    tensor = torch.tensor(0.8)
    optimizer = ProxSGD([nn.Parameter(torch.ones(2, 2))], lr=0.1, l1=tensor)
    warmup = CoefficientWarmup(optimizer, 4)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
    for k in range(1, 4):
        warmup.step()
        assert float(tensor) == pytest.approx(0.2 * k)
    assert float(optimizer.param_groups[1]["initial_l1"]) == pytest.approx(0.8)


def test_warmup_changes_tensor_coefficients_in_place():
    """The param group keeps its tensor object, which kernels and graphs read."""
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
    """Negative and fractional steps are errors."""
    with pytest.raises(ValueError, match="steps: expected an int >= 0, got"):
        warmed(steps=steps)


def test_warmup_refuses_an_optimizer_without_coefficients():
    """An optimizer without any of the coefficients is an error."""
    with pytest.raises(
        ValueError, match=r"expected .* got SGD without \['group_lasso', 'exclusive_lasso', 'l1'\]"
    ):
        CoefficientWarmup(torch.optim.SGD(mlp(3, 4, 2).parameters()), 4)


def test_the_first_step_of_a_warmup_step_is_plain_sgd():
    """The warm-up sets the coefficients to 0 as soon as it is made."""
    model, optimizer, _ = warmed()
    before = model[0].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before - 0.1)


def test_cubic_values():
    """The ramp is 0 until `begin` and then rises by its cubic formula."""
    _, optimizer, _ = warmed(steps=0)
    ramp = CubicRamp(optimizer, steps=4, begin=2)
    seen = []
    for _ in range(9):
        seen.append([group["group_lasso"] for group in optimizer.param_groups])
        optimizer.step()
        ramp.step()
    factors = [0, 0, 0, 1 - 0.75**3, 1 - 0.5**3, 1 - 0.25**3, 1, 1, 1]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor([[0.4 * x, 0.8 * x, 0.0] for x in factors]))


def test_cubic_resumes_from_its_state():
    """Its state is plain numbers, and a loaded ramp goes on from it."""
    _, optimizer, _ = warmed(steps=0)
    ramp = CubicRamp(optimizer, steps=4)
    ramp.step()
    saved = ramp.state_dict()
    assert saved == {"steps": 4, "begin": 0, "last_epoch": 1}
    _, other, _ = warmed(steps=0)
    resumed = CubicRamp(other, steps=9, begin=3)
    resumed.load_state_dict(saved)
    assert resumed.get_last_coefficients() == ramp.get_last_coefficients()
    resumed.step()
    assert other.param_groups[0]["group_lasso"] == pytest.approx(0.4 * (1 - 0.5**3))


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 1.5}, {"steps": 3, "begin": -1}])
def test_cubic_refuses(options):
    """Bad numbers of steps are errors."""
    with pytest.raises(ValueError, match=r"(steps|begin): expected an int >= [01], got"):
        CubicRamp(warmed()[1], **options)


def stepped(optimizer):
    """The optimizer, with zero gradients, so that it can step."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    return optimizer


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_a_chain_with_an_lr_scheduler(make):
    """In a ChainedScheduler each schedule gives the values that it gives alone."""
    optimizer, other = (stepped(ProxSGD([nn.Parameter(torch.ones(2, 2))], lr=0.1, l1=0.8)) for _ in range(2))
    chain = ChainedScheduler([make(optimizer), StepLR(optimizer, 1, gamma=0.5)])
    alone = make(other)
    for k in range(1, 5):
        optimizer.step()
        chain.step()
        other.step()
        alone.step()
        assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**k
        assert chain._schedulers[0].get_last_coefficients() == alone.get_last_coefficients()


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_a_sequence_is_refused(make):
    """SequentialLR is an error: it sets schedules back, and starts them through their lr."""
    optimizer = stepped(ProxSGD([nn.Parameter(torch.ones(2, 2))], lr=0.1, l1=0.8))
    schedules = [StepLR(optimizer, 1), make(optimizer)]
    with pytest.raises(RuntimeError, match=r"last_epoch: expected 0 or more, got -1. SequentialLR"):
        SequentialLR(optimizer, schedules, [5])


def test_lr_is_told_and_not_changed():
    """get_last_lr returns a copy of a tensor lr."""
    lr = torch.tensor(0.1)
    optimizer = ProxSGD([nn.Parameter(torch.ones(2, 2))], lr=lr, l1=0.8)
    warmup = CoefficientWarmup(optimizer, 4)
    (told,) = warmup.get_last_lr()
    assert told == lr and told is not lr and optimizer.param_groups[0]["lr"] is lr


def test_param_groups_may_go_and_others_come():
    """Full values follow the param group, not its place in the list."""

    def group(l1):
        return {"params": [nn.Parameter(torch.ones(2, 2))], "l1": l1}

    optimizer = ProxSGD([group(1.0), group(2.0)], lr=0.1)
    warmup = CoefficientWarmup(optimizer, 2)
    optimizer.param_groups.pop()
    warmup.step()
    optimizer.add_param_group(group(7.0))
    warmup.step()
    assert [row["l1"] for row in warmup.get_last_coefficients()] == [1.0, 7.0]


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_what_does_not_fit_changes_nothing(make):
    """A refused step or state leaves the schedule as it was."""
    optimizer = ProxSGD([nn.Parameter(torch.ones(2, 2))], lr=0.1, l1=0.8)
    schedule = make(optimizer)
    before = schedule.state_dict(), schedule.get_last_coefficients()
    with pytest.raises(ValueError, match="epoch: expected None"):
        schedule.step(3)
    with pytest.raises(ValueError, match=r"state_dict: expected .* without \['last_epoch'\]"):
        schedule.load_state_dict({key: 7 for key in schedule.state_dict() if key != "last_epoch"})
    assert (schedule.state_dict(), schedule.get_last_coefficients()) == before
    with pytest.raises(TypeError, match="freeze: expected a bool, got 'False'"):
        TargetDensity(optimizer, 0.5, 4, freeze="False")


IMPOSSIBLE = {
    "last_epoch": (-7, 1.5, "1", None),
    "steps": (-3, "4", float("nan"), torch.tensor(4)),
    "begin": (-1,),
    "target": (2.0, "half"),
    "factor": (float("nan"), -1.0, 0, "1"),
    "density": (-1.0, None),
    "_error": (float("nan"),),
    "_scales": ([float("nan")],),
    "frozen": (1,),
}


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_a_state_that_no_schedule_has_is_refused(make):
    """A value that the schedule could not have saved is an error that names it, and nothing is loaded."""
    schedule = make(ProxSGD([nn.Parameter(torch.ones(2, 2))], lr=0.1, l1=0.8))
    saved = schedule.state_dict()
    schedule.step()
    now = schedule.state_dict(), schedule.get_last_coefficients()
    for key in saved.keys() & IMPOSSIBLE:
        for value in IMPOSSIBLE[key]:
            with pytest.raises((ValueError, TypeError), match=f"{key}: expected"):
                schedule.load_state_dict({**saved, key: value})
    with pytest.raises(TypeError, match="state_dict: expected a dict, got NoneType"):
        schedule.load_state_dict(None)
    assert (schedule.state_dict(), schedule.get_last_coefficients()) == now


def test_only_the_newest_schedule_of_an_optimizer_steps():
    """Two would undo each other, so the older one refuses; a copy with an optimizer of its own does not."""
    _, optimizer, warmup = warmed()
    copied = copy.deepcopy(warmup)
    ramp = CubicRamp(optimizer, 4)
    for step in (warmup.step, ChainedScheduler([warmup, StepLR(stepped(optimizer), 1)]).step):
        with pytest.raises(RuntimeError, match=r"CoefficientWarmup: expected .* got a newer CubicRamp"):
            step()
    ramp.step()
    copied.step()
    assert ramp.get_last_coefficients()[0]["group_lasso"] == pytest.approx(0.4 * (1 - 0.75**3))
    assert copied.get_last_coefficients()[0]["group_lasso"] == pytest.approx(0.1)
    for bad, error in ((dict(optimizer=3), TypeError), (dict(last_epoch=1.5), ValueError)):
        with pytest.raises(error, match=r"(optimizer|last_epoch): expected"):
            CubicRamp(**{"optimizer": optimizer, "steps": 4, **bad})
