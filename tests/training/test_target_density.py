"""TargetDensity: the density that training reaches, how it lands there, resuming, and what it refuses."""

import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.recipes import COEFFICIENTS, mlp
from helpers.schedules import warmed
from torch import nn

from cges_kernels import ProxAdamW, ProxSGD, TargetDensity, cges_param_groups, sparsity_report
from cges_kernels.core.shrinkage import shrink
from cges_kernels.training import removal
from cges_kernels.training.recipes import sparsity_param_groups
from examples.common.data import load
from examples.common.networks import LeNet


def digits():
    """400 images of digits and their labels."""
    pytest.importorskip("sklearn")
    x, y = map(torch.from_numpy, load("digits")[:2])
    return x[:400], y[:400]


def cges_sgd(model, lam):
    return ProxSGD(cges_param_groups(model, lam, scale="size"), lr=0.05, momentum=0.9)


def l1_adamw(model, lam):
    return ProxAdamW(sparsity_param_groups(model, l1=lam), lr=0.003)


def controlled(density, lam=0.01, epochs=50, make=cges_sgd, **options):
    """A LeNet trained on 400 digits under control, 13 steps an epoch: (model, optimizer, control)."""
    x, y = digits()
    model = LeNet(8)
    optimizer = make(model, lam)
    steps = 13 * epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    control = TargetDensity(optimizer, density, steps // 2, **options)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
            control.step()
    return model, optimizer, control


def test_a_weight_that_dies_as_a_whole_is_told_once():
    """A layer through which nothing passes any more is named, with what may help."""
    model = mlp(3, 4, 2)
    optimizer = ProxSGD(sparsity_param_groups(model, l1=1.0), lr=0.1)
    control = TargetDensity(optimizer, 0.5, 1000)
    control.step()
    with torch.no_grad():
        model[1].weight.zero_()
    with pytest.warns(UserWarning, match=r"density 0\.5: 1\.weight is zero as a whole .*: take more steps"):
        for _ in range(10):
            control.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            control.step()


OTHERS = pytest.mark.full(
    "other densities are reached too, and from lambdas far from the right one; each trains for seconds"
)


@pytest.mark.parametrize(
    "density, lam, make",
    [
        (0.3, 0.01, cges_sgd),
        *(pytest.param(density, 0.01, cges_sgd, marks=OTHERS) for density in (0.1, 0.6)),
        *(pytest.param(0.3, lam, cges_sgd, marks=OTHERS) for lam in (0.1, 1e-4)),
        *(pytest.param(density, 0.3, l1_adamw, marks=OTHERS) for density in (0.3, 0.6)),
    ],
)
def test_the_density_is_reached_within_a_point(density, lam, make):
    """Training ends at the density without a warning, with a model that works and zeros that are frozen."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer, control = controlled(density, lam, make=make)
    percent = sparsity_report(model).total.percent_nonzero
    assert abs(percent - 100 * density) <= 1
    assert control.measure() == pytest.approx(percent / 100)
    x, y = digits()
    assert (model.eval()(x).argmax(1) == y).float().mean() > (0.7 if density < 0.3 else 0.9)
    assert all(group["freeze_zeros"] == "element" for group in optimizer.param_groups[:-1])
    assert optimizer.param_groups[-1]["freeze_zeros"] is None


def test_without_landing_the_coefficients_stay():
    """freeze=False ends near the density, with coefficients in force and nothing frozen."""
    _, optimizer, control = controlled(0.3, epochs=25, freeze=False)
    assert abs(control.measure() - 0.3) < 0.15
    assert optimizer.param_groups[0]["group_lasso"] > 0
    assert all(group["freeze_zeros"] is None for group in optimizer.param_groups)


def few_steps(model, optimizer, control, count):
    """Steps on random gradients, the same each time."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        for p in model.parameters():
            p.grad = 0.1 * torch.randn(p.shape, generator=generator)
        optimizer.step()
        control.step()


def small_control(make=ProxSGD, **options):
    """(model, optimizer, control) of a small network, towards a density of .5."""
    model = mlp(3, 4, 2)
    groups = sparsity_param_groups(model, group_lasso=[0.4, 0.8], exclusive_lasso=0.2)
    optimizer = make(groups, **(dict(lr=0.1, momentum=0.9) if make is ProxSGD else dict(lr=0.03)))
    return model, optimizer, TargetDensity(optimizer, 0.5, **{"steps": 20, **options})


def test_ratios_stay_and_the_factor_climbs():
    """While too many weights are nonzero the coefficients rise, in the recipe's ratios."""
    model, optimizer, control = small_control()
    seen = []
    for _ in range(10):
        seen.append([group["group_lasso"] for group in optimizer.param_groups])
        few_steps(model, optimizer, control, 1)
    first, second, rest = map(list, zip(*seen))
    assert first == sorted(first) and first[-1] > first[0] == pytest.approx(0.004)
    assert second == pytest.approx([2 * x for x in first]) and rest == [0] * 10


@pytest.mark.filterwarnings("ignore:density")
@pytest.mark.parametrize("at, make", [(7, ProxSGD), (30, ProxSGD), (30, ProxAdamW)])
def test_control_resumes_where_it_was(at, make):
    """Saved during the ramp of 20 steps or after it, control goes on with the same bits."""
    model, optimizer, control = small_control(make)
    few_steps(model, optimizer, control, at)
    file = io.BytesIO()
    torch.save([x.state_dict() for x in (model, optimizer, control)], file)
    file.seek(0)
    other = small_control(make)
    for x, state in zip(other, torch.load(file, weights_only=True)):
        x.load_state_dict(state)
    few_steps(model, optimizer, control, 15)
    few_steps(*other, 15)
    assert other[2].state_dict() == control.state_dict()
    other[2].load_state_dict({key: x for key, x in control.state_dict().items() if key != "_scales"})
    assert other[2].get_last_coefficients() == control.get_last_coefficients()
    for a, b in zip(model.parameters(), other[0].parameters()):
        assert torch.equal(a, b)


def test_the_landing_cuts_each_weight_alike():
    """Whole groups with the smallest norms leave, the same share of each weight; the rest keeps its value."""
    model = mlp(8, 4, 6)
    optimizer = ProxSGD(sparsity_param_groups(model, group_lasso=1e-3), lr=0.1, momentum=0.9)
    control = TargetDensity(optimizer, 0.5, 3)
    weights = [layer.weight for layer in model]
    before = [w.detach().clone() for w in weights]
    few_steps(model, optimizer, control, 2)
    assert control.get_last_coefficients()[0]["group_lasso"] > 0
    with torch.no_grad():
        for w, x in zip(weights, before):
            w.copy_(x)
    control.step()
    for w, x in zip(weights, before):
        kept = x.norm(dim=0).argsort()[x.shape[1] // 2 :]
        assert torch.equal(w[:, kept], x[:, kept]) and w.count_nonzero() == w.numel() // 2
        assert not torch.signbit(w[w == 0]).any()
    assert control.measure() == control.density == 0.5
    few_steps(model, optimizer, control, 20)  # with momentum, which would bring zeros back
    assert control.measure() == 0.5 and not any(control.get_last_coefficients()[0].values())


def test_large_weights_are_measured_on_a_sample(monkeypatch):
    """A whole run of control looks at each entry of a large weight some ten times, and lands as exactly."""
    seen = []

    def counted(z, *args):
        seen.append(z.numel())
        return shrink(z, *args)

    monkeypatch.setattr(removal, "shrink", counted)
    for penalty in (
        dict(l1=0.1),
        dict(group_lasso=0.1, exclusive_lasso=0.001),
        dict(group_lasso=0.1, group_by=(1,), view=(-1, 8)),
    ):
        w = nn.Parameter(torch.randn(256, 4096))
        optimizer = ProxSGD([{"params": [w], **penalty}], lr=0.1)
        seen.clear()
        control = TargetDensity(optimizer, 0.3, 100)
        w.grad = torch.zeros_like(w)
        for _ in range(100):
            optimizer.step()
            control.step()
        assert abs(control.measure() - 0.3) < 2e-4 and control.frozen
        assert sum(seen) < 30 * w.numel()


def test_exclusive_lasso_alone_leaves_an_entry_of_each_group():
    """A target out of its reach is told; until then the factor neither grows nor falls without end."""
    model = mlp(20, 30, 10)
    optimizer = ProxSGD(sparsity_param_groups(model, exclusive_lasso=0.1), lr=0.1)
    control = TargetDensity(optimizer, 0.02, 20)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.warns(UserWarning, match=r"density 0.02: not reached; 5.6% .* exclusive lasso alone leaves"):
        for k in range(20):
            optimizer.step()
            control.step()
            assert k == 19 or 0.005 < control.factor < 10
    assert all((layer.weight != 0).sum(0).eq(1).all() for layer in model)


def test_weights_keep_their_scale_until_the_landing():
    """Without gradients each weight keeps a third of its scale, however strong the penalty; none dies."""
    for l1, group_lasso in ((0.0, 1e-4), (0.0, 100.0), (3.0, 0.0)):
        model = mlp(40, 30, 20)
        groups = sparsity_param_groups(model, group_lasso=group_lasso, l1=l1, scale="size")
        optimizer = ProxSGD(groups, lr=0.1, momentum=0.9)
        control = TargetDensity(optimizer, 0.2, 60)
        weights = [layer.weight for layer in model]
        before = [w.norm() for w in weights]
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for _ in range(59):
            optimizer.step()
            control.step()
        assert all(x / 3 < w.norm() < x for w, x in zip(weights, before))
        control.step()
        assert abs(control.measure() - 0.2) < 0.01 and all(w.any() for w in weights)


@pytest.mark.parametrize(
    "net, adam, lam, density",
    [
        ("mlp", True, 0.01, 0.5),
        pytest.param("mlp", False, 0.1, 0.2, marks=OTHERS),
        pytest.param("lenet", False, 0.001, 0.2, marks=OTHERS),
    ],
)
def test_a_short_run_lands_with_a_network_that_works(net, adam, lam, density):
    """In 200 steps (AdamW 500) the density is met with no layer dead, from coefficients that are far off."""
    torch.manual_seed(0)
    x, y = digits()
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)]
    model = nn.Sequential(nn.Flatten(), *layers) if net == "mlp" else LeNet(8)
    groups = cges_param_groups(model, lam, scale="size")
    optimizer = ProxAdamW(groups, lr=1e-3) if adam else ProxSGD(groups, lr=0.05, momentum=0.9)
    steps = 500 if adam else 200
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    control = TargetDensity(optimizer, density, steps // 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(steps):
            rows = torch.randint(len(x), (32,))
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
            control.step()
    assert abs(control.measure() - density) <= 0.01
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.6


def test_only_weights_under_a_penalty_count():
    """Biases and other weights without a penalty are not in the density."""
    model, _, control = small_control()
    assert control.measure() == 1
    with torch.no_grad():
        model[0].bias.zero_()
        model[0].weight[0] = 0  # 3 of 12 + 8
    assert control.measure() == 17 / 20


@pytest.mark.parametrize("density", [0, -0.5, 1.1, float("nan"), "half"])
def test_a_density_that_is_none_is_refused(density):
    """Only numbers in (0, 1] are densities."""
    with pytest.raises(ValueError, match=r"density: expected a fraction of nonzero weights in \(0, 1\], got"):
        TargetDensity(warmed()[1], density, 10)


def test_control_refuses_an_optimizer_without_a_penalty():
    """Nothing to control, or nothing to freeze with, is an error."""
    with pytest.raises(ValueError, match=r"ProxSGD: expected a param group with .* > 0 .* density of 0.5"):
        TargetDensity(ProxSGD(mlp(3, 4, 2).parameters(), lr=0.1), 0.5, 10)
    with pytest.raises(ValueError, match=r"got SGD without \['group_lasso'"):
        TargetDensity(torch.optim.SGD(mlp(3, 4, 2).parameters(), lr=0.1), 0.5, 10)
    keys = dict.fromkeys(COEFFICIENTS, 0.1)
    with pytest.raises(ValueError, match=r"freeze=True: expected .* freeze_zeros, got SGD"):
        TargetDensity(torch.optim.SGD([{"params": mlp(3, 4, 2).parameters(), **keys}]), 0.5, 10)


def test_a_density_out_of_reach_is_told_once():
    """If weights do not become zero, one warning gives the density and the coefficients' factor."""
    model, optimizer, control = small_control(steps=5, freeze=False)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with pytest.warns(UserWarning) as told:
        few_steps(model, optimizer, control, 400)
    (warning,) = told
    assert (
        "density 0.5: not reached; 100.0% of the weights are nonzero with the coefficients at 1e+06"
        in str(warning.message)
    )


def test_weights_that_are_gone_are_told():
    """If weights do not come back from zero, the warning says that instead."""
    model, optimizer, control = small_control(steps=5)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with torch.no_grad():
        model[0].weight.zero_()
    with pytest.warns(UserWarning, match=r"density 0.5: not reached; 40.0% .*zeros do not come back"):
        few_steps(model, optimizer, control, 400)


def test_control_fills_tensor_coefficients_in_place():
    """The param group keeps its tensor object."""
    parameter = nn.Parameter(torch.ones(2, 2))
    group = {"params": [parameter], **{key: torch.tensor(0.8) for key in COEFFICIENTS}, "freeze_zeros": None}
    optimizer = torch.optim.SGD([group])
    tensor = optimizer.param_groups[0]["group_lasso"]
    TargetDensity(optimizer, 0.5, 10)
    assert optimizer.param_groups[0]["group_lasso"] is tensor and tensor.item() == pytest.approx(0.008)
