"""sparsity_report's FLOPs: which weight they belong to and how many they are, counted by hand."""

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import Conv1D
from torch import nn

from cges_kernels.reporting.report import sparsity_report


def rows(report):
    """The report's rows by the weights' names."""
    return {row["name"]: row for row in report.to_dict()["layers"]}


def test_flops_of_a_convolution_by_hand():
    """Dense, nonzero-weighted and compacted FLOPs; under "channel" only whole input channels leave."""
    model = nn.Conv2d(2, 4, (3, 2), padding=(1, 0))
    with torch.no_grad():
        model.weight.fill_(1)[0] = 0  # 1 of 4 outputs
        model.weight[:, :, 0, 0] = 0  # 1 of 6 taps, in both channels
    report = sparsity_report(model, torch.ones(3, 2, 5, 7))
    row = report.to_dict()["layers"][0]
    dense = 2 * 3 * (5 * 6) * 4 * (2 * 6)  # 2 * batch * positions * out * (in * taps)
    assert row["flops"] == dense
    assert row["nonzero"] == 3 * 2 * 5
    assert row["flops_nonzero"] == pytest.approx(dense * 30 / 48)
    assert row["flops_compacted"] == pytest.approx(dense * (3 / 4) * (5 / 6))
    whole_channels = sparsity_report(model, torch.ones(3, 2, 5, 7), group_by="channel").total
    assert whole_channels.flops_compacted == pytest.approx(dense * 3 / 4)
    assert report.other_flops == 0


def test_compaction_goes_block_by_block():
    """In a grouped convolution, a block loses its own dead outputs and inputs only."""
    model = nn.Conv1d(4, 4, 1, groups=2, bias=False)
    with torch.no_grad():
        model.weight.fill_(1)[0] = 0  # first block: an output and an input, which leaves 1 x 1 of 2 x 2
        model.weight[:2, 0] = 0
    (row,) = sparsity_report(model, torch.ones(1, 4, 3)).to_dict()["layers"]
    assert row["flops"] == 2 * 3 * 8
    assert row["flops_compacted"] == 2 * 3 * (1 + 4)


def test_flops_of_every_kind_of_layer():
    """Linear, convolutions, transposed ones, LSTM and GRU cells count what they multiply."""

    def flops(model, *example):
        return [layer.flops for layer in sparsity_report(model, example).layers]

    assert flops(nn.Linear(3, 5), torch.ones(2, 7, 3)) == [2 * 14 * 15]
    assert flops(nn.Linear(3, 5), torch.ones(3)) == [2 * 15]
    assert flops(Conv1D(5, 3), torch.ones(2, 7, 3)) == [2 * 14 * 15]
    assert flops(nn.Conv1d(6, 6, 3, groups=6), torch.ones(2, 6, 9)) == [2 * 2 * 7 * 6 * 3]
    assert flops(nn.ConvTranspose1d(4, 6, 2, groups=2), torch.ones(2, 4, 9)) == [2 * 2 * 9 * 4 * 3 * 2]
    lstm = nn.LSTM(3, 5, proj_size=2, bidirectional=True)  # [time, batch, features]
    assert flops(lstm, torch.ones(7, 2, 3)) == 2 * [2 * 14 * 20 * 3, 2 * 14 * 20 * 2, 2 * 14 * 2 * 5]
    assert flops(nn.LSTM(3, 5), torch.ones(7, 2, 3)) == [2 * 14 * 20 * 3, 2 * 14 * 20 * 5]
    assert flops(nn.GRUCell(3, 5), torch.ones(2, 3)) == [2 * 2 * 15 * 3, 2 * 2 * 15 * 5]


@pytest.mark.parametrize("example", ["itself", "another"])
def test_flops_of_attention_are_split_by_weight(example):
    """The packed q, k, v projection and the output projection get their own FLOPs.

    Self-attention and attention to another tensor take different code in PyTorch.
    """

    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            y = x if example == "itself" else x + 1
            return self.attention(x, y, y, need_weights=False)

    report = sparsity_report(Attend().eval(), torch.ones(3, 6, 4))
    assert [layer.flops for layer in report.layers] == [2 * 18 * 12 * 4, 2 * 18 * 4 * 4]
    assert (
        report.other_flops == 2 * (3 * 2) * (6 * 6 * 2) * 2
    )  # q @ k.T and attention @ v, for each batch and head


def test_a_transformer_layer_hides_nothing_in_its_fast_path():
    """PyTorch's fused inference path would hide the products; it is off while counting and on afterwards."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    flops = [r.flops for r in sparsity_report(layer, torch.ones(3, 6, 4)).layers]
    assert flops == [2 * 18 * n for n in (12 * 4, 4 * 4, 8 * 4, 4 * 8)]
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.mkldnn.enabled


class Uses(nn.Module):
    """A layer called twice, one used by its weight only, one never used, and one tied to an embedding."""

    def __init__(self):
        super().__init__()
        self.twice, self.by_weight, self.never = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 2)
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.twice(self.twice(self.embedding(tokens)))
        return F.linear(x, self.by_weight.weight), self.head(x)


USES = {"twice.weight": 2 * 2 * 6 * 16, "by_weight.weight": 2 * 6 * 12, "never.weight": 0}


def test_flops_go_to_the_weight_that_is_used():
    """Products count for the weight, however often and by whatever module it is used."""
    report = sparsity_report(Uses(), torch.zeros(6, dtype=torch.long))
    assert {name: row["flops"] for name, row in rows(report).items()} == USES
    assert report.other_flops == 2 * 6 * 40
    assert report.total.flops == sum(USES.values()) + 2 * 6 * 40


def test_flops_under_autocast():
    """Autocast multiplies by copies of the weights, whose FLOPs still belong to the weights."""
    with torch.autocast("cpu", torch.bfloat16):
        report = sparsity_report(Uses(), torch.zeros(6, dtype=torch.long))
    assert {name: row["flops"] for name, row in rows(report).items()} == USES


def test_flops_in_inference_mode():
    """The same report as outside of inference mode."""
    model = nn.LSTM(3, 5)
    expected = sparsity_report(model, torch.ones(7, 2, 3)).to_dict()
    with torch.inference_mode():
        assert sparsity_report(model, torch.ones(7, 2, 3)).to_dict() == expected


def test_no_example_no_flops():
    """Without an example input the report neither holds nor shows FLOPs."""
    report = sparsity_report(nn.Linear(3, 2))
    assert report.other_flops is None and report.total.flops is None
    assert not any("flops" in key for key in (*report.to_dict(), *report.to_dict()["total"]))
    assert "FLOPs" not in str(report)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flops_are_the_same_on_a_gpu():
    """cuDNN's kernels change no count, and the GPU's random state and flags are left alone."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.lstm = nn.Conv1d(8, 8, 3, groups=8), nn.LSTM(8, 4)
            self.encoder = nn.TransformerEncoderLayer(4, 2, 8)

        def forward(self, x):
            return self.encoder(self.lstm(self.conv(x).permute(2, 0, 1))[0])

    model, x = Net(), torch.ones(2, 8, 9)
    expected = sparsity_report(model, x).to_dict()
    random = torch.cuda.get_rng_state()
    assert sparsity_report(model.cuda(), x.cuda()).to_dict() == expected
    assert torch.equal(random, torch.cuda.get_rng_state())
    assert torch.backends.cudnn.enabled
