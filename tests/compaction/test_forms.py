"""The forms that models, examples and outputs take around a network: compact() treats all of them alike."""

import dataclasses
import itertools
import warnings
from collections import UserDict
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers.compacting import kill, net, shapes
from helpers.networks import IMAGE, residual, tied
from torch import nn

from cges_kernels import compact, load_compacted, save_compacted, sparsity_report


def scaled(self, x, scale=None):
    return self.b(self.a(x).relu() * (1 if scale is None else scale))


def half_unread(forward=scaled):
    """A model of eight units, of which four are read."""
    model = net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    with torch.no_grad():
        model.b.weight[:, :4] = 0
    return model


HALF = {"a.weight": (4, 4), "b.weight": (2, 4)}
X, SCALE = torch.randn(3, 4), torch.rand(3, 1)
EXAMPLES = {
    "one tensor": ((X,), {}),
    "a tuple": (((X, SCALE),), {}),
    "a dict": (({"x": X, "scale": SCALE},), {}),
    "a mapping": ((UserDict(x=X, scale=SCALE),), {}),
    "both": ((X, {"scale": SCALE}), {}),
    "keywords alone": ((), {"kwargs": {"x": X, "scale": SCALE}}),
}


@pytest.mark.parametrize("args, kwargs", EXAMPLES.values(), ids=EXAMPLES)
def test_examples(args, kwargs):
    """An example may be a tensor, tuple, dict, mapping, keywords or some of them together."""
    model = half_unread()
    result = compact(model, *args, **kwargs)
    assert shapes(result) == HALF and not result.kept
    torch.testing.assert_close(result.model(X, SCALE), model(X, SCALE))


def test_a_report_takes_the_same_examples():
    """sparsity_report takes all of these too."""
    model = half_unread()
    given = [X, (X, SCALE), {"x": X, "scale": SCALE}, UserDict(x=X, scale=SCALE)]
    flops = [sparsity_report(model, example).total.flops for example in given]
    flops.append(sparsity_report(model, X, kwargs={"scale": SCALE}).total.flops)
    assert len(set(flops)) == 1


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    more: object = None


class Named(NamedTuple):
    logits: torch.Tensor
    count: int


OUTPUTS = {
    "dataclass": lambda x: Answer(x),
    "nested": lambda x: Answer(x, more=[Answer(2 * x)]),
    "mapping": lambda x: UserDict(logits=x),
    "named tuple": lambda x: Named(x, 3),
    "none beside": lambda x: (x, None, "text"),
}


@pytest.mark.parametrize("wrap", OUTPUTS.values(), ids=OUTPUTS)
def test_outputs(wrap):
    """A dead output of the model is found, and stays, in any kind of result."""
    model = half_unread(lambda self, x: wrap(self.b(self.a(x).relu())))
    with torch.no_grad():
        model.b.weight[1] = 0
    result = compact(model, X)
    assert shapes(result) == HALF  # the model's dead output stays, wherever it is in the result
    assert result.kept == {"b": "dead or unread outputs that stay: 1; they are outputs of the model"}


# Wrappers


def compiled_inside():
    """A compiled module within a model."""
    return nn.Sequential(torch.compile(half_unread()), nn.Identity())


def compiled_in_place():
    """A model compiled by Module.compile."""
    model = half_unread()
    model.compile()
    return model


WRAPPED = {
    "compiled": lambda: torch.compile(half_unread()),
    "compiled in place": compiled_in_place,
    "compiled inside": compiled_inside,
    "data parallel": lambda: nn.DataParallel(half_unread()),
    "both": lambda: torch.compile(nn.DataParallel(half_unread())),
}


IN_PLACE = pytest.mark.full("Module.compile works too; the first tier has torch.compile(module)")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[IN_PLACE] * (name == "compiled in place")) for name in WRAPPED]
)
def test_wrappers(name):
    """compact() works on the model inside a wrapper and returns it without one."""
    wrapped = WRAPPED[name]()
    result = compact(wrapped, X)
    assert sorted(shapes(result).values()) == sorted(HALF.values())
    if not isinstance(wrapped, nn.Sequential):
        assert list(shapes(result)) == list(HALF) and type(result.model).__name__ == "Net"


def test_names_to_keep_are_those_inside():
    """keep= takes the names without the wrapper's prefix."""
    result = compact(nn.DataParallel(half_unread()), X, keep=["a"])
    assert shapes(result)["a.weight"] == (8, 4) and "asked for" in result.kept["a"]


def test_distributed_data_parallel(tmp_path):
    """The same for DistributedDataParallel."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        result = compact(nn.parallel.DistributedDataParallel(half_unread()), X)
    finally:
        dist.destroy_process_group()
    assert shapes(result) == HALF


# Memory format, hooks, scripts


def test_channels_last_stays():
    """The result's weights are in channels_last as the model's are."""
    model = kill(residual()).to(memory_format=torch.channels_last)
    small = compact(model, torch.randn(IMAGE)).model
    wide = [p for p in small.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
    assert wide and all(p.is_contiguous(memory_format=torch.channels_last) for p in wide)


class Watched(nn.Module):
    """A model whose layer has one of its own methods as a hook."""

    def __init__(self):
        super().__init__()
        self.inner = half_unread()
        self.seen = []
        self.inner.a.register_forward_hook(self.note)

    def note(self, module, args, out):
        self.seen.append(tuple(out.shape))

    def forward(self, x):
        return self.inner(x)


def test_hooks_run_in_the_result_alone():
    """compact() runs no hook, and the result has all of them, bound to the copy."""
    model, seen = Watched(), []
    layer = model.inner.b
    layer.register_forward_pre_hook(lambda m, args: seen.append("before"))
    layer.register_forward_hook(lambda m, args, kwargs, out: seen.append("after"), with_kwargs=True)
    layer.register_full_backward_hook(lambda m, into, out: seen.append("back"))
    layer.register_forward_hook(lambda m, args, out: seen.append("always"), always_call=True)
    result = compact(model, X)
    assert not seen and not model.seen
    result.model(X).sum().backward()
    assert seen == ["before", "after", "always", "back"]
    assert result.model.seen == [(3, 4)] and not model.seen  # the hook is the copy's own method
    seen.clear()
    model(X).sum().backward()
    assert seen == ["before", "after", "always", "back"] and model.seen == [(3, 8)]


FOUND = []


def test_a_model_that_needs_its_hooks():
    """A forward that fails without its hooks is run with them."""

    def forward(self, x):
        self.a(x)
        return self.b(FOUND.pop().relu())

    model = half_unread(forward)
    model.a.register_forward_hook(lambda module, args, out: FOUND.append(out))
    result = compact(model, X)
    assert shapes(result) == HALF
    torch.testing.assert_close(result.model(X), model(X))


def chain(*sizes, reads=slice(None)):
    """Linear layers that each read only the inputs ``reads``."""
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    with torch.no_grad():
        for layer in layers:
            mask = torch.zeros(layer.in_features)
            mask[reads] = 1
            layer.weight *= mask
    return nn.Sequential(*[x for layer in layers for x in (layer, nn.ReLU())])


def convolutions(cls, pool):
    """Two convolutions and a pooling; the first reads one channel of ninety."""
    model = nn.Sequential(cls(90, 40, 1), nn.ReLU(), cls(40, 2, 1), pool)
    with torch.no_grad():
        model[0].weight[:, 1:] = 0
    return model


SCRIPTED = {
    "smaller": (lambda: chain(4, 8, 2, reads=slice(3)), (3, 4)),
    "picking": (lambda: chain(100, 70, 2, reads=slice(20)), (3, 100)),
    "picking few": (lambda: chain(300, 20, 2, reads=slice(2)), (2, 5, 300)),
    "picking channels": (lambda: convolutions(nn.Conv2d, nn.AdaptiveAvgPool2d(1)), (2, 90, 5, 5)),
}


@pytest.mark.parametrize("make, shape", SCRIPTED.values(), ids=SCRIPTED)
def test_results_are_scripted(make, shape):
    """torch.jit.script takes the result, layers that pick inputs included."""
    x = torch.randn(shape)
    small = compact(make(), x).model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(small)
    torch.testing.assert_close(scripted(x), small(x))
    if shape != (3, 4):
        assert len(small[0].read_inputs) < small[0].given_inputs == shape[1 if len(shape) == 4 else -1]


# Files


class WithProperties(nn.Module):
    """A model with properties named like sizes, which cannot be set."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        self.inner = nn.Sequential(nn.Linear(2, 2))

    @property
    def num_features(self):
        return self.a.out_features

    @property
    def in_features(self):
        return self.a.in_features

    def forward(self, x):
        return self.inner(self.b(self.a(x).relu()))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.r, self.o = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        return self.o(self.r(x)[0])


@pytest.mark.parametrize("make", [WithProperties, tied, Recurrent])
def test_files(make, tmp_path):
    """Models with properties, tied weights and LSTMs pass through a file."""
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and p.shape[1] > 7:
                p[:, :4] = 0
    x = torch.randn(3, 5, 6 if isinstance(model, nn.Sequential) else 4)
    small = compact(model, x).model
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    save_compacted(small, tmp_path / "small.pt")
    loaded = load_compacted(make(), tmp_path / "small.pt")
    assert torch.equal(loaded(x), small(x))
    assert len(list(loaded.parameters())) == len(list(small.parameters()))  # tied weights are tied again


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("make, shape", [(residual, IMAGE), (Recurrent, (3, 5, 4))])
def test_on_a_gpu(make, shape, tmp_path):
    """A model on a GPU gives a result there, which computes the same and passes through a file."""
    model, x = kill(make()).cuda(), torch.randn(shape).cuda()
    if make is Recurrent:
        with torch.no_grad():
            for p in model.parameters():
                p[..., ::2] = 0
    result = compact(model, x)
    assert {p.device.type for p in result.model.parameters()} == {"cuda"}
    torch.testing.assert_close(result.model.eval()(x), model.eval()(x), rtol=1e-3, atol=1e-4)
    save_compacted(result.model, tmp_path / "small.pt")
    loaded = load_compacted(make(), tmp_path / "small.pt").cuda().eval()
    torch.testing.assert_close(loaded(x), result.model(x))
