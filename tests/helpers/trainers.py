"""For tests of trainers: a network, data, optimizers, and the plain loop that each trainer replaces."""

import contextlib

import torch
from helpers.steps import assert_same_bits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cges_kernels import ProxAdamW, ProxSGD, cges_param_groups

NEEDED = "the extra `trainers` is not installed"
EPOCHS, STEPS, ACCUMULATED = 4, 20, 2  # steps in all epochs; the scripts warm up over half of them
loss_fn = nn.CrossEntropyLoss()


def sparse_sgd(model):
    return ProxSGD(cges_param_groups(model, lam=3e-2, scale="size"), lr=0.1, momentum=0.9)


def sparse_adamw(model):
    return ProxAdamW(cges_param_groups(model, lam=0.5, scale="size"), lr=0.02)


def network():
    """A network with initial weights of which some become zero within a few steps."""
    torch.manual_seed(0)
    features = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*features, nn.Linear(96, 12), nn.ReLU(), nn.Linear(12, 3))


def batches():
    """The batches of an epoch, whose gradients are larger than the norm that they are clipped to."""
    generator = torch.Generator().manual_seed(0)
    x = 10 * torch.randn(5 * ACCUMULATED * STEPS // EPOCHS, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(3, (len(x),), generator=generator)), batch_size=5)


def of_all_epochs():
    return [*batches()] * EPOCHS


def loss_of(model, batch):
    return loss_fn(model(batch[0]), batch[1]) / ACCUMULATED


def plain(
    model, optimizer, batches, loss_of=loss_of, schedulers=(), precision=contextlib.nullcontext, clipped=None
):
    """The plain training loop; returns the largest norm of the gradients, which it clips to 1."""
    model.train()
    clipped = clipped or list(model.parameters())  # their order decides how the norm rounds
    norms = []
    for i, batch in enumerate(batches):
        with precision():
            loss = loss_of(model, batch)
        loss.backward()
        if i % ACCUMULATED == ACCUMULATED - 1:
            norms.append(nn.utils.clip_grad_norm_(clipped, 1.0))
            optimizer.step()
            optimizer.zero_grad()
            for scheduler in schedulers:
                scheduler.step()
    return max(norms)


def assert_alike(model, other):
    assert_same_bits(list(model.parameters()), list(other.parameters()))
    assert any((p == 0).any() and (p != 0).any() for p in model.parameters())


def coefficients(optimizer):
    keys = ("lr", "group_lasso", "exclusive_lasso", "l1")
    return [{key: float(group[key]) for key in keys} for group in optimizer.param_groups]


def quietly(monkeypatch, module, name, **options):
    """Makes a script call its ``name`` with these further options."""
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **given: original(*args, **{**given, **options}))
