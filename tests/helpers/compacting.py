"""For tests of compact(): make networks, kill channels, and compare a small model with its original."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from cges_kernels.training.layers import regularised_weights


def net(forward, **modules):
    """A module of ``modules`` whose forward is ``forward(self, *inputs)``."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for name, module in modules.items():
                setattr(self, name, module)

    Net.forward = forward
    return Net()


def conv(into, out, size=3, **options):
    return nn.Conv2d(into, out, size, **options)


def mlp(forward, width=8, **more):
    """Two Linear layers, ``a`` and ``b``, and ``more`` modules, under a forward of the caller's."""
    return net(forward, a=nn.Linear(5, width), b=nn.Linear(width, 3), **more)


def plain(self, x):
    """The forward of a network of mlp(): b(relu(a(x)))."""
    return self.b(self.a(x).relu())


def example_of(shape):
    """An input of ``shape``, or a batch of tokens where it is None."""
    return torch.randint(20, (4, 5)) if shape is None else torch.randn(shape)


@torch.no_grad()
def kill(model, outputs=0.3, inputs=0.3):
    """Zeroes random outputs and inputs of every weight, and gives batch norms random shifts and scales."""
    for layer in regularised_weights(model):
        w = layer.blocked()  # [blocks, out, in, taps]
        w[torch.rand(w.shape[:2]) < outputs] = 0
        w.transpose(1, 2)[torch.rand(w.shape[0], w.shape[2]) < inputs] = 0
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for x in (module.weight, module.bias, module.running_mean):
                x.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def ones(model):
    """Sets every weight to 1 and every bias to 0, so that what is left can be worked out by hand."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(float(name.endswith("weight")))
    return model


def padded_pair(bias, padding_mode="zeros", activation=None):
    """A convolution whose first filter is dead, but for its ``bias``, in front of a padded convolution."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        activation or nn.Identity(),
        nn.Conv2d(2, 3, 3, padding=1, padding_mode=padding_mode, bias=False),
    )
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].bias[0] = bias
    return model


def leaves(out):
    return out if isinstance(out, (tuple, list)) else [out]


def shapes(result):
    """The shapes of the weights of a compacted model."""
    return {name: tuple(p.shape) for name, p in result.model.named_parameters() if p.dim() > 1}


def assert_same(small, model, example):
    """Compares the outputs of both models in float64, on ``example`` and on other inputs."""
    small, model = (copy.deepcopy(m).double().eval() for m in (small, model))
    for scale in (1, 3):
        x = (example * scale + (scale > 1)).double() if example.is_floating_point() else example.flip(0)
        for a, b in zip(leaves(small(x)), leaves(model(x)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * b.abs().max().item())


class Attention(nn.Module):
    """Self-attention whose q, k and v come from one Linear, as in a vision transformer."""

    def __init__(self, heads=2):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        n, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, -1)
        return x + self.proj(out)


def unread(layer, columns):
    """Zeroes ``columns`` of a layer's weight, so that nothing reads these inputs."""
    with torch.no_grad():
        layer.weight[:, columns] = 0


@torch.no_grad()
def dead(layer, rows, also=()):
    """Zeroes ``rows`` of a layer's weight and of the parameters in ``also``."""
    layer.weight[rows] = 0
    for p in also:
        p[rows] = 0
