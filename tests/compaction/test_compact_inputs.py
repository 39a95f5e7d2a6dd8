"""compact() takes inputs for unknown, whatever their dtype: the example's values let no channel go."""

import pytest
import torch
from helpers.compacting import net, shapes
from torch import nn
from torch.nn import functional as F

from cges_kernels import compact
from cges_kernels.compaction.probes import Probes
from cges_kernels.compaction.unknown import inputs_of_weights


def layers(**options):
    """A layer of four inputs, and one that reads all of its outputs."""
    return {"a": nn.Linear(4, 6), "b": nn.Linear(6, 3), **options}


def pixels(self, x):
    return self.b(self.a(x.float().view(len(x), -1)[:, :4] / 255).relu())


def timestep(self, x, t):
    return self.b(self.a(x).relu() * self.scale(t[:, None] / 1000).sigmoid())


def masked(self, x, mask):
    return self.b(self.a(x.masked_fill(mask, 0)).relu())


def multiplied(self, x, mask):
    return self.b(self.a(x).relu() * (self.scale(mask[:, :1].to(x.dtype))))


def functional_embedding(self, tokens):
    return self.b(self.a(F.embedding(tokens, self.table)).relu())


def one_hot(self, tokens):
    return self.b(self.a((tokens[..., None] == torch.arange(4)).float()).relu())


def indexed(self, x, i):
    return self.b(self.a(self.table[i]).relu() + x.new_zeros(()))


def chosen_by_numbers(self, x):
    return self.b(self.a(self.table[x.argmax(-1)]).relu())


def rounded(self, x):
    return self.b(self.a((x > 0).long().cumsum(-1).float()).relu())


def bits(self, codes):
    return self.b(self.a(((codes[:, None] >> torch.arange(4)) & 1).float()).relu())


def complex_numbers(self, x):
    return self.b(self.a(torch.view_as_real(x).flatten(1)).relu())


def written_into_a_view(self, tokens):
    ids = torch.zeros_like(tokens)
    ids[:, :2] = tokens[:, :2]
    return self.b(self.a(ids[:, :4].float()).relu())


def with_table(forward):
    """A model of this forward, with a table of four rows."""
    scaled = forward in (timestep, multiplied)
    model = net(forward, **layers(**({"scale": nn.Linear(1, 6)} if scaled else {})))
    model.table = nn.Parameter(torch.randn(4, 4))
    return model


INTEGERS = {
    pixels: (torch.zeros(2, 1, 2, 2, dtype=torch.uint8),),
    timestep: (torch.randn(2, 4), torch.zeros(2, dtype=torch.int64)),
    masked: (torch.randn(2, 4), torch.zeros(2, 4, dtype=torch.bool)),
    multiplied: (torch.randn(2, 4), torch.zeros(2, 4, dtype=torch.bool)),
    functional_embedding: (torch.zeros(2, 5, dtype=torch.int64),),
    one_hot: (torch.zeros(2, 5, dtype=torch.int32),),
    indexed: (torch.randn(2, 4), torch.zeros(2, dtype=torch.int64)),
    chosen_by_numbers: (torch.randn(2, 4),),
    rounded: (torch.randn(2, 4),),
    bits: (torch.zeros(2, dtype=torch.int32),),
    complex_numbers: (torch.zeros(2, 2, dtype=torch.complex64),),
    written_into_a_view: (torch.zeros(2, 5, dtype=torch.int64),),
}


def other(x):
    """An input of the same shape and dtype with other values."""
    if x.is_floating_point() or x.is_complex():
        return torch.randn_like(x)
    return ~x if x.dtype == torch.bool else torch.randint(0, 4, x.shape).to(x.dtype)


@pytest.mark.parametrize("forward", INTEGERS, ids=lambda f: f.__name__)
def test_a_dense_model_stays_as_it_is(forward):
    """Examples of zeros, in every dtype and use, remove nothing; other inputs give the same outputs."""
    model, example = with_table(forward), INTEGERS[forward]
    assert all(x.isnan().all() for x in inputs_of_weights(model.eval(), (example, {})).values())
    result = compact(model, example)
    assert result.parameters[0] == result.parameters[1] and not result.layers and not result.kept
    for _ in range(3):
        args = tuple(map(other, example))
        torch.testing.assert_close(result.model(*args), model(*args))


@pytest.mark.parametrize(
    "forward", [f for f in INTEGERS if f not in (timestep, multiplied)], ids=lambda f: f.__name__
)
def test_dead_units_still_go(forward):
    """With the same inputs, units that are really dead go."""
    model, example = with_table(forward), INTEGERS[forward]
    with torch.no_grad():
        model.a.weight[:2] = 0
    result = compact(model, example)
    assert shapes(result)["a.weight"] == (4, 4) and shapes(result)["b.weight"] == (3, 4)
    args = tuple(map(other, example))
    torch.testing.assert_close(result.model(*args), model(*args))


def test_what_depends_on_shapes_alone_is_constant():
    """ones_like and new_full of an input are constants although the input is unknown."""

    def forward(self, tokens):
        mask = torch.ones_like(tokens)[:, :4] * tokens.new_full((1,), 2)
        return self.b(self.a(mask.float()))

    found = inputs_of_weights(net(forward, **layers()).eval(), ((torch.zeros(2, 5, dtype=torch.int64),), {}))
    assert found["a.weight"].tolist() == [2.0] * 4


ASKING = {
    "any": lambda mask: mask.any(),
    "item": lambda mask: mask.sum().item() > 3,
    "list": lambda mask: mask.tolist()[0][0],
    "array": lambda mask: mask.numpy()[0, 0],
}


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
def test_a_forward_pass_that_branches_on_an_input_keeps_its_channels(ask):
    """If Python asks for an input's values, nothing is removed and the report says so.

    With this mask the first units are read, with another the last.
    """

    def forward(self, x, mask):
        x = self.a(x).relu()
        return self.b(x[:, :3] if ask(mask) else x[:, 3:])

    model = net(forward, a=nn.Linear(4, 6), b=nn.Linear(3, 3))
    mask = torch.zeros(2, 4, dtype=torch.bool)
    with torch.no_grad():
        model.a.weight[0] = 0
    result = compact(model, (torch.randn(2, 4), ~mask))
    reason = "its forward pass may go other ways for other inputs"
    assert reason in result.kept["a"] and shapes(result)["a.weight"] == (6, 4)
    for m in (mask, ~mask):
        x = torch.randn(2, 4)
        torch.testing.assert_close(result.model(x, m), model(x, m))


NUMBERS = {
    "mean": lambda x: x.mean() < 4,
    "largest": lambda x: min(1.0, float(x.abs().max())) > 0.5,
    "finite": lambda x: bool(x.isfinite().all()),
    "list": lambda x: x.tolist()[0][0] < 4,
}


@pytest.mark.parametrize("ask", NUMBERS.values(), ids=NUMBERS)
def test_so_does_one_that_branches_on_a_number(ask):
    """The same where the branch depends on a number computed from the input."""

    def forward(self, x):
        hidden = self.a(x).relu()
        return self.b(hidden[:, :3] if ask(x) else hidden[:, 3:])

    model = net(forward, a=nn.Linear(4, 6), b=nn.Linear(3, 3))
    result = compact(model, torch.randn(2, 4))
    for x in (torch.randn(2, 4), torch.randn(2, 4) + 9, torch.zeros(2, 4), torch.full((2, 4), torch.nan)):
        torch.testing.assert_close(result.model(x), model(x), equal_nan=True)


CHOSEN = {
    "gather": lambda x, i: x.gather(1, i),
    "columns": lambda x, i: x[:, i[0]],
    "index_select": lambda x, i: x.index_select(1, i[0]),
    "take_along_dim": lambda x, i: x.take_along_dim(i, 1),
    "by arithmetic": lambda x, i: x.gather(1, (i + 1) % 6),
}


@pytest.mark.parametrize("choose", CHOSEN.values(), ids=CHOSEN)
def test_channels_that_an_input_chooses_stay(choose):
    """Any channel may be chosen by an index that the caller gives."""
    model = net(lambda self, x, i: choose(self.a(x), i), a=nn.Linear(4, 6))
    result = compact(model, (torch.randn(2, 4), torch.tensor([[0, 1], [0, 1]])))
    assert shapes(result)["a.weight"] == (6, 4)
    x, i = torch.randn(2, 4), torch.tensor([[5, 2], [3, 4]])
    torch.testing.assert_close(result.model(x, i), model(x, i))


def test_one_hot_tokens_let_channels_go():
    """Dead units behind one-hot tokens go."""
    model = net(lambda self, i: self.b(self.a(F.one_hot(i, 4).float()).relu()), **layers())
    with torch.no_grad():
        model.a.weight[:2] = 0
    result = compact(model, torch.zeros(2, 5, dtype=torch.int64))
    assert shapes(result)["a.weight"] == (4, 4) and not result.kept
    i = torch.randint(4, (3, 5))
    torch.testing.assert_close(result.model(i), model(i))


def test_what_was_varied_is_told():
    """The report lists which properties of the example were varied in trials."""
    model = with_table(timestep)
    result = compact(model, INTEGERS[timestep])
    assert result.varied == ("numbers", "integers of tensor 1", "batch")
    assert result.to_dict()["varied"] == list(result.varied)
    assert "tried with other numbers, integers of tensor 1, batch" in str(result)


def test_length_is_varied_where_the_model_takes_it():
    """Trials with another length are made if the model accepts one."""
    result = compact(with_table(functional_embedding), INTEGERS[functional_embedding])
    assert result.varied == ("integers of tensor 0", "batch", "length")


@pytest.mark.parametrize(
    "only",
    [torch.tensor([[True, False]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([[3, 3]])],
    ids=str,
)
def test_a_model_that_takes_the_example_alone_is_refused(only):
    """If the model accepts no other values, they cannot be tried, which is an error."""

    def forward(self, x, given):
        if not torch.equal(given, only):
            raise ValueError("this one, please")
        return self.b(self.a(x))

    with pytest.raises(ValueError, match=r"other values of tensor 1 \(torch.*\[1, 2\]\).*this one, please"):
        compact(net(forward, **layers()), (torch.randn(1, 4), only))


def test_token_ids_stay_within_the_smallest_embedding():
    """Varied integers are valid indices for every embedding of the model."""

    def forward(self, tokens, positions):
        return self.b(self.a(self.tokens(tokens) + self.positions(positions)).relu())

    model = net(forward, **layers(tokens=nn.Embedding(9, 4), positions=nn.Embedding(5, 4)))
    given = tuple(torch.zeros(2, 3, dtype=torch.int64) for _ in range(2))
    seen = [[int(x.max()) for x in args] for args, _ in Probes(model.eval(), (given, {})).given]
    assert 1 <= max(map(max, seen)) <= 4
