"""``kept`` names all that is dead and stays, with a reason that is true, and nothing else."""

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import assert_same, conv, net, shapes
from torch import nn

from cges_kernels import compact

DEAD = "dead or unread outputs that stay: "


class Conv1D(nn.Module):
    """As in transformers: a Linear whose weight is [in, out]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Attention(nn.Module):
    """q, k and v of one Linear, as in a vision transformer."""

    def __init__(self, heads=2):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        n, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, -1)
        return x + self.proj(out)


def gated(self, x):
    u, v = self.a(x).chunk(2, -1)
    return self.c(u * v)


def split_and_joined(self, x):
    u, v = self.a(x).split(4, 1)
    return self.c(torch.cat([v, u], 1))


def rotated(self, x):
    q = self.a(x)
    return self.c(q + torch.cat((-q[..., 4:], q[..., :4]), -1))


def pooled(self, x):
    return self.c(torch.stack([self.a(x).amax((2, 3)), self.a(x).mean((2, 3))], 1).flatten(1))


def shuffled(self, x):
    return self.c(F.channel_shuffle(self.a(x), 2))


def biased_in_parts():
    """As in BEiT: the bias of q, k and v is that of q and v, and constants between them."""

    def forward(self, x):
        bias = torch.cat([self.q, self.none, self.v])
        return self.c(F.linear(x, self.a.weight, bias).unflatten(-1, (2, 3)).relu().flatten(-2))

    model = net(forward, a=nn.Linear(8, 6, bias=False), c=nn.Linear(6, 2))
    model.q, model.v = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2))
    model.register_buffer("none", torch.zeros(2), persistent=False)
    return model


IMAGE, ROWS = (2, 3, 6, 6), (2, 5, 8)
# Networks without a zero: (how to make it, an example's shape)
DENSE = {
    "vision transformer": (lambda: nn.Sequential(Attention(), nn.Linear(8, 3)), ROWS),
    "gated": (lambda: net(gated, a=nn.Linear(8, 8), c=nn.Linear(4, 2)), ROWS),
    "gated by glu": (lambda: nn.Sequential(nn.Linear(8, 8), nn.GLU(), nn.Linear(4, 2)), ROWS),
    "split": (lambda: net(split_and_joined, a=conv(3, 8, 1), c=conv(8, 2, 1)), IMAGE),
    "rotary": (lambda: net(rotated, a=nn.Linear(8, 8), c=nn.Linear(8, 4)), ROWS),
    "shuffled": (lambda: net(shuffled, a=conv(3, 8, 1), c=conv(8, 2, 1)), IMAGE),
    "pooled twice": (lambda: net(pooled, a=conv(3, 8, 1), c=nn.Linear(16, 2)), IMAGE),
    "grouped": (lambda: nn.Sequential(conv(3, 8, 1), conv(8, 8, groups=4, padding=1), conv(8, 2, 1)), IMAGE),
    "depthwise": (lambda: nn.Sequential(conv(3, 8, 1), conv(8, 16, groups=8), conv(16, 2, 1)), IMAGE),
    "lstm": (lambda: net(lambda self, x: self.o(self.r(x)[0]), r=nn.LSTM(8, 6), o=nn.Linear(6, 2)), ROWS),
    "gru": (
        lambda: net(lambda self, x: self.o(self.r(x)[0]), r=nn.GRU(8, 6, 2, True), o=nn.Linear(6, 2)),
        ROWS,
    ),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), ROWS),
    "decoder": (
        lambda: net(
            lambda self, x: self.layer(x, x * 2), layer=nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
        ),
        ROWS,
    ),
    "biased in parts": (biased_in_parts, ROWS),
    "Conv1D": (lambda: nn.Sequential(Conv1D(12, 8), nn.GELU(), Conv1D(4, 12)), ROWS),
}


@pytest.mark.parametrize("make, shape", DENSE.values(), ids=DENSE)
def test_a_dense_model_has_nothing_in_kept(make, shape):
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():  # biases of attention begin as zeros, and so do Conv1D's
        for p in model.parameters():
            p[p == 0] = 0.1
    result = compact(model, torch.randn(shape))
    assert result.kept == {} and result.parameters[0] == result.parameters[1]


def unread(layer, columns):
    with torch.no_grad():
        layer.weight[:, columns] = 0


@torch.no_grad()
def dead(layer, rows, also=()):
    layer.weight[rows] = 0
    for p in also:
        p[rows] = 0


# Chunks, splits and joins of one layer's outputs


@pytest.mark.parametrize(
    "forward, width, columns, left",
    [
        (gated, 4, [1], {"a.weight": (6, 8), "c.weight": (2, 3)}),  # one of each half
        (rotated, 8, [2, 6], {"a.weight": (6, 8), "c.weight": (2, 6)}),
    ],
)
def test_pairs_go_together(forward, width, columns, left):
    model = net(forward, a=nn.Linear(8, 8), c=nn.Linear(width, 2))
    unread(model.c, columns)
    result = compact(model, torch.randn(ROWS))
    if forward is rotated:  # halves of eight are written into it
        assert shapes(result) == {"a.weight": (8, 8), "c.weight": (2, 8)}
        assert result.kept["a"].startswith(f"{DEAD}2; without them ")
    else:
        assert shapes(result) == left and not result.kept
    assert_same(result.model, model, torch.randn(ROWS))


def test_a_split_by_numbers_is_told():
    model = net(split_and_joined, a=conv(3, 8, 1), c=conv(8, 2, 1))
    unread(model.c, [0])
    result = compact(model, torch.randn(IMAGE))
    if result.kept:
        assert result.kept["a"].startswith(f"{DEAD}1; without them ")
    assert_same(result.model, model, torch.randn(IMAGE))


def test_blocks_alike_are_refused_at_once():
    """Where the size of a split is written into the code of one block, it is in its like."""

    def block(self, x):
        u, v = self.a(x).relu().split(4, 1)
        return self.c(u * v + 1)

    model = nn.Sequential(*[net(block, a=conv(3, 8, 1), c=conv(4, 3, 1)) for _ in range(6)])
    same = type(model[0])
    for module in model:
        module.__class__ = same
        unread(module.c, [0, 1])
    seen = []
    original = same.forward
    same.forward = lambda self, x: (seen.append(self is not None), original(self, x))[1]
    result = compact(model, torch.randn(IMAGE))
    assert set(result.kept) == {f"{i}.a" for i in range(6)}
    assert len(seen) <= 6 * 24  # forward passes, not one more for each block


# Layers that no rule of Linear and convolutions covers


@pytest.mark.parametrize("cls, gates", [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
def test_dead_units_of_recurrent_layers(cls, gates, options):
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
    model = nn.Sequential(Conv1D(12, 8), nn.GELU(), Conv1D(4, 12))
    with torch.no_grad():
        model[0].weight[:, :5] = 0
        model[2].weight[5:7] = 0
    result = compact(model, torch.randn(ROWS))
    assert shapes(result) == {"0.weight": (8, 5), "2.weight": (5, 4)} and not result.kept
    assert result.model[0].nf == 5 == result.model[2].nx
    assert_same(result.model, model, torch.randn(ROWS))


def test_dead_rows_of_attention_are_named():
    model = nn.Sequential(Attention(), nn.Linear(8, 3))
    dead(model[0].qkv, [0, 9], also=[model[0].qkv.bias])
    result = compact(model, torch.randn(ROWS))
    assert result.kept == {"0.qkv": f"{DEAD}2; 0 (_unsafe_view) lays them out along two dims"} or (
        list(result.kept) == ["0.qkv"] and "lays them out along two dims" in result.kept["0.qkv"]
    )


def test_dead_rows_of_in_proj_are_named():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with torch.no_grad():
        model.self_attn.in_proj_weight[[1, 10]] = 0
        model.linear2.weight[:, :6] = 0
    result = compact(model, torch.randn(ROWS))
    assert list(result.kept) == ["self_attn"]
    assert result.kept["self_attn"].startswith(f"in_proj_weight: {DEAD}2; ")
    assert shapes(result)["linear1.weight"] == (10, 8)


def test_what_a_weight_is_computed_from_is_named():
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
    def forward(self, x):
        return self.c(torch.bmm(x, self.experts).relu())

    model = net(forward, c=nn.Linear(6, 2))
    model.experts = nn.Parameter(torch.randn(2, 8, 6))
    with torch.no_grad():
        model.experts[1] = 0
    result = compact(model, torch.randn(ROWS))
    assert "experts: dead rows and columns that stay: 1 and 0" in result.kept["experts"]


def test_a_channel_alone_in_a_product_is_read():
    def forward(self, x):
        x = self.a(x)  # [n, 8, h, w]
        return x[:, 3] @ x[:, 4] + self.c(x).mean(1)

    model = net(forward, a=conv(3, 8, 1), c=conv(8, 2, 1))
    unread(model.c, [3, 4])
    result = compact(model, torch.randn(IMAGE))
    assert shapes(result)["a.weight"][0] == 8 and not result.kept


# Constants and blocks


def test_constants_into_a_depthwise_layer_are_named():
    model = nn.Sequential(conv(3, 8, 1), conv(8, 8, groups=8, padding=1), conv(8, 2, 1))
    dead(model[0], [0, 1])
    result = compact(model, torch.randn(IMAGE))
    assert result.kept == {"0": f"{DEAD}2; read with what comes of them by 2"}
    assert result.parameters[0] == result.parameters[1]


def test_zeros_through_a_depthwise_layer_go():
    model = nn.Sequential(conv(3, 8, 1), conv(8, 8, groups=8, padding=1), conv(8, 2, 1))
    dead(model[0], [0, 1], also=[model[0].bias])
    result = compact(model, torch.randn(IMAGE))
    assert not result.kept and shapes(result)["1.weight"] == (6, 1, 3, 3)
    assert result.model[1].groups == result.model[1].in_channels == 6
    assert_same(result.model, model, torch.randn(IMAGE))


def test_dead_outputs_of_groups_are_named():
    model = nn.Sequential(conv(3, 8, 1), conv(8, 8, groups=4), conv(8, 2, 1))
    dead(model[1], [0])
    result = compact(model, torch.randn(IMAGE))
    assert result.kept == {"1": f"{DEAD}1; 1 (convolution) works in 4 groups"}


def test_scales_of_zero_go():
    """Network slimming: zeros that are in a batch norm, not in a weight."""
    model = nn.Sequential(conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 2))
    with torch.no_grad():
        model[1].weight[:3] = 0
        model[1].bias.normal_()
    result = compact(model, torch.randn(IMAGE))
    assert shapes(result) == {"0.weight": (5, 3, 3, 3), "3.weight": (2, 5, 3, 3)} and not result.kept
    assert_same(result.model, model, torch.randn(IMAGE))


def test_layer_scales_of_zero_go():
    def forward(self, x):
        return self.c(self.gamma * self.a(x))

    model = net(forward, a=nn.Linear(8, 6), c=nn.Linear(6, 2))
    model.gamma = nn.Parameter(torch.tensor([0.0, 1, 1, 0, 1, 1]))
    result = compact(model, torch.randn(ROWS))
    assert shapes(result) == {"a.weight": (4, 8), "c.weight": (2, 4)} and not result.kept
    assert result.model.gamma.tolist() == [1.0] * 4


def test_a_table_for_longer_inputs_is_cut_whole():
    model = net(
        lambda self, x: self.c(self.a(x) + self.table[: x.shape[1]]), a=nn.Linear(8, 6), c=nn.Linear(6, 2)
    )
    model.table = nn.Parameter(torch.randn(20, 6))
    unread(model.c, [1, 4])
    result = compact(model, torch.randn(ROWS))
    assert shapes(result) == {"table": (20, 4), "a.weight": (4, 8), "c.weight": (2, 4)} and not result.kept
    assert torch.equal(result.model.table, model.table[:, [0, 2, 3, 5]])
    assert_same(result.model, model, torch.randn(2, 9, 8))


def test_what_meets_the_input_is_named():
    model = net(lambda self, x: self.c(x + self.a(x)), a=nn.Linear(8, 8), c=nn.Linear(8, 2))
    unread(model.c, [1, 4])
    result = compact(model, torch.randn(ROWS))
    assert result.kept == {"a": f"{DEAD}2; in Net (add) they meet what cannot be cut"}


def test_channels_go_through_padding_around_them():
    model = nn.Sequential(conv(3, 8, 1), nn.ZeroPad2d(2), conv(8, 4), nn.ConstantPad2d(1, 0.5), conv(4, 2))
    unread(model[2], [1, 4])
    result = compact(model, torch.randn(IMAGE))
    assert shapes(result)["0.weight"] == (6, 3, 1, 1) and not result.kept
    assert_same(result.model, model, torch.randn(IMAGE))


def test_inputs_are_picked_where_the_layer_is_called_alone():
    """Else its weight would be taken without the hook that picks."""

    def forward(self, x):
        return self.called(x) + F.linear(x, self.taken.weight)

    model = net(forward, called=nn.Linear(400, 9), taken=nn.Linear(400, 9))
    unread(model.called, slice(2, None))
    unread(model.taken, slice(2, None))
    result = compact(model, torch.randn(2, 400))
    assert shapes(result) == {"called.weight": (9, 2), "taken.weight": (9, 400)}
    assert_same(result.model, model, torch.randn(2, 400))


def test_the_last_channel_is_named():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    unread(model[2], slice(None))
    result = compact(model, torch.randn(ROWS))
    assert result.kept["0"] == f"{DEAD}1; one channel of 0 is left"
    assert shapes(result)["0.weight"] == (1, 8)
