"""Examples and outputs within objects, and outputs that show little of how they were computed."""

import dataclasses
import types

import numpy as np
import pytest
import torch
from helpers.compacting import mlp, plain, shapes

from cges_kernels import compact

X = torch.randn(2, 5)


@dataclasses.dataclass(frozen=True)
class Batch:
    x: torch.Tensor
    more: object = None


class Plain:
    def __init__(self, x):
        self.x = x


IN_OBJECTS = [Batch, lambda x: Batch(None, Plain(x)), Plain, lambda x: types.SimpleNamespace(x=x)]


@pytest.mark.parametrize("wrap", IN_OBJECTS)
def test_tensors_in_objects_are_inputs(wrap):
    """Tensors within dataclasses and plain objects are found, varied and given to the smaller model."""

    def forward(self, batch):
        return plain(self, batch.x if batch.x is not None else batch.more.x)

    model = mlp(forward)
    with torch.no_grad():
        model.a.weight[:2] = 0
    result = compact(model, (wrap(X),))
    assert shapes(result)["a.weight"] == (6, 5) and "numbers" in result.varied
    torch.testing.assert_close(result.model(wrap(3 * X)), model(wrap(3 * X)))


@pytest.mark.parametrize("wrap", [Plain, Batch, lambda x: types.SimpleNamespace(x=[x]), lambda x: {x}])
def test_tensors_in_objects_are_outputs(wrap):
    """A dead output of the model stays, whatever object it is returned in."""
    model = mlp(lambda self, x: wrap(plain(self, x)))
    with torch.no_grad():
        model.b.weight[0] = 0
    result = compact(model, X)
    assert shapes(result) == {"a.weight": (8, 5), "b.weight": (3, 8)}
    assert result.kept == {"b": "dead or unread outputs that stay: 1; they are outputs of the model"}


@pytest.mark.parametrize(
    "give", [lambda x: x.detach().numpy(), lambda x: x.tolist(), lambda x: float(x.sum())]
)
def test_outputs_that_are_no_tensors_any_more(give):
    """If the model returns arrays, lists or floats, it stays dense and computes the same."""
    model = mlp(lambda self, x: give(plain(self, x)))
    result = compact(model, X)
    np.testing.assert_allclose(result.model(3 * X), model(3 * X), rtol=1e-5)
    assert not result.kept and result.parameters[0] == result.parameters[1]


def test_an_array_is_no_constant():
    """A NumPy array as input is not followed but reported, and other arrays give the same outputs."""
    model = mlp(lambda self, x: plain(self, torch.from_numpy(x)))
    with torch.no_grad():
        model.a.weight[:2] = 0
    result = compact(model, X.numpy())
    assert "(ndarray)" in result.kept["Net"]
    torch.testing.assert_close(result.model(3 * X.numpy()), model(3 * X.numpy()))


def test_sizes_in_outputs_are_compared():
    """An integer of the output that depends on a width keeps the width."""
    model = mlp(lambda self, x: (plain(self, x), self.a(x).shape[1]))
    with torch.no_grad():
        model.b.weight[:, :2] = 0
    result = compact(model, X)
    assert result.model(X)[1] == 8 and result.kept["a"].endswith("without them the outputs change")


def test_decisions_do_not_hide_what_they_are_made_by():
    """argmax is compared by what goes into it, or else a wrong removal would not show."""

    def forward(self, x):
        x = self.a(x)
        return self.b(x.relu() / x.shape[1]).argmax(1)

    model = mlp(forward)
    with torch.no_grad():
        model.b.weight[:, :2] = 0
    assert shapes(compact(model, X))["a.weight"] == (8, 5)


def test_masked_outputs_do_not_hide_the_others():
    """Huge entries of the output do not widen the tolerance for the others."""

    def forward(self, x):
        x = self.a(x).relu()
        out = self.b(x / x.shape[1])
        return torch.cat([out, torch.full_like(out, torch.finfo(out.dtype).min)], 1)

    model = mlp(forward)
    with torch.no_grad():
        model.b.weight[:, :2] = 0
    assert shapes(compact(model, X))["a.weight"] == (8, 5)
