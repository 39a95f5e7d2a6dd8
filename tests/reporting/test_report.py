"""sparsity_report: zeros, dead groups and dead units against counts by hand; its printed table."""

import json

import pytest
import torch
from helpers.layers import Conv1D
from torch import nn

from cges_kernels.reporting.report import sparsity_report


def rows(report):
    """The report's rows by the weights' names."""
    return {row["name"]: row for row in report.to_dict()["layers"]}


def alive_linear(weight):
    """A Linear without bias that holds ``weight``."""
    weight = torch.tensor(weight)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    return layer


def test_counts_of_a_matrix_by_hand():
    """Every number of a row, for a matrix small enough to count."""
    model = alive_linear([[1.0, 0, 2, 0], [0, 0, 0, 0], [3, 0, 1e-30, 4]])
    row = sparsity_report(model).to_dict()["layers"][0]
    assert row == {
        "name": "weight",
        "shape": (3, 4),
        "weights": 12,
        "nonzero": 5,  # 1e-30 is not zero
        "percent_nonzero": pytest.approx(500 / 12),
        "groups": 4,
        "dead_groups": 1,
        "outputs": 3,
        "dead_outputs": 1,
        "inputs": 4,
        "dead_inputs": 1,
        "by_spec": {
            "feature": {"dead": 1, "groups": 4},
            "filter": {"dead": 1, "groups": 3},
            "channel": {"dead": 1, "groups": 4},
            "tensor": {"dead": 0, "groups": 1},
        },
    }


@pytest.mark.parametrize("group_by, groups, dead", [("feature", 8, 5), ("filter", 3, 1), ("channel", 2, 1)])
def test_groups_of_a_convolution(group_by, groups, dead):
    """Groups follow the spec, while dead outputs and inputs do not depend on it."""
    model = nn.Conv2d(2, 3, 2)
    with torch.no_grad():
        model.weight.fill_(1)[2] = 0  # an output
        model.weight[:, 1] = 0  # an input channel: 4 features
        model.weight[:, 0, 0, 1] = 0  # one more
    row = sparsity_report(model, group_by=group_by).to_dict()["layers"][0]
    assert (row["groups"], row["dead_groups"]) == (groups, dead)
    assert (row["dead_outputs"], row["dead_inputs"]) == (1, 1)


def test_units_of_a_weight_held_the_other_way():
    """Layers that hold [in, out] have their outputs and inputs counted the right way round."""
    for model, outputs, inputs in ((Conv1D(2, 3), 2, 3), (nn.ConvTranspose1d(3, 2, 1), 2, 3)):
        with torch.no_grad():
            model.weight.fill_(1)[:, 1] = 0  # [in, out]: the second output
        row = sparsity_report(model).to_dict()["layers"][0]
        assert (row["outputs"], row["dead_outputs"]) == (outputs, 1)
        assert (row["inputs"], row["dead_inputs"], row["groups"]) == (inputs, 0, inputs)


def test_units_of_grouped_convolutions():
    """An input or output of one block counts as dead by that block's weights alone."""
    grouped, transposed = nn.Conv1d(4, 6, 1, groups=2), nn.ConvTranspose1d(4, 6, 1, groups=2)
    with torch.no_grad():
        grouped.weight.fill_(1)[3:, 1] = 0  # [out, in/2]: the second block's second input
        transposed.weight.fill_(1)[2:, 0] = 0  # [in, out/2]: the second block's first output
    first, second = rows(sparsity_report(nn.Sequential(grouped, transposed))).values()
    assert (first["inputs"], first["dead_inputs"], first["outputs"], first["dead_outputs"]) == (4, 1, 6, 0)
    assert (second["inputs"], second["dead_inputs"], second["outputs"], second["dead_outputs"]) == (
        4,
        0,
        6,
        1,
    )


def test_frozen_layers_are_reported_and_tied_ones_once():
    """Weights that need no gradient are listed; a shared weight is listed once."""
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 3)})
    model["b"].weight = model["a"].weight
    model.requires_grad_(False)
    assert list(rows(sparsity_report(model))) == ["a.weight", "c.weight"]


def test_total_is_the_sum():
    """The row "total" adds up weights, groups, units and FLOPs."""
    model = nn.Sequential(alive_linear([[1.0, 0], [0, 0]]), alive_linear([[1.0, 1]]))
    total = sparsity_report(model, torch.ones(5, 2)).to_dict()["total"]
    assert (total["weights"], total["nonzero"], total["percent_nonzero"]) == (6, 3, 50.0)
    assert (total["dead_groups"], total["dead_outputs"], total["dead_inputs"]) == (1, 1, 1)
    assert total["flops"] == 2 * 5 * 6  # a multiply and an add, for 5 rows
    assert total["flops_nonzero"] == 2 * 5 * (4 * 1 / 4 + 2)
    assert total["flops_compacted"] == 2 * 5 * (1 + 2)


class Noisy(nn.Module):
    """A model that draws random numbers, and checks that it runs in eval mode without gradients."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Dropout(0.5)

    def forward(self, x):
        assert not torch.is_grad_enabled() and not self.training
        return self.drop(self.norm(self.conv(x))) + torch.rand(())


def test_the_model_is_left_as_it_was():
    """Modes, buffers, the random state and torch's flags are the same after a report."""
    model = Noisy().train()
    model.drop.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    sparsity_report(model, torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0)))
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert torch.backends.mkldnn.enabled and torch.backends.cudnn.enabled


def test_the_model_is_left_as_it_was_when_it_fails():
    """The same after a forward that raises."""
    model = Noisy().train()
    with pytest.raises(RuntimeError):
        sparsity_report(model, torch.ones(4, 7, 5))
    assert all(module.training for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.mkldnn.enabled


TABLE = """\
layer     shape  weights  nonzero  dead groups  dead outputs  dead inputs  FLOPs  x nonzero  without dead
0.weight  2x2          4   25.00%          1/2           1/2          1/2  4,000      1,000         1,000
2.weight  1x2          2  100.00%          0/2           0/1          0/2  2,000      2,000         2,000
(other)                                                                        0          0             0
total                  6   50.00%          1/4           1/3          1/4  6,000      3,000         3,000"""


def test_table():
    """The printed table, to the character."""
    model = nn.Sequential(alive_linear([[1.0, 0], [0, 0]]), nn.ReLU(), alive_linear([[1.0, 1]]))
    assert str(sparsity_report(model, torch.ones(500, 2))) == TABLE


BY_SPEC = """\
dead groups  feature  filter  channel  tensor
0.weight         5/8     1/3      1/2     0/1
1.weight         2/2     2/2      2/2     1/1
total           7/10     3/5      3/4     1/2"""


def test_dead_groups_under_every_spec():
    """report.by_spec() counts dead groups under all four named specs."""
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Conv1d(2, 2, 1, groups=2))
    with torch.no_grad():
        model[0].weight.fill_(1)[2] = 0  # an output
        model[0].weight[:, 1] = 0  # an input channel: 4 features
        model[0].weight[:, 0, 0, 1] = 0  # one more
        model[1].weight.zero_()
    report = sparsity_report(model)
    assert str(report.by_spec()) == BY_SPEC
    assert report.total.by_spec == {"feature": (7, 10), "filter": (3, 5), "channel": (3, 4), "tensor": (1, 2)}


def test_dict_is_plain():
    """to_dict() can be written as JSON, a tuple as the spec included."""
    report = sparsity_report(nn.LSTM(3, 2), torch.ones(4, 1, 3), group_by=(1,))
    again = json.loads(json.dumps(report.to_dict()))
    assert again["group_by"] == [1] and again["layers"][0]["groups"] == 8
    assert again["other_flops"] == 0 and again["total"]["name"] == "total"


def test_refusals():
    """No weights, a lazy or meta layer, a spec that does not fit and what is no model are errors."""
    with pytest.raises(ValueError, match=r"ReLU: expected at least one weight .* got none"):
        sparsity_report(nn.ReLU())
    with pytest.raises(ValueError, match="run one batch first"):
        sparsity_report(nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"weight: group_by: expected dims .* got \(2,\)"):
        sparsity_report(nn.Linear(2, 2), group_by=(2,))
    with pytest.raises(ValueError, match=r"weight: expected a whole tensor .* got one on the meta device"):
        sparsity_report(nn.Linear(2, 2, device="meta"))
    with pytest.raises(TypeError, match=r"model: expected a module, got list"):
        sparsity_report([nn.Linear(2, 2)])


def test_arguments_by_name_alone_give_flops():
    """Without an example input the model runs on `kwargs`, if there are some."""
    linear = nn.Linear(3, 2)
    assert sparsity_report(linear, kwargs={"input": torch.ones(1, 3)}).total.flops == 12
    assert sparsity_report(linear).total.flops is None
