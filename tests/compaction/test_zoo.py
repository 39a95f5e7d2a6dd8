"""Networks of other libraries, small and with random weights: torchvision's, timm's and transformers'.

These libraries take seconds to import, so only tests that run import them.
"""

import time
from contextlib import contextmanager

import pytest
import torch
from helpers.vision import torchvision
from torch import nn

from cges_kernels import compact
from cges_kernels.compaction.running import leaves

FORWARDS = 20  # forward passes that one compact() may make
SECONDS = 60  # far more than it needs: a search without end exceeds it


def image(size, channels=3):
    return torch.randn(2, channels, size, size)


def tokens(**more):
    return {"input_ids": torch.randint(50, (2, 7)), **more}


def hugging_face(name, task, **sizes):
    """A function that makes this model of transformers."""

    def make():
        torchvision()
        transformers = pytest.importorskip("transformers")
        config = getattr(transformers, f"{name}Config")(**sizes)
        return getattr(transformers, f"{name}{task}")(config)

    return make


def from_torchvision(make):
    """A function that makes a model of torchvision."""
    return lambda: make((torchvision() or pytest.skip("needs torchvision")).models)


def from_timm(name, **options):
    """A function that makes this model of timm."""

    def make():
        torchvision()
        return pytest.importorskip("timm").create_model(name, num_classes=10, **options)

    return make


WIDTHS = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
# name: (how to make it, an example, the percentage of parameters that may be left)
ZOO = {
    "resnet": (from_torchvision(lambda of: of.ResNet(of.resnet.BasicBlock, [1, 1, 1, 1], 10)), image(32), 45),
    "vit": (from_timm("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2), image(32), 62),
    "llama": (
        hugging_face("Llama", "ForCausalLM", vocab_size=50, num_key_value_heads=2, **WIDTHS),
        tokens(),
        81,
    ),
    "mobilenet": (
        from_torchvision(lambda of: of.mobilenet_v2(num_classes=10, width_mult=0.25)),
        image(32),
        48,
    ),
    "densenet": (
        from_torchvision(lambda of: of.DenseNet(8, (2, 2, 2, 2), 16, num_classes=10)),
        image(32),
        38,
    ),
    "googlenet": (
        from_torchvision(lambda of: of.googlenet(num_classes=10, init_weights=False, aux_logits=True)),
        image(64),
        47,
    ),
    "shufflenet": (from_torchvision(lambda of: of.shufflenet_v2_x0_5(num_classes=10)), image(64), 39),
    "regnet": (from_torchvision(lambda of: of.regnet_y_400mf(num_classes=10)), image(32), 61),
    "swin": (
        from_torchvision(lambda of: of.SwinTransformer([4, 4], 24, [2, 2], [2, 2], [4, 4], num_classes=10)),
        image(32),
        81,
    ),
    "convnext": (from_timm("convnext_atto", depths=(1, 1, 2, 1)), image(32), 59),
    "mixer": (from_timm("mixer_s32_224", img_size=64), image(64), 60),
    "res2net": (from_timm("res2net50_26w_4s"), image(32), 48),
    "levit": (from_timm("levit_128s", img_size=64), image(64), 48),
    "bert": (hugging_face("Bert", "Model", vocab_size=50, **WIDTHS), tokens(), 93),
    "gpt2": (
        hugging_face("GPT2", "LMHeadModel", vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=32),
        tokens(),
        81,
    ),
    "t5": (
        hugging_face(
            *("T5", "ForConditionalGeneration"), vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2
        ),
        tokens(decoder_input_ids=torch.randint(50, (2, 5))),
        92,
    ),
    "clip": (
        hugging_face("CLIPVision", "Model", image_size=32, patch_size=8, **WIDTHS),
        {"pixel_values": image(32)},
        89,
    ),
    "segformer": (
        hugging_face(
            *("Segformer", "ForSemanticSegmentation"),
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 2, 3, 4],
            decoder_hidden_size=16,
        ),
        {"pixel_values": image(64)},
        73,
    ),
}
FIRST = ("resnet", "vit", "llama")  # one of each library
OTHERS = pytest.mark.full(
    "more networks of other libraries; helpers.networks has one for each way to couple channels"
)
NAMES = [name if name in FIRST else pytest.param(name, marks=OTHERS) for name in ZOO]


@torch.no_grad()
def with_structured_zeros(model):
    """Makes a third of each layer's outputs dead, with their biases, and a third of its inputs unread."""
    for module in model.modules():
        w = getattr(module, "weight", None)
        if isinstance(w, nn.Parameter) and w.dim() > 1 and not isinstance(module, nn.Embedding):
            w[::3] = 0
            if isinstance(getattr(module, "bias", None), nn.Parameter) and len(module.bias) == len(w):
                module.bias[::3] = 0
            if w.shape[1] > 3:
                w[:, ::3] = 0
    return model


@contextmanager
def counted_forwards(model):
    """Counts the forward passes of this model's class."""
    cls, seen = type(model), []
    forward = cls.forward

    def counting(self, *args, **kwargs):
        seen.append(self)
        return forward(self, *args, **kwargs)

    cls.forward = counting
    try:
        yield seen
    finally:
        cls.forward = forward


def run(model, example):
    """The tensors that the model returns."""
    with torch.no_grad():
        out = model(**example) if isinstance(example, dict) else model(example)
    return [x for x in leaves(out) if isinstance(x, torch.Tensor)]


def other(x):
    """Another input of the same kind."""
    return torch.randn_like(x) if x.is_floating_point() else (x + 1) % 50


@pytest.mark.parametrize("name", NAMES)
def test_structured_zeros_go(name):
    """The result computes the same, is as small as expected, and took few forward passes."""
    torch.manual_seed(0)
    make, example, percent = ZOO[name]
    model = with_structured_zeros(make().eval())
    run(model, example)  # some networks complete themselves in their first forward pass
    start = time.monotonic()
    with counted_forwards(model) as seen:
        result = compact(model, example)
    assert time.monotonic() - start < SECONDS and len(seen) <= FORWARDS
    changed = {k: other(v) for k, v in example.items()} if isinstance(example, dict) else other(example)
    for ours, theirs in zip(run(result.model, changed), run(model, changed), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max() + 1))
    assert result.parameters[1] <= percent / 100 * result.parameters[0]
    assert not any("Error" in reason and "without them" not in reason for reason in result.kept.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_dense_network_stays_as_it_is(name):
    """Without zeros no weight changes and nothing is reported."""
    torch.manual_seed(0)
    make, example, _ = ZOO[name]
    model = make().eval()
    with torch.no_grad():  # heads and biases that begin as zeros would count as dead
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p) * (p == 0)
    result = compact(model, example)
    assert result.kept == {} and not result.layers
    for ours, theirs in zip(result.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
