"""compact: the same outputs from fewer channels, on one network for each way that channels are coupled."""

import copy
import io
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

pytest.importorskip("torch_pruning")

from cges_kernels import compact, load_compacted, save_compacted, sparsity_report
from cges_kernels.compaction.unknown import inputs_of_layers
from cges_kernels.demo.training import LeNet
from cges_kernels.demo.training import compacted as compacted_by_hand
from cges_kernels.training.recipes import regularised_weights


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


def residual():
    def forward(self, x):
        x = F.relu(self.bn1(self.stem(x)))
        x = F.relu(x + self.bn3(self.conv2(F.relu(self.bn2(self.conv1(x))))))
        x = F.relu(self.bn5(self.conv4(F.relu(self.bn4(self.conv3(x))))) + self.bn6(self.short(x)))
        return self.fc(x.mean((2, 3)))

    def block(i, o, size=3, **options):
        return conv(i, o, size, bias=False, padding=size // 2, **options)

    return net(
        forward,
        stem=block(3, 10),
        bn1=nn.BatchNorm2d(10),
        conv1=block(10, 8),
        bn2=nn.BatchNorm2d(8),
        conv2=block(8, 10),
        bn3=nn.BatchNorm2d(10),
        conv3=block(10, 12, stride=2),
        bn4=nn.BatchNorm2d(12),
        conv4=block(12, 14),
        bn5=nn.BatchNorm2d(14),
        short=block(10, 14, 1, stride=2),
        bn6=nn.BatchNorm2d(14),
        fc=nn.Linear(14, 5),
    )


def concatenation():
    def forward(self, x):
        x = F.relu(self.stem(x))
        for layer in self.dense:
            x = torch.cat([x, F.relu(layer(x))], 1)
        a, b = self.left(x), self.right(x)
        return self.head(torch.cat([b, a], 1)).flatten(1)

    dense = nn.ModuleList([conv(6, 5, padding=1), conv(11, 5, padding=1)])
    layers = {"left": conv(16, 8), "right": conv(16, 7), "head": conv(15, 4)}
    return net(forward, stem=conv(3, 6), dense=dense, **layers)


def concatenated_input():
    """Beside the model's input, whose channels the dependency graph does not know."""

    def forward(self, x):
        return self.head(torch.cat([x, F.relu(self.body(x))], 1))

    return net(forward, body=conv(3, 6, padding=1), head=conv(9, 4))


def depthwise():
    def block(i, o):
        return [
            nn.Conv2d(i, i, 3, groups=i, padding=1, bias=False),
            nn.BatchNorm2d(i),
            nn.ReLU6(),
            conv(i, o, 1),
        ]

    return nn.Sequential(
        conv(3, 12),
        nn.BatchNorm2d(12),
        nn.Hardswish(),
        *block(12, 16),
        *block(16, 8),
        nn.Flatten(),
        nn.Linear(8 * 64, 4),
    )


def squeeze_and_excite():
    def forward(self, x):
        x = F.relu(self.conv(x))
        return self.head(x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True))))))

    return net(forward, conv=conv(3, 12), down=conv(12, 6, 1), up=conv(6, 12, 1), head=conv(12, 4))


def padded_shortcut():
    def forward(self, x):
        x = F.relu(self.stem(x))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.fc((short + self.conv(x)).mean((2, 3)))

    return net(
        forward, stem=conv(3, 8, padding=1), conv=conv(8, 12, stride=2, padding=1), fc=nn.Linear(12, 4)
    )


def transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 24, batch_first=True)
    return nn.Sequential(nn.Linear(5, 8), layer, nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 3))


def embedded():
    def forward(self, tokens):
        return self.c(F.relu(self.b(F.relu(self.a(self.embedding(tokens))).mean(1))))

    linear = {"a": (8, 12), "b": (12, 9), "c": (9, 3)}
    layers = {name: nn.Linear(*size) for name, size in linear.items()}
    return net(forward, embedding=nn.Embedding(20, 8), **layers)


def flattened_last():
    """Flattened with the channels innermost, which the dependency graph does not follow."""
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(30, 3))


def reused():
    def forward(self, x):
        x = F.relu(self.first(x))
        for _ in range(2):
            x = F.relu(self.again(x))
        return self.last(F.relu(self.middle(x)))

    linear = {"first": (4, 9), "again": (9, 9), "middle": (9, 11), "last": (11, 3)}
    return net(forward, **{name: nn.Linear(*size) for name, size in linear.items()})


def tied():
    model = nn.Sequential(
        *(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU()),
        *(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3)),
    )
    model[4].weight = model[2].weight
    return model


def mixing():
    """Operations over all channels, of which the dependency graph knows nothing."""

    def forward(self, x):
        a = self.a(x).softmax(1)
        b = F.relu(self.b(a))
        return self.c(b - b.mean(1, keepdim=True)), F.relu(self.d(x)).amax(1), self.e(F.relu(self.f(x)))

    names = {"a": (3, 8), "b": (8, 8), "c": (8, 3), "d": (3, 8), "f": (3, 8), "e": (8, 3)}
    return net(forward, **{name: conv(*size, 1) for name, size in names.items()})


def functional():
    """A weight that is used beside its module, and one without it."""

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.b(x) + F.linear(x, self.b.weight), F.linear(F.relu(self.d(x)), self.c.weight)

    names = {"a": (4, 8), "b": (8, 3), "d": (8, 9), "c": (9, 3)}
    return net(forward, **{name: nn.Linear(*size) for name, size in names.items()})


IMAGE = (2, 3, 10, 10)
# name: (the network, an example's shape, whether it gets smaller, None where that depends on the zeros)
ZOO = {
    "lenet": (lambda: LeNet(8), (2, 1, 8, 8), True),
    "pooled": (lambda: LeNet(28), (1, 1, 28, 28), True),
    "residual": (residual, IMAGE, True),
    "concatenation": (concatenation, IMAGE, True),
    "concatenated input": (concatenated_input, IMAGE, None),
    "depthwise": (depthwise, IMAGE, True),
    "squeeze and excite": (squeeze_and_excite, IMAGE, True),
    "padded shortcut": (padded_shortcut, IMAGE, True),
    "transformer": (transformer, (2, 6, 5), True),
    "embedded": (embedded, None, True),
    "flattened last": (flattened_last, (2, 5, 4), False),
    "reused": (reused, (5, 4), True),
    "tied": (tied, (5, 6), True),
    "mixing": (mixing, IMAGE, True),
    "functional": (functional, (5, 4), None),
    "grouped": (
        lambda: nn.Sequential(
            conv(3, 8), nn.ReLU(), conv(8, 8, groups=2), nn.ReLU(), conv(8, 9), conv(9, 4, 1)
        ),
        (2, 3, 10, 10),
        True,
    ),
    "transposed": (
        lambda: nn.Sequential(conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 9, 3, 2), nn.ReLU(), conv(9, 4)),
        IMAGE,
        True,
    ),
    "normalised": (
        lambda: nn.Sequential(
            *(conv(3, 8), nn.GroupNorm(2, 8), conv(8, 8), nn.InstanceNorm2d(8), nn.PReLU(8), conv(8, 9)),
            *(nn.PReLU(), nn.Dropout(), conv(9, 4, 1)),
        ),
        (2, 3, 10, 10),
        True,
    ),
    "circular": (
        lambda: nn.Sequential(conv(3, 8), nn.Sigmoid(), conv(8, 4, padding=1, padding_mode="circular")),
        IMAGE,
        True,
    ),
    "one dimension": (
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ELU(), nn.Conv1d(8, 4, 3)),
        (2, 3, 9),
        True,
    ),
    "volumes": (
        lambda: nn.Sequential(nn.Conv3d(1, 8, 2), nn.ELU(), nn.Conv3d(8, 4, 2)),
        (2, 1, 4, 4, 4),
        True,
    ),
    "recurrent": (
        lambda: net(lambda self, x: self.b(self.a(x)[0]), a=nn.LSTM(4, 6), b=nn.Linear(6, 3)),
        (3, 2, 4),
        False,
    ),
}


def example_of(shape):
    return torch.randint(20, (4, 5)) if shape is None else torch.randn(shape)


@torch.no_grad()
def kill(model, outputs=0.3, inputs=0.3):
    """Zero some outputs and some inputs of every weight; let batch norms shift and scale."""
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


def leaves(out):
    return out if isinstance(out, (tuple, list)) else [out]


def assert_same(small, model, example):
    """The outputs on ``example`` and on other inputs, in float64."""
    small, model = (copy.deepcopy(m).double().eval() for m in (small, model))
    for scale in (1, 3):
        x = (example * scale + (scale > 1)).double() if example.is_floating_point() else example.flip(0)
        for a, b in zip(leaves(small(x)), leaves(model(x)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * b.abs().max().item())


@pytest.mark.parametrize("name", ZOO)
def test_the_outputs_stay(name, tmp_path):
    make, shape, shrinks = ZOO[name]
    model, example = kill(make()).train(), example_of(shape)
    before = copy.deepcopy(model.state_dict())
    result = compact(model, example)
    assert_same(result.model, model, example)
    assert shrinks is None or (result.parameters[1] < result.parameters[0]) is shrinks
    assert result.max_difference < 1e-4
    # what was given is as it was
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == [True] * len(list(model.modules()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # the result is an ordinary module, which trains and is saved
    assert all(p.requires_grad and p.dtype == torch.float32 for p in result.model.parameters())
    sum(out.sum() for out in leaves(result.model(example))).backward()
    save_compacted(result.model, tmp_path / "small.pt")
    loaded = load_compacted(make(), tmp_path / "small.pt").eval()
    result.model.eval()
    for a, b in zip(leaves(loaded(example)), leaves(result.model(example)), strict=True):
        assert torch.equal(a, b)
    assert {k: v.shape for k, v in loaded.state_dict().items()} == {
        k: v.shape for k, v in result.model.state_dict().items()
    }


def ones(model):
    """Every weight 1 and every bias 0, to make out by hand what is left."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(float(name.endswith("weight")))
    return model


def shapes(result):
    return {name: tuple(p.shape) for name, p in result.model.named_parameters() if p.dim() > 1}


# Constants


def padded_pair(bias, padding_mode="zeros", activation=None):
    """A dead filter (the first of two) with ``bias`` in front of a padded convolution."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        activation or nn.Identity(),
        nn.Conv2d(2, 3, 3, padding=1, padding_mode=padding_mode, bias=False),
    )
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].bias[0] = bias
    return model


def test_a_constant_in_front_of_zero_padding_stays():
    result = compact(padded_pair(0.5), torch.randn(1, 1, 6, 6))
    assert shapes(result)["0.weight"] == (2, 1, 3, 3) and result.model[2].bias is None
    assert result.kept["2"] == (
        "constant inputs that stay: 1; what it makes of them differs at the borders (zero padding)"
    )
    assert "2: constant inputs that stay: 1" in str(result)


@pytest.mark.parametrize(
    "model",
    [
        padded_pair(0.0),
        padded_pair(-0.5, activation=nn.ReLU()),
        padded_pair(0.5, padding_mode="reflect"),
    ],
    ids=["bias 0", "relu of a negative bias", "padding by reflection"],
)
def test_a_constant_goes_where_padding_does_not_show_it(model):
    result = compact(model, torch.randn(1, 1, 6, 6))
    assert shapes(result) == {"0.weight": (1, 1, 3, 3), "2.weight": (3, 1, 3, 3)} and not result.kept
    assert_same(result.model, model, torch.randn(2, 1, 6, 6))


def test_the_shift_of_a_batch_norm_becomes_a_new_bias():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(), conv(2, 3, bias=False)
    )
    with torch.no_grad():
        model[0].weight[0] = 0
        model[1].running_mean.fill_(0.25)
        model[1].bias.fill_(1.0)
    result = compact(model, torch.randn(1, 1, 6, 6))
    assert shapes(result) == {"0.weight": (1, 1, 3, 3), "3.weight": (3, 1, 3, 3)}
    constant = 1 - 0.25 / (1 + 1e-5) ** 0.5  # of the dead filter, behind batch norm
    torch.testing.assert_close(result.model[3].bias, constant * model[3].weight[:, 0].sum((1, 2)))


def test_what_swallows_nan_is_no_constant():
    def forward(self, x):
        x = self.a(x)
        return self.b(torch.where(x > 0, x, 0))

    model = net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    with torch.no_grad():
        model.a.weight[0] = 0
        model.a.bias[0] = 0.25
    assert inputs_of_layers(model.eval(), (torch.ones(1, 3),))["b"].nan_to_num(9).tolist() == [0.25, 9, 9, 9]


def test_a_model_that_refuses_nan():
    def forward(self, x):
        if not x.isfinite().all():
            raise ValueError("not finite")
        return self.b(F.relu(self.a(x)))

    model = net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    with torch.no_grad():
        model.a.weight[0] = 0
        model.b.weight[:, 1] = 0
    result = compact(model, torch.randn(2, 3))
    assert shapes(result) == {"a.weight": (3, 3), "b.weight": (2, 3)}
    assert result.kept["Net"] == "constants stay: its forward pass may go other ways for other inputs"


def test_a_model_that_fails_on_nan():
    def forward(self, x):
        if math.isnan(x.mean().item()):
            raise ValueError("not a number")
        return self.b(F.relu(self.a(x)))

    result = compact(net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2)), torch.randn(2, 3))
    assert result.kept["Net"].endswith("fails on NaN or Inf with ValueError: not a number")


def test_constants_are_found_through_everything():
    def forward(self, x):
        a = F.relu(self.bn(self.conv(x)))
        b = torch.cat([F.max_pool2d(a, 2), a[..., ::2, ::2] * 2], 1)
        return self.fc((b + b.sigmoid()).flatten(1))

    model = net(forward, conv=conv(2, 3), bn=nn.BatchNorm2d(3), fc=nn.Linear(6 * 9, 2)).eval()
    with torch.no_grad():
        model.conv.weight[1] = 0
        model.bn.bias.fill_(0.5)
        model.conv.bias[1] = 2.0
    found = inputs_of_layers(model, (torch.randn(1, 2, 8, 8),))
    assert found["conv"].isnan().all()
    a = torch.tensor(0.5 + 2 / (1 + 1e-5) ** 0.5)
    constants = found["fc"].view(6, 9)
    assert constants[[0, 2, 3, 5]].isnan().all()
    for row, value in ((1, a), (4, 2 * a)):
        torch.testing.assert_close(constants[row], (value + value.sigmoid()).expand(9))


# What goes, by hand


def test_a_residual_stream_goes_only_where_nobody_reads_it():
    model = ones(residual()).eval()
    with torch.no_grad():
        model.conv1.weight[:, 0] = 0  # channel 0 of the first stream: read by the second block alone
        for reader in (model.conv1, model.conv3, model.short):
            reader.weight[:, 1] = 0  # channel 1: read by none
    result = compact(model, torch.randn(IMAGE))
    after = shapes(result)
    assert after["stem.weight"][0] == after["conv2.weight"][0] == 9
    assert after["conv3.weight"][1] == after["short.weight"][1] == 9
    assert {name for name, n in after.items() if n == tuple(model.get_parameter(name).shape)} == {
        *("conv4.weight", "fc.weight")
    }


def test_unread_filters_go_all_the_way_up():
    model = ones(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)))
    with torch.no_grad():
        model[4].weight[:, 1:] = 0  # so units 1.. of the second layer are unread, and they alone read ...
        model[2].weight[0, 2:] = 0  # ... units 2.. of the first
    result = compact(model, torch.randn(3, 6))
    assert shapes(result) == {"0.weight": (2, 6), "2.weight": (1, 2), "4.weight": (2, 1)}
    assert result.parameters == (6 * 5 + 5 + 5 * 4 + 4 + 4 * 2 + 2, 12 + 2 + 2 + 1 + 2 + 2)
    assert result.flops == (2 * 3 * (30 + 20 + 8), 2 * 3 * (12 + 2 + 2))
    assert min(result.latency_ms) > 0
    assert result.to_dict()["layers"]["2.weight"] == {"before": (4, 5), "after": (1, 2)}


@pytest.mark.parametrize("dead", [2, 4])
def test_a_dead_network_keeps_one_channel(dead):
    model = ones(nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 5), nn.ReLU(), conv(5, 2)))
    with torch.no_grad():
        model[dead].weight.zero_()
    result = compact(model, torch.randn(IMAGE))
    assert shapes(result) == {
        "0.weight": (1, 3, 3, 3),
        "2.weight": (1, 1, 3, 3),
        "4.weight": (2, 1, 3, 3),
    }


def test_compacted_flops_are_those_of_the_demo():
    model, x = kill(LeNet(8)), torch.randn(1, 1, 8, 8)
    small = sparsity_report(compact(model, x).model, x).total.flops_compacted
    assert small == sparsity_report(compacted_by_hand(model), x).total.flops_compacted


def test_outputs_of_the_model_stay():
    def forward(self, x):
        x = F.relu(self.a(x))
        return {"features": x, "answer": [self.b(x)]}

    model = net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 3))
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.weight[1:] = 0
    result = compact(model, torch.randn(2, 4))
    assert shapes(result) == {"a.weight": (6, 4), "b.weight": (3, 6)}
    reason = "dead or unread outputs that stay: {}; they are outputs of the model"
    assert result.kept == {"a": reason.format(5), "b": reason.format(2)}


@pytest.mark.parametrize(
    "make, shape, layer, reason",
    [(tied, (5, 6), "2", "its weight is tied"), (reused, (5, 4), "again", "it is called more than once")],
)
def test_weights_that_are_used_twice_stay(make, shape, layer, reason):
    model = make()
    with torch.no_grad():
        model.get_submodule(layer).weight[:2] = 0
    result = compact(model, torch.randn(shape))
    outputs = f"dead or unread outputs that stay: 2; {reason}"
    assert result.kept[layer] in (outputs, f"constant inputs that stay: 2; {reason}; {outputs}")
    assert shapes(result)[f"{layer}.weight"] == (9, 9)


def test_kept_modules_keep_their_outputs():
    model = kill(LeNet(8))
    free, held = (compact(model, torch.randn(1, 1, 8, 8), keep=keep) for keep in ((), ["conv2"]))
    assert shapes(free)["conv2.weight"][0] < 40 == shapes(held)["conv2.weight"][0]
    assert shapes(held)["conv1.weight"][0] == shapes(free)["conv1.weight"][0]
    assert held.kept["conv2"].endswith("; asked for")


def test_a_size_written_into_the_model_is_kept_and_told():
    def forward(self, x):
        return self.fc(F.relu(self.conv(x)).view(-1, 8 * 36))

    model = kill(net(forward, conv=conv(1, 8), fc=nn.Linear(8 * 36, 3)))
    result = compact(model, torch.randn(1, 1, 8, 8))
    assert shapes(result)["conv.weight"] == (8, 1, 3, 3)
    assert "the forward pass fails with RuntimeError: shape '[-1, 288]' is invalid" in result.kept["conv"]


def test_few_inputs_of_many_are_picked():
    model = nn.Sequential(nn.Linear(100, 70), nn.ReLU(), nn.Linear(70, 2))
    with torch.no_grad():
        model[0].weight[:, 10:] = 0
    result = compact(model, torch.randn(3, 100))
    assert shapes(result)["0.weight"] == (70, 10)
    assert result.model[0].read_inputs.tolist() == list(range(10))
    assert_same(result.model, model, torch.randn(3, 100))
    with torch.no_grad():
        result.model[0].weight[:, :5] = 0
        result.model[0].weight[7] = 0
    again = compact(result.model, torch.randn(3, 100))
    assert shapes(again) == {"0.weight": (69, 5), "2.weight": (2, 69)}
    assert_same(again.model, result.model, torch.randn(3, 100))


# What the model is made of


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model = kill(residual()).to(dtype)
    result = compact(model, torch.randn(IMAGE, dtype=dtype))
    assert result.parameters[1] < result.parameters[0]
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert_same(result.model, model, torch.randn(IMAGE)) if dtype == torch.float64 else None


def test_a_dtype_written_into_the_model():
    def forward(self, x):
        return self.b(F.relu(self.a(x.float())))

    model = kill(net(forward, a=nn.Linear(6, 20), b=nn.Linear(20, 3)))
    result = compact(model, torch.randn(4, 6))
    assert result.parameters[1] < result.parameters[0] and result.max_difference < 1e-6


def test_modes_and_frozen_weights_stay():
    model = kill(residual())
    model.bn1.eval()
    model.conv1.requires_grad_(False)
    small = compact(model, torch.randn(IMAGE)).model
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    frozen = {name for name, p in small.named_parameters() if not p.requires_grad}
    assert "conv1.weight" in frozen <= {"conv1.weight", "conv1.bias"}


def test_channels_last():
    model = kill(residual()).to(memory_format=torch.channels_last)
    result = compact(model, torch.randn(IMAGE))
    assert result.parameters[1] < result.parameters[0]
    assert_same(result.model, model, torch.randn(IMAGE))


def test_randomness_in_the_model():
    def forward(self, x):
        return self.lenet(x) + torch.rand(())

    model, x = net(forward, lenet=kill(LeNet(8))), torch.randn(1, 1, 8, 8)
    random = torch.get_rng_state()
    result = compact(model, x)
    assert result.max_difference < 1e-5 and result.parameters[1] < result.parameters[0]
    assert torch.equal(random, torch.get_rng_state())


# Files


def test_a_whole_module_is_saved_too():
    model = nn.Sequential(nn.Linear(100, 70), nn.ReLU(), nn.Linear(70, 2))
    with torch.no_grad():
        model[0].weight[:, 10:] = 0
    small, file, x = compact(model, torch.randn(3, 100)).model, io.BytesIO(), torch.randn(3, 100)
    torch.save(small, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), small(x))


def test_files_are_plain_and_trained_further(tmp_path):
    model = kill(residual())
    small = compact(model, torch.randn(IMAGE)).model
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(torch.randn(IMAGE)).sum().backward()
    optimizer.step()
    save_compacted(small, tmp_path / "small.pt")
    content = torch.load(tmp_path / "small.pt", weights_only=True)
    assert content["sizes"]["bn1"] == {"num_features": small.bn1.num_features}
    dense = residual()
    loaded = load_compacted(dense, tmp_path / "small.pt")
    assert dense.stem.weight.shape == (10, 3, 3, 3)
    for key, value in small.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert compact(loaded, torch.randn(IMAGE)).parameters[0] == sum(p.numel() for p in small.parameters())


def test_files_of_something_else(tmp_path):
    path = tmp_path / "some.pt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match=r"some\.pt: expected a file of save_compacted"):
        load_compacted(residual(), path)
    save_compacted(residual(), path)
    with pytest.raises(ValueError, match=r"some\.pt: expected modules of LeNet, got \['bn1', "):
        load_compacted(LeNet(8), path)
    save_compacted(nn.Sequential(nn.Linear(2, 3)), path)
    with pytest.raises(ValueError, match=r"some\.pt: expected the weights of Sequential, got: .*1\.weight"):
        load_compacted(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3)), path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "small.pt"
    save_compacted(nn.Linear(2, 3), path)
    old = path.read_bytes()

    def fail(content, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_compacted(nn.Linear(5, 6), path)
    assert path.read_bytes() == old and [x.name for x in tmp_path.iterdir()] == ["small.pt"]


# Refusals, each of which leaves the model as it was


class Broken(nn.Module):
    def forward(self, x):
        raise KeyError("no such thing")


class Detached(nn.Module):
    def forward(self, x):
        return x.detach()


class Argmax(nn.Module):
    def forward(self, x):
        return x.argmax(1)


def masked():
    return prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5)


@pytest.mark.parametrize(
    "layer, message",
    [
        (Broken(), "1.0: expected a forward pass on example_input, got KeyError: 'no such thing'"),
        (nn.Linear(4, 3), "1.0: expected a forward pass on example_input, got RuntimeError: mat1 and mat2"),
        (Detached(), "1.0: expected outputs with a gradient to trace the model by, got none"),
        (Argmax(), "Sequential: expected outputs with a gradient to trace the model by, got none"),
        (masked(), "1.0: expected its weight to be a parameter, got one that is computed"),
        (parametrizations.weight_norm(nn.Linear(3, 3)), "1.0: expected its weight to be a parameter"),
        (torch.jit.script(nn.Linear(3, 3)), "1.0: expected a plain nn.Module, got a scripted one"),
    ],
    ids=["broken", "misfit", "detached", "argmax", "masked", "weight norm", "scripted"],
)
def test_what_cannot_be_traced_is_named(layer, message):
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(layer))
    before = copy.deepcopy(model[0].state_dict())
    with pytest.raises(ValueError) as error:
        compact(model, torch.randn(2, 3))
    assert str(error.value).startswith(message)
    assert all(torch.equal(before[key], value) for key, value in model[0].state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model[0].modules())


def test_what_is_in_front_of_a_cut_is_told():
    model = kill(nn.Sequential(nn.Linear(3, 9), Detached(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 2)))
    result = compact(model, torch.randn(2, 3))
    assert "1" in result.kept and "could not be traced" in result.kept["1"]
    assert shapes(result)["0.weight"] == (9, 3) and shapes(result)["2.weight"][0] < 8


def test_what_the_library_cannot_trace_is_named(monkeypatch):
    def fail(*args, **options):
        raise TypeError("unsupported operand")

    monkeypatch.setattr("torch_pruning.DependencyGraph.build_dependency", fail)
    with pytest.raises(ValueError, match="LeNet: expected a model that Torch-Pruning can trace, got: unsupp"):
        compact(LeNet(8), torch.randn(1, 1, 8, 8))


def test_what_the_library_cannot_follow_stays(monkeypatch):
    def fail(*args):
        raise IndexError("list index out of range")

    monkeypatch.setattr("torch_pruning.DependencyGraph.get_pruning_group", fail)
    model = ones(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    with torch.no_grad():
        model[0].weight[1] = 0
    result = compact(model, torch.randn(2, 3))
    assert result.kept == {
        "0": "dead or unread outputs that stay: 1; Torch-Pruning cannot follow them: list index out of range"
    }


def test_wrong_names_to_keep():
    for keep in (["conv3"], "conv1"):
        with pytest.raises(ValueError, match=r"keep: expected a collection of names .* got .*conv"):
            compact(LeNet(8), torch.randn(1, 1, 8, 8), keep=keep)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(
        ImportError, match=r"compact\(\) needs torch-pruning: pip install cges_kernels\[prune\]"
    ):
        compact(LeNet(8), torch.randn(1, 1, 8, 8))
