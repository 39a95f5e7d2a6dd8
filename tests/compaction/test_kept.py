"""``kept``, the report of what is dead and stays: it names all of it with a true reason, and nothing else."""

import pytest
import torch
import torch.nn.functional as F
from helpers.compacting import Attention, assert_same, conv, net, shapes, unread
from helpers.layers import Conv1D
from torch import nn

from cges_kernels import compact

DEAD = "dead or unread outputs that stay: "


def gated(self, x):
    """Half of a layer's outputs times the other half."""
    u, v = self.a(x).chunk(2, -1)
    return self.c(u * v)


def split_and_joined(self, x):
    """Two halves exchanged; the size of the split is written out."""
    u, v = self.a(x).split(4, 1)
    return self.c(torch.cat([v, u], 1))


def rotated(self, x):
    """A rotary embedding's rotation of halves; their sizes are written out."""
    q = self.a(x)
    return self.c(q + torch.cat((-q[..., 4:], q[..., :4]), -1))


def pooled(self, x):
    """Two poolings of one layer, stacked and flattened."""
    return self.c(torch.stack([self.a(x).amax((2, 3)), self.a(x).mean((2, 3))], 1).flatten(1))


def shuffled(self, x):
    """A channel shuffle."""
    return self.c(F.channel_shuffle(self.a(x), 2))


def biased_in_parts():
    """A layer as in BEiT: its bias is put together from those of q and v, and constants between them."""

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
    """A model without zeros is not narrowed, and nothing is reported."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():  # biases of attention and of Conv1D begin as zeros
        for p in model.parameters():
            p[p == 0] = 0.1
    result = compact(model, torch.randn(shape))
    assert result.kept == {} and result.parameters[0] == result.parameters[1]


@pytest.mark.parametrize(
    "forward, width, columns, left",
    [
        (gated, 4, [1], {"a.weight": (6, 8), "c.weight": (2, 3)}),  # one unit of each half
        (rotated, 8, [2, 6], {"a.weight": (8, 8), "c.weight": (2, 8)}),  # has halves of eight written out
    ],
)
def test_pairs_go_together(forward, width, columns, left):
    """Unread partners of a product go together; where sizes are written out they are reported."""
    model = net(forward, a=nn.Linear(8, 8), c=nn.Linear(width, 2))
    unread(model.c, columns)
    result = compact(model, torch.randn(ROWS))
    assert shapes(result) == left
    if forward is rotated:
        assert result.kept["a"].startswith(f"{DEAD}2; without them ")
    else:
        assert not result.kept
    assert_same(result.model, model, torch.randn(ROWS))


def test_a_split_by_numbers_is_told():
    """A split by numbers loses channels of its last part; a channel of its first stays, with the reason."""
    for column, left in ((0, 7), (4, 8)):
        model = net(split_and_joined, a=conv(3, 8, 1), c=conv(8, 2, 1))
        unread(model.c, [column])
        result = compact(model, torch.randn(IMAGE))
        assert shapes(result) == {"a.weight": (left, 3, 1, 1), "c.weight": (2, left, 1, 1)}
        assert bool(result.kept) == (left == 8)
        if result.kept:
            assert list(result.kept) == ["a"] and result.kept["a"].startswith(f"{DEAD}1; without them ")
        assert_same(result.model, model, torch.randn(IMAGE))


def test_blocks_alike_are_refused_at_once():
    """A size that is written into one block's code is known for all blocks of its class after one trial."""

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
    assert len(seen) <= 6 * 24  # the number of forward passes does not grow by a trial for each block


def test_a_channel_alone_in_a_product_is_read():
    """A channel that is selected by its number and multiplied is read, although no layer reads it."""

    def forward(self, x):
        x = self.a(x)  # [n, 8, h, w]
        return x[:, 3] @ x[:, 4] + self.c(x).mean(1)

    model = net(forward, a=conv(3, 8, 1), c=conv(8, 2, 1))
    unread(model.c, [3, 4])
    result = compact(model, torch.randn(IMAGE))
    assert shapes(result)["a.weight"][0] == 8 and not result.kept


def test_a_table_for_longer_inputs_is_cut_whole():
    """A table of which the example uses some rows loses columns in all of its rows."""
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
    """Units added to the model's input cannot go, and the report names the addition."""
    model = net(lambda self, x: self.c(x + self.a(x)), a=nn.Linear(8, 8), c=nn.Linear(8, 2))
    unread(model.c, [1, 4])
    result = compact(model, torch.randn(ROWS))
    assert result.kept == {"a": f"{DEAD}2; in Net (add) they meet what cannot be cut"}


def test_channels_go_through_padding_around_them():
    """Padding of height and width does not keep channels from going."""
    model = nn.Sequential(conv(3, 8, 1), nn.ZeroPad2d(2), conv(8, 4), nn.ConstantPad2d(1, 0.5), conv(4, 2))
    unread(model[2], [1, 4])
    result = compact(model, torch.randn(IMAGE))
    assert shapes(result)["0.weight"] == (6, 3, 1, 1) and not result.kept
    assert_same(result.model, model, torch.randn(IMAGE))


def test_inputs_are_picked_where_the_layer_is_called_alone():
    """A layer whose weight is used by F.linear keeps its inputs.

    Inputs are picked by a hook of the module, which F.linear does not run.
    """

    def forward(self, x):
        return self.called(x) + F.linear(x, self.taken.weight)

    model = net(forward, called=nn.Linear(400, 9), taken=nn.Linear(400, 9))
    unread(model.called, slice(2, None))
    unread(model.taken, slice(2, None))
    result = compact(model, torch.randn(2, 400))
    assert shapes(result) == {"called.weight": (9, 2), "taken.weight": (9, 400)}
    assert_same(result.model, model, torch.randn(2, 400))


def test_the_last_channel_is_named():
    """The report says that a last channel stays so that the layer is not empty."""
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    unread(model[2], slice(None))
    result = compact(model, torch.randn(ROWS))
    assert result.kept["0"] == f"{DEAD}1; one channel of 0 is left"
    assert shapes(result)["0.weight"] == (1, 8)
