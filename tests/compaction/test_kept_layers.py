"""Layers beyond the rules of Linear and convolutions: which units go, and what ``kept`` reports."""

import pytest
import torch
import torch.nn.functional as F
from helpers.compacting import Attention, assert_same, conv, dead, net, shapes, unread
from helpers.layers import Conv1D
from torch import nn

from cges_kernels import compact

DEAD = "dead or unread outputs that stay: "


IMAGE, ROWS = (2, 3, 6, 6), (2, 5, 8)


@pytest.mark.parametrize("cls, gates", [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
def test_dead_units_of_recurrent_layers(cls, gates, options):
    """Dead units of a recurrent layer go from all gates, and from the layer that reads them.

    With several layers or directions they stay, because these share one hidden_size.
    """
    width = 2 if "bidirectional" in options else 1
    model = net(
        lambda self, x: self.o(self.r(x)[0]),
        r=cls(8, 6, batch_first=True, **options),
        o=nn.Linear(6 * width, 4),
    )
    with torch.no_grad():
        for name, p in model.r.named_parameters():
            p[[6 * gate + unit for gate in range(gates) for unit in (0, 3)]] = 0
            if "weight_hh" in name or ("l1" in name and p.dim() == 2):
                p[:, [0, 3]] = 0
    unread(model.o, [6 * i + unit for i in range(width) for unit in (0, 3)])
    result = compact(model, torch.randn(ROWS))
    assert_same(result.model, model, torch.randn(ROWS))
    if options:
        assert "the layers and directions of r have one hidden_size" in result.kept["r"]
        assert result.parameters[0] == result.parameters[1]
    else:
        assert result.model.r.hidden_size == 4 and not result.kept
        assert shapes(result)["r.weight_hh_l0"] == (4 * gates, 4) and shapes(result)["o.weight"] == (4, 4)


@pytest.mark.parametrize("cls, gates", [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_dead_units_of_recurrent_cells(cls, gates):
    """The same for cells that the model calls step by step."""

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.o(state[0] if isinstance(state, tuple) else state)

    model = net(forward, cell=cls(8, 6), o=nn.Linear(6, 4))
    with torch.no_grad():
        for p in model.cell.parameters():
            p[[6 * gate + unit for gate in range(gates) for unit in (0, 3)]] = 0
        model.cell.weight_hh[:, [0, 3]] = 0
    unread(model.o, [0, 3])
    result = compact(model, torch.randn(ROWS))
    assert result.model.cell.hidden_size == 4 and not result.kept
    assert_same(result.model, model, torch.randn(ROWS))


def test_units_of_a_transposed_linear_go():
    """Hugging Face's Conv1D, whose weight is [in, out], is narrowed on the right sides."""
    model = nn.Sequential(Conv1D(12, 8), nn.GELU(), Conv1D(4, 12))
    with torch.no_grad():
        model[0].weight[:, :5] = 0
        model[2].weight[5:7] = 0
    result = compact(model, torch.randn(ROWS))
    assert shapes(result) == {"0.weight": (8, 5), "2.weight": (5, 4)} and not result.kept
    assert result.model[0].nf == 5 == result.model[2].nx
    assert_same(result.model, model, torch.randn(ROWS))


def test_dead_rows_of_attention_are_named():
    """Dead rows of a packed q, k, v stay, because heads and channels are laid out along two dims."""
    model = nn.Sequential(Attention(), nn.Linear(8, 3))
    dead(model[0].qkv, [0, 9], also=[model[0].qkv.bias])
    result = compact(model, torch.randn(ROWS))
    assert list(result.kept) == ["0.qkv"]
    assert result.kept["0.qkv"].startswith(f"{DEAD}2; ")
    assert result.kept["0.qkv"].endswith(" lays them out along two dims")


def test_dead_rows_of_in_proj_are_named():
    """Dead rows of MultiheadAttention stay and are reported; the units of the feed-forward layer go."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with torch.no_grad():
        model.self_attn.in_proj_weight[[1, 10]] = 0
        model.linear2.weight[:, :6] = 0
    result = compact(model, torch.randn(ROWS))
    assert list(result.kept) == ["self_attn"]
    assert result.kept["self_attn"].startswith(f"in_proj_weight: {DEAD}2; ")
    assert shapes(result)["linear1.weight"] == (10, 8)


def test_what_a_weight_is_computed_from_is_named():
    """A parameter from which a weight is computed keeps dead columns, and is reported."""

    def forward(self, x):
        w = self.a.weight
        w = (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)
        return self.c(F.linear(x, w).relu())

    model = net(forward, a=nn.Linear(8, 6, bias=False), c=nn.Linear(6, 2))
    with torch.no_grad():
        model.a.weight[2:4] = 0
        model.a.weight[2:4, ::2] = 1e-3
        model.a.weight[:, 3] = 0
    result = compact(model, torch.randn(ROWS))
    assert list(result.kept) == ["a"] and "dead rows and columns that stay: 0 and 1" in result.kept["a"]


def test_a_dead_expert_is_named():
    """A dead slice of a bare 3-d parameter stays and is reported."""

    def forward(self, x):
        return self.c(torch.bmm(x, self.experts).relu())

    model = net(forward, c=nn.Linear(6, 2))
    model.experts = nn.Parameter(torch.randn(2, 8, 6))
    with torch.no_grad():
        model.experts[1] = 0
    result = compact(model, torch.randn(ROWS))
    assert "experts: dead rows and columns that stay: 1 and 0" in result.kept["experts"]


def test_constants_into_a_depthwise_layer_are_named():
    """A constant in front of a padded depthwise layer differs at the borders, so it stays."""
    model = nn.Sequential(conv(3, 8, 1), conv(8, 8, groups=8, padding=1), conv(8, 2, 1))
    dead(model[0], [0, 1])
    result = compact(model, torch.randn(IMAGE))
    assert result.kept == {"0": f"{DEAD}2; read with what comes of them by 2"}
    assert result.parameters[0] == result.parameters[1]


def test_zeros_through_a_depthwise_layer_go():
    """Channels that are 0 leave a depthwise layer along with its groups."""
    model = nn.Sequential(conv(3, 8, 1), conv(8, 8, groups=8, padding=1), conv(8, 2, 1))
    dead(model[0], [0, 1], also=[model[0].bias])
    result = compact(model, torch.randn(IMAGE))
    assert not result.kept and shapes(result)["1.weight"] == (6, 1, 3, 3)
    assert result.model[1].groups == result.model[1].in_channels == 6
    assert_same(result.model, model, torch.randn(IMAGE))


def test_dead_outputs_of_groups_are_named():
    """One dead output of a grouped convolution stays, because all groups have one size."""
    model = nn.Sequential(conv(3, 8, 1), conv(8, 8, groups=4), conv(8, 2, 1))
    dead(model[1], [0])
    result = compact(model, torch.randn(IMAGE))
    assert result.kept == {"1": f"{DEAD}1; 1 (convolution) works in 4 groups"}


def zero_rows(layer, rows, bias):
    """Zeroes the rows of a weight, and gives the bias a number there."""
    with torch.no_grad():
        layer.weight[rows], layer.bias[rows] = 0, bias


def test_whole_groups_of_a_convolution_go():
    """A group leaves if nobody needs what it reads and makes, and the other groups keep their size."""
    ways = {
        "nothing comes in": lambda model: zero_rows(model[0], slice(2, 4), 0.0),
        "nothing goes out": lambda model: zero_rows(model[2], slice(3, 6), 0.0),
        "a constant goes out": lambda model: zero_rows(model[2], slice(3, 6), 0.5),
        "nobody reads it": lambda model: model[4].weight.data[:, 3:6].zero_(),
    }
    for way, prune in ways.items():
        layers = conv(3, 8, 1), nn.ReLU(), conv(8, 12, groups=4, padding=1), nn.ReLU(), conv(12, 2, 1)
        model = nn.Sequential(*layers)
        prune(model)
        result = compact(model, torch.randn(IMAGE))
        grouped = result.model[2]
        assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (3, 6, 9), way
        assert grouped.weight.shape == (9, 2, 3, 3) and not result.kept, way
        assert_same(result.model, model, torch.randn(IMAGE))


def test_a_group_that_is_needed_on_one_side_stays():
    """What a dead group reads may be read elsewhere, and then all of the group stays."""

    def forward(self, x):
        y = self.a(x)
        return self.c(self.b(y)) + self.d(y)

    model = net(forward, a=conv(3, 8, 1), b=conv(8, 8, 1, groups=4), c=conv(8, 2, 1), d=conv(8, 2, 1))
    zero_rows(model.b, slice(0, 2), 0.0)
    result = compact(model, torch.randn(IMAGE))
    assert result.kept == {"b": f"{DEAD}2; b (convolution) works in 4 groups"}
    assert result.parameters[0] == result.parameters[1]


def test_scales_of_zero_go():
    """Zero scales of a batch norm count as dead channels, as in network slimming."""
    model = nn.Sequential(conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 2))
    with torch.no_grad():
        model[1].weight[:3] = 0
        model[1].bias.normal_()
    result = compact(model, torch.randn(IMAGE))
    assert shapes(result) == {"0.weight": (5, 3, 3, 3), "3.weight": (2, 5, 3, 3)} and not result.kept
    assert_same(result.model, model, torch.randn(IMAGE))


def test_layer_scales_of_zero_go():
    """So do zeros of a bare parameter that scales channels."""

    def forward(self, x):
        return self.c(self.gamma * self.a(x))

    model = net(forward, a=nn.Linear(8, 6), c=nn.Linear(6, 2))
    model.gamma = nn.Parameter(torch.tensor([0.0, 1, 1, 0, 1, 1]))
    result = compact(model, torch.randn(ROWS))
    assert shapes(result) == {"a.weight": (4, 8), "c.weight": (2, 4)} and not result.kept
    assert result.model.gamma.tolist() == [1.0] * 4
