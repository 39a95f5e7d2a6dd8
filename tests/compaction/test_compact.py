"""compact(): the same outputs from fewer channels, for each way in which channels are coupled."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.compacting import assert_same, conv, example_of, kill, leaves, net, ones, shapes
from helpers.networks import IMAGE, ZOO, residual, reused, tied
from torch import nn
from torch.nn.utils import parametrizations, prune

from cges_kernels import compact, load_compacted, save_compacted
from cges_kernels.compaction import following
from examples.common.networks import LeNet


@pytest.mark.parametrize("name", ZOO)
def test_the_outputs_stay(name, tmp_path):
    """The outputs are the same, the model is unchanged, and the result trains and can be saved."""
    make, shape, shrinks = ZOO[name]
    model, example = kill(make()).train(), example_of(shape)
    before = copy.deepcopy(model.state_dict())
    result = compact(model, example)
    assert_same(result.model, model, example)
    assert shrinks is None or (result.parameters[1] < result.parameters[0]) is shrinks
    assert result.max_difference < 1e-4
    # the model that was given is unchanged
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


# What goes, worked out by hand


def test_a_residual_stream_goes_only_where_nobody_reads_it():
    """A channel of a stream goes only if no block reads it, and then from all layers that write it."""
    model = ones(residual()).eval()
    with torch.no_grad():
        model.conv1.weight[:, 0] = 0  # channel 0 of the first stream: only the second block reads it
        for reader in (model.conv1, model.conv3, model.short):
            reader.weight[:, 1] = 0  # channel 1: no layer reads it
    result = compact(model, torch.randn(IMAGE))
    after = shapes(result)
    assert after["stem.weight"][0] == after["conv2.weight"][0] == 9
    assert after["conv3.weight"][1] == after["short.weight"][1] == 9
    assert {name for name, n in after.items() if n == tuple(model.get_parameter(name).shape)} == {
        *("conv4.weight", "fc.weight")
    }


def test_unread_filters_go_all_the_way_up():
    """Units that only unread units read go as well; parameters, FLOPs and the report count what is left."""
    model = ones(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)))
    with torch.no_grad():
        model[4].weight[:, 1:] = 0  # so units 1.. of the second layer are unread, and only they read ...
        model[2].weight[0, 2:] = 0  # ... units 2.. of the first
    result = compact(model, torch.randn(3, 6))
    assert shapes(result) == {"0.weight": (2, 6), "2.weight": (1, 2), "4.weight": (2, 1)}
    assert result.parameters == (6 * 5 + 5 + 5 * 4 + 4 + 4 * 2 + 2, 12 + 2 + 2 + 1 + 2 + 2)
    assert result.flops == (2 * 3 * (30 + 20 + 8), 2 * 3 * (12 + 2 + 2))
    assert min(result.latency_ms) > 0
    assert result.to_dict()["layers"]["2.weight"] == {"before": (4, 5), "after": (1, 2)}


@pytest.mark.parametrize("dead", [2, 4])
def test_a_dead_network_keeps_one_channel(dead):
    """No layer ends up with 0 channels, whether the middle or the last one is dead."""
    model = ones(nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 5), nn.ReLU(), conv(5, 2)))
    with torch.no_grad():
        model[dead].weight.zero_()
    result = compact(model, torch.randn(IMAGE))
    assert shapes(result) == {
        "0.weight": (1, 3, 3, 3),
        "2.weight": (1, 1, 3, 3),
        "4.weight": (2, 1, 3, 3),
    }


def test_outputs_of_the_model_stay():
    """Channels that the model returns stay although they are dead, and the report says why."""

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


USED_TWICE = {"tied": (tied, (5, 6), "2"), "called twice": (reused, (5, 4), "again")}


@pytest.mark.parametrize("make, shape, layer", USED_TWICE.values(), ids=USED_TWICE)
def test_constants_stay_where_a_weight_is_used_twice(make, shape, layer):
    """A constant cannot be folded into a bias that serves two places."""
    model = make()
    with torch.no_grad():
        model.get_submodule(layer).weight[:2] = 0
    result = compact(model, torch.randn(shape))
    outputs = "dead or unread outputs that stay: 2; read with what comes of them by"
    assert result.kept[layer] == f"{outputs} {layer}"
    assert shapes(result)[f"{layer}.weight"] == (9, 9)


@pytest.mark.parametrize("make, shape, layer", USED_TWICE.values(), ids=USED_TWICE)
def test_units_go_everywhere_where_a_weight_is_used_twice(make, shape, layer):
    """Units unread at every use are removed from each use."""
    model = make()
    with torch.no_grad():
        model.get_submodule(layer).weight[:, :2] = 0
        for reader in ("6", "middle"):
            if reader in dict(model.named_modules()):
                model.get_submodule(reader).weight[:, :2] = 0
    result = compact(model, torch.randn(shape))
    assert shapes(result)[f"{layer}.weight"] == (7, 7) and not result.kept
    assert_same(result.model, model, torch.randn(shape))


def test_kept_modules_keep_their_outputs():
    """keep= holds a module's outputs, and nothing else."""
    model = kill(LeNet(8))
    free, held = (compact(model, torch.randn(1, 1, 8, 8), keep=keep) for keep in ((), ["conv2"]))
    assert shapes(free)["conv2.weight"][0] < 40 == shapes(held)["conv2.weight"][0]
    assert shapes(held)["conv1.weight"][0] == shapes(free)["conv1.weight"][0]
    assert held.kept["conv2"].endswith("; asked for")


def test_a_size_written_into_the_model_is_kept_and_told():
    """A width that the forward has written out is kept, and the error of the trial is reported."""

    def forward(self, x):
        return self.fc(F.relu(self.conv(x)).view(-1, 8 * 36))

    model = kill(net(forward, conv=conv(1, 8), fc=nn.Linear(8 * 36, 3)))
    result = compact(model, torch.randn(1, 1, 8, 8))
    assert shapes(result)["conv.weight"] == (8, 1, 3, 3)
    assert "the forward pass fails with RuntimeError: shape '[-1, 288]' is invalid" in result.kept["conv"]


def test_few_inputs_of_many_are_picked():
    """A layer that reads few of the model's inputs picks them, and such a result can be compacted again."""
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


# Dtypes, modes and memory formats


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    """The result has the model's dtype and is smaller."""
    model = kill(residual()).to(dtype)
    result = compact(model, torch.randn(IMAGE, dtype=dtype))
    assert result.parameters[1] < result.parameters[0]
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert_same(result.model, model, torch.randn(IMAGE)) if dtype == torch.float64 else None


def test_a_dtype_written_into_the_model():
    """A forward that casts to float32 does not keep channels from going."""

    def forward(self, x):
        return self.b(F.relu(self.a(x.float())))

    model = kill(net(forward, a=nn.Linear(6, 20), b=nn.Linear(20, 3)))
    result = compact(model, torch.randn(4, 6))
    assert result.parameters[1] < result.parameters[0] and result.max_difference < 1e-6


def test_modes_and_frozen_weights_stay():
    """Modules keep their train or eval mode, and frozen weights stay frozen."""
    model = kill(residual())
    model.bn1.eval()
    model.conv1.requires_grad_(False)
    small = compact(model, torch.randn(IMAGE)).model
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    frozen = {name for name, p in small.named_parameters() if not p.requires_grad}
    assert "conv1.weight" in frozen <= {"conv1.weight", "conv1.bias"}


def test_channels_last():
    """A model in channels_last is narrowed and computes the same."""
    model = kill(residual()).to(memory_format=torch.channels_last)
    result = compact(model, torch.randn(IMAGE))
    assert result.parameters[1] < result.parameters[0]
    assert_same(result.model, model, torch.randn(IMAGE))


def test_randomness_in_the_model():
    """A forward that draws random numbers is compared under equal draws, and the random state is restored."""

    def forward(self, x):
        return self.lenet(x) + torch.rand(())

    model, x = net(forward, lenet=kill(LeNet(8))), torch.randn(1, 1, 8, 8)
    random = torch.get_rng_state()
    result = compact(model, x)
    assert result.max_difference < 1e-5 and result.parameters[1] < result.parameters[0]
    assert torch.equal(random, torch.get_rng_state())


# Refusals, each of which leaves the model as it was


class Broken(nn.Module):
    def forward(self, x):
        raise KeyError("no such thing")


class Detached(nn.Module):
    def forward(self, x):
        return x.detach()


def masked():
    """A Linear whose weight is computed from a mask."""
    return prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5)


@pytest.mark.parametrize(
    "layer, message",
    [
        (Broken(), "1.0: expected a forward pass on example_input, got KeyError: 'no such thing'"),
        (nn.Linear(4, 3), "1.0: expected a forward pass on example_input, got RuntimeError: mat1 and mat2"),
        (masked(), "1.0: expected its weight to be a parameter, got one that is computed"),
        (parametrizations.weight_norm(nn.Linear(3, 3)), "1.0: expected its weight to be a parameter"),
        (torch.jit.script(nn.Linear(3, 3)), "1.0: expected a plain nn.Module, got a scripted one"),
    ],
    ids=["broken", "misfit", "masked", "weight norm", "scripted"],
)
def test_what_cannot_be_traced_is_named(layer, message):
    """The error names the layer and the reason, and the model is unchanged."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(layer))
    before = copy.deepcopy(model[0].state_dict())
    with pytest.raises(ValueError) as error:
        compact(model, torch.randn(2, 3))
    assert str(error.value).startswith(message)
    assert all(torch.equal(before[key], value) for key, value in model[0].state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model[0].modules())


def test_what_is_in_front_of_a_detached_tensor_goes_too():
    """detach() does not end the following of channels."""
    model = kill(nn.Sequential(nn.Linear(3, 9), Detached(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 2)))
    result = compact(model, torch.randn(2, 3))
    assert shapes(result)["0.weight"][0] < 9 and shapes(result)["2.weight"][0] < 8
    assert_same(result.model, model, torch.randn(2, 3))


def test_an_operation_that_no_rule_foresees_holds_what_it_takes(monkeypatch):
    """Where a rule fails, channels stay and the report names the operation."""

    def fail(*args):
        raise IndexError("no such form")

    monkeypatch.setitem(following.RULES, "pointwise", fail)
    model = ones(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    with torch.no_grad():
        model[0].weight[1] = 0
    result = compact(model, torch.randn(2, 3))
    reason = "1 (relu: IndexError: no such form) takes them together"
    assert result.kept == {"0": f"dead or unread outputs that stay: 1; {reason}"}


def test_wrong_names_to_keep():
    """An unknown name, or a single string, is an error."""
    for keep in (["conv3"], "conv1"):
        with pytest.raises(ValueError, match=r"keep: expected a collection of names .* got .*conv"):
            compact(LeNet(8), torch.randn(1, 1, 8, 8), keep=keep)
