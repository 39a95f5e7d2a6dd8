"""What docs/training.md says about exact zeros is true, and its code runs."""

import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.programs import ROOT
from helpers.steps import assert_same_bits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cges_kernels import ProxSGD, cges_param_groups, explain, sparsity_param_groups

PAGE = ROOT / "docs" / "training.md"
FREEZE, AVERAGE, COMPILED, FINETUNING, DISTRIBUTED = re.findall(
    r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL
)
THRESHOLD = dict(group_lasso=0.1)


def one_weight(shape=(4, 6)):
    """A parameter with a gradient of zeros, the same each time."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(shape, generator=generator).to(torch.get_default_device()))
    p.grad = torch.zeros_like(p)
    return p


def killed(backend, **options):
    """A parameter and its optimizer after a step that zeroed the second input feature only."""
    p = one_weight()
    optimizer = ProxSGD([p], lr=1.0, momentum=0.9, **THRESHOLD, **options, backend=backend)
    p.grad[:, 1] = p.detach()[:, 1]
    optimizer.step()
    p.grad.zero_()
    assert (p[:, 1] == 0).all() and (p[:, [0, 2, 3, 4, 5]] != 0).all()
    return p, optimizer


def test_momentum_revives_a_dead_group(checked_backend):
    """The next step, with a zero gradient, moves the dead group by its momentum."""
    p, optimizer = killed(checked_backend)
    optimizer.step()
    assert (p[:, 1] != 0).all()


def test_a_threshold_above_the_momentum_does_not_let_it(checked_backend):
    """With a large enough threshold the group stays dead."""
    p, optimizer = killed(checked_backend)
    optimizer.param_groups[0]["group_lasso"] = 100.0
    optimizer.step()
    assert (p[:, 1] == 0).all()


@pytest.mark.parametrize("mode", ["group", "element"])
def test_freezing_half_way_stops_it(checked_backend, mode):
    """The page's code keeps dead groups, or dead elements, at zero from then on."""
    p, optimizer = killed(checked_backend)
    p.data[0, 0] = 0  # a zero in a group that is alive
    exec(FREEZE.replace('"group"  #', f'"{mode}"  #'), {"optimizer": optimizer})
    optimizer.step()
    assert (p[:, 1] == 0).all() and (optimizer.state[p]["momentum_buffer"][:, 1] == 0).all()
    p.grad.fill_(1.0)
    optimizer.step()
    assert (p[:, 1] == 0).all() and (p[1:, 0] != 0).all()
    assert (p[0, 0] == 0) == (mode == "element")


def test_element_keeps_what_is_initialised_with_zeros(checked_backend):
    """freeze_zeros="element" freezes biases that begin with zeros, as the page warns."""
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    ProxSGD([p], lr=0.1, freeze_zeros="element", backend=checked_backend).step()
    assert (p == 0).all()


def norms_until_dead(weight_decay, backend):
    """The norms of a weight without gradients, step by step until all of it is zero."""
    p = one_weight()
    p.data[:, 1] = 0
    optimizer = ProxSGD([p], lr=0.5, weight_decay=weight_decay, **THRESHOLD, backend=backend)
    norms = []
    while (p != 0).any():
        optimizer.step()
        norms.append(p.norm().item())
        assert (p[:, 1] == 0).all()
    return norms


def test_weight_decay_leaves_zeros_and_lets_groups_die_earlier(checked_backend):
    """Weight decay keeps zeros, and groups die sooner under it."""
    without, decayed = (norms_until_dead(weight_decay, checked_backend) for weight_decay in (0.0, 0.5))
    assert len(decayed) < len(without) and decayed[0] < without[0]


@pytest.mark.parametrize("given_to", ["groups", "optimizer"])
def test_who_gets_the_weight_decay(given_to):
    """Given to the param groups it is for layers' weights only; given to the optimizer it is for all."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    to = {name: dict(weight_decay=0.1) if name == given_to else {} for name in ("groups", "optimizer")}
    optimizer = ProxSGD(cges_param_groups(model, lam=1e-3, **to["groups"]), **to["optimizer"])
    decays = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["param_names"]}
    assert decays["0.weight"] == 0.1
    assert decays["1.weight"] == decays["1.bias"] == (0.1 if given_to == "optimizer" else 0)


def conv_and_norm():
    """A convolution whose first filter is dead, a batch norm behind it, and gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    with torch.no_grad():
        model[0].weight[0] = 0
        model[1].bias.fill_(0.5)
    x = torch.randn(16, 3, 6, 6)
    (model(x) * torch.randn(16, 4, 4, 4)).mean().backward()
    return model, x


def test_batch_norm_undoes_the_scale_of_a_layer():
    """Halving a layer in front of a batch norm changes nothing; a dead filter gives the shift."""
    model, x = conv_and_norm()
    before = model(x)
    with torch.no_grad():
        model[0].weight[1:] *= 0.5
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)
    assert (before[:, 0] == 0.5).all()


@pytest.mark.parametrize("freeze_zeros", [None, "group"])
def test_batch_norm_revives_dead_filters(checked_backend, freeze_zeros):
    """A dead filter's gradient exceeds a threshold above those of living filters, unless frozen."""
    model, _ = conv_and_norm()
    weight = model[0].weight
    norms = weight.grad.flatten(1).norm(dim=1)
    assert norms[0] > 30 * norms[1:].max()
    assert model[1].eps ** -0.5 == pytest.approx(300, rel=0.1)
    options = dict(group_by="filter", freeze_zeros=freeze_zeros, backend=checked_backend)
    ProxSGD([weight], lr=0.1, group_lasso=2 * norms[1:].max().item(), **options).step()
    assert (weight[0] == 0).all() == (freeze_zeros == "group")


def test_averages_are_given_the_zeros():
    """An exponential average has no zeros until the page's code gives them to it."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)
    with torch.no_grad():
        model.weight[:, 1] = 0
    for _ in range(10):
        averaged.update_parameters(model)
    assert (averaged.module.weight != 0).all()
    exec(AVERAGE, {"averaged": averaged, "model": model, "torch": torch})
    assert torch.equal(averaged.module.weight == 0, model.weight == 0)
    averaged.update_parameters(model)
    assert torch.equal(averaged.module.weight == 0, model.weight == 0)


def test_tied_weights_count_once():
    """A weight of two layers is regularised once, and one that an embedding owns is not."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.head.weight, self.second.weight = self.embedding.weight, self.first.weight

    optimizer = ProxSGD(cges_param_groups(Tied(), lam=1.0), lr=0.1)
    regularised = [
        name
        for g in optimizer.param_groups
        if g["group_lasso"] or g["exclusive_lasso"]
        for name in g["param_names"]
    ]
    assert regularised == ["first.weight"]
    assert "second.weight" not in str(explain(optimizer))


@pytest.mark.filterwarnings("ignore:.*torch.distributed is")
def test_a_distributed_checkpoint_is_saved(tmp_path):
    """The page's code saves a checkpoint and changes no weight."""
    model = nn.Linear(6, 4)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = ProxSGD(cges_param_groups(model, lam=1.0), lr=0.1, momentum=0.9)
    scope = dict(model=model, optimizer=optimizer, dcp=dcp, folder=tmp_path)
    exec(DISTRIBUTED, {**scope, "get_optimizer_state_dict": get_optimizer_state_dict})
    assert (tmp_path / ".metadata").exists()
    assert_same_bits(before, list(model.parameters()))


@pytest.mark.full("the page's code for torch.compile runs; test_compile.py compiles steps in the first tier")
def test_a_compiled_step_reads_a_tensor():
    """The page's compiled step follows a new value in its lr tensor."""
    model, _ = conv_and_norm()
    names = dict(globals(), model=model, device="cpu")
    exec(COMPILED, names)
    for lr in (0.1, 0.0):
        names["lr"].fill_(lr)
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        names["step"]()
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before)]
        assert all(moved) if lr else not any(moved)


def test_linked_files_exist():
    """No relative link of the page is broken."""
    links = re.findall(r"\]\(([^)#:]+)\)", PAGE.read_text())
    assert links and all((PAGE.parent / link).exists() for link in links)


@pytest.mark.full("the page's recipe for finetuning with Lightning works; Lightning takes seconds to import")
@pytest.mark.xdist_group("trainers")
@pytest.mark.usefixtures("trainers")
@pytest.mark.filterwarnings("ignore")
def test_a_backbone_that_is_unfrozen_later_is_regularised(tmp_path, monkeypatch):
    """The page's code adds the backbone's weights to the optimizer, with their penalty and momentum."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import BaseFinetuning

    monkeypatch.chdir(tmp_path)
    scope = dict(sparsity_param_groups=sparsity_param_groups)
    exec(FINETUNING.replace("epoch == 5", "epoch == 1"), scope)

    class Later(BaseFinetuning):
        finetune_function = scope["finetune_function"]

        def freeze_before_training(self, module):
            self.freeze(module.backbone)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

        def training_step(self, batch, _):
            return self.head(self.backbone(batch)).square().mean()

        def configure_optimizers(self):
            return ProxSGD(sparsity_param_groups(self.head, group_lasso=1e-4), lr=0.1, momentum=0.9)

    module = Module()
    quiet = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(max_epochs=2, enable_checkpointing=False, callbacks=[Later()], **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(4, 4)))
    (optimizer,) = trainer.optimizers
    lassos = {p: group["group_lasso"] for group in optimizer.param_groups for p in group["params"]}
    assert lassos[module.backbone.weight] == lassos[module.head.weight] == 1e-4
    assert lassos[module.backbone.bias] == 0 and "momentum_buffer" in optimizer.state[module.backbone.weight]
