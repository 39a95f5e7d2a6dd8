"""Which weights a model's recipe regularises, by which groups, how strongly; the schedule."""

import copy
import itertools
import math
import re
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.utils import parametrizations, prune

from cges_kernels import ProxSGD, prune_to_density
from cges_kernels.core.groups import NAMED_SPECS, reduced_dims
from cges_kernels.training.recipes import (
    LayerWeight,
    cges_param_groups,
    exclusivity_schedule,
    regularised_weights,
    sparsity_param_groups,
)

COEFFICIENTS = ("group_lasso", "exclusive_lasso", "l1")


class Conv1D(nn.Module):
    """Hugging Face's layer of that name: a Linear with weight [in, out]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))


class Zoo(nn.Module):
    """One of every kind of layer, and of everything that must be left alone."""

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 8, 4))
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 6, 3, groups=2)
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6)
        self.up = nn.ConvTranspose2d(6, 4, 2)
        self.up_grouped = nn.ConvTranspose1d(6, 4, 2, groups=2)
        self.lstm = nn.LSTM(4, 5, bidirectional=True, proj_size=2)
        self.cell = nn.GRUCell(4, 3)
        self.attention = nn.MultiheadAttention(4, 2)
        self.cross = nn.MultiheadAttention(4, 2, kdim=3, vdim=2)
        self.hf = Conv1D(7, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.twin_a = nn.Linear(4, 4)
        self.twin_b = nn.Linear(4, 4)
        self.twin_b.weight = self.twin_a.weight
        self.norm = nn.LayerNorm(4)


ZOO_LAYERS = [
    *("conv.weight", "grouped.weight", "depthwise.weight", "up.weight", "up_grouped.weight"),
    *("lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.weight_hr_l0"),
    *("lstm.weight_ih_l0_reverse", "lstm.weight_hh_l0_reverse", "lstm.weight_hr_l0_reverse"),
    *("cell.weight_ih", "cell.weight_hh"),
    *("attention.in_proj_weight", "attention.out_proj.weight"),
    *("cross.q_proj_weight", "cross.k_proj_weight", "cross.v_proj_weight", "cross.out_proj.weight"),
    *("hf.weight", "twin_a.weight"),
]


def mlp(*widths):
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


def by_name(groups):
    """{parameter name: its group}."""
    return {name: group for group in groups for name, _ in group["params"]}


# The schedule


def test_schedule_by_hand():
    assert exclusivity_schedule(3, 0.2) == pytest.approx([0.2, 0.5, 0.8], abs=1e-15)
    assert exclusivity_schedule(5, 0.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert exclusivity_schedule(2, 1.0) == [1.0, 0.0]
    assert exclusivity_schedule(1, 0.3) == [0.3]


def test_schedule_stays_in_the_unit_interval():
    for layers, k in itertools.product((2, 3, 7, 50), range(101)):
        mu = exclusivity_schedule(layers, k / 100)
        assert min(mu) >= 0 and max(mu) <= 1
        assert mu[-1] == pytest.approx(1 - k / 100, abs=1e-15)


@pytest.mark.parametrize("layers, m", [(0, 0.1), (-1, 0.1), (2.0, 0.1), (True, 0.1), (3, -0.1), (3, 1.1)])
def test_schedule_refuses(layers, m):
    with pytest.raises(ValueError, match=r"expected .* got"):
        exclusivity_schedule(layers, m)


# Which parameters


def test_the_layers_of_every_kind_of_module_in_order():
    assert [w.name for w in regularised_weights(Zoo())] == ZOO_LAYERS


def test_frozen_layers_on_request():
    names = [w.name for w in regularised_weights(Zoo(), frozen=True)]
    assert sorted(names) == sorted([*ZOO_LAYERS, "frozen.weight"])
    assert names.index("frozen.weight") == names.index("hf.weight") + 1


def test_every_parameter_is_in_exactly_one_group_under_its_name():
    model = Zoo()
    groups = sparsity_param_groups(model, group_lasso=1e-3)
    pairs = [pair for group in groups for pair in group["params"]]
    assert len(pairs) == len({id(p) for _, p in pairs})
    assert {n: id(p) for n, p in pairs} == {n: id(p) for n, p in model.named_parameters()}
    assert {name for group in groups[:-1] for name, _ in group["params"]} == set(ZOO_LAYERS)


def test_the_last_group_is_left_alone():
    last = sparsity_param_groups(Zoo(), group_lasso=1.0, exclusive_lasso=2.0, l1=3.0)[-1]
    assert {key: last[key] for key in (*COEFFICIENTS, "freeze_zeros", "view")} == {
        **dict.fromkeys(COEFFICIENTS, 0.0),
        "freeze_zeros": None,
        "view": None,
    }
    assert {"conv.bias", "bn.weight", "pos_embed", "embedding.weight", "frozen.weight"} <= by_name(
        [last]
    ).keys()


def test_no_last_group_where_everything_is_regularised():
    (group,) = sparsity_param_groups(nn.Linear(3, 2, bias=False), l1=0.1)
    assert [name for name, _ in group["params"]] == ["weight"]
    ProxSGD([group])


def test_include_by_callable_by_names_and_by_the_name_of_a_tied_weight():
    model = Zoo()
    assert [w.name for w in regularised_weights(model, lambda name, p: p.dim() == 1 and "bn" in name)] == [
        "bn.weight",
        "bn.bias",
    ]
    chosen = regularised_weights(model, {"head.weight", "up.weight"})
    assert [(w.name, w.transposed) for w in chosen] == [("up.weight", True), ("embedding.weight", False)]


def test_include_never_takes_a_frozen_weight():
    names = [w.name for w in regularised_weights(Zoo(), lambda name, p: name.endswith(".weight"))]
    assert "norm.weight" in names and "frozen.weight" not in names


@pytest.mark.parametrize(
    "include, error, message",
    [
        (["conv.weight", "nope"], ValueError, r"include: expected names .* got \['nope'\]"),
        ("conv.weight", TypeError, "include: expected a callable or a collection .* got the string"),
        ([], ValueError, "expected at least one weight .* got none"),
    ],
)
def test_include_refuses(include, error, message):
    with pytest.raises(error, match=message):
        sparsity_param_groups(Zoo(), include=include)


def test_a_lazy_model_says_what_to_do():
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"got lazy \['1.weight', '1.bias'\]; run one batch first"):
        sparsity_param_groups(model)
    model(torch.ones(1, 3))
    assert len(regularised_weights(model)) == 2


def test_a_weight_that_is_computed_from_others_is_not_a_layer():
    lstm = parametrizations.weight_norm(nn.LSTM(3, 2), "weight_hh_l0")
    assert [w.name for w in regularised_weights(lstm)] == ["weight_ih_l0"]
    model = nn.Sequential(prune.identity(nn.Linear(3, 4), "weight"), nn.Linear(4, 2))
    assert [w.name for w in regularised_weights(model)] == ["1.weight"]


# Which groups


def naive_groups(weight, group_by):
    """Group labels of each element, from what the layer computes: which (block, out, in, tap) it connects."""
    shape = tuple(weight.param.shape)
    labels = {}
    for index in itertools.product(*map(range, shape)):
        first, second, *tap = index
        per_block = shape[0] // weight.blocks
        block = first // per_block
        if weight.transposed:
            out, into = block * shape[1] + second, first
        else:
            out, into = first, block * shape[1] + second
        label = {"feature": (into, *tap), "filter": (out,), "channel": (into,), "tensor": ()}[group_by]
        labels[index] = label
    return labels


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("group_by", NAMED_SPECS)
def test_specs_mean_the_same_thing_however_a_weight_is_held(group_by, channels_last):
    layers = {
        "conv": nn.Conv2d(3, 4, (2, 3)),
        "grouped": nn.Conv2d(6, 4, 2, groups=2),
        "depthwise": nn.Conv2d(3, 6, 2, groups=3),
        "transposed": nn.ConvTranspose2d(3, 4, 2),
        "grouped_transposed": nn.ConvTranspose2d(4, 6, 2, groups=2),
        "linear": nn.Linear(3, 2),
        "hf": Conv1D(2, 3),
    }
    model = nn.ModuleDict(layers)
    model = model.to(memory_format=torch.channels_last) if channels_last else model
    for weight in regularised_weights(model):
        labels = naive_groups(weight, group_by)
        # number the elements; two share a group exactly where the spec keeps the same index for both
        spec, view = weight.group_spec(group_by)
        number = torch.arange(weight.param.numel()).reshape(weight.param.shape)
        v = number.view(view) if view else number
        kept = [d for d in range(v.dim()) if d not in reduced_dims(v.dim(), spec)]
        found = {}
        for index in itertools.product(*map(range, v.shape)):
            found[int(v[index])] = tuple(index[d] for d in kept)
        pairs = {(labels[index], found[int(number[index])]) for index in labels}
        assert len(pairs) == len(set(labels.values())) == len(set(found.values())), weight.name
        layout = weight.layout(group_by)
        assert layout.num_groups == len(set(labels.values())), weight.name
        assert layout.num_groups * layout.group_size == weight.param.numel(), weight.name


def test_plain_layers_keep_the_name_of_their_spec():
    groups = by_name(sparsity_param_groups(Zoo(), l1=0.1, group_by="channel"))
    assert (groups["conv.weight"]["group_by"], groups["conv.weight"]["view"]) == ("channel", None)
    assert (groups["grouped.weight"]["group_by"], groups["grouped.weight"]["view"]) == (
        (1, 3, 4),
        (2, 3, 4, 3, 3),
    )


def test_a_feature_of_a_depthwise_convolution_is_one_weight():
    (weight,) = regularised_weights(nn.Conv2d(4, 4, 3, groups=4))
    assert (weight.layout("feature").group_size, weight.layout("filter").group_size) == (1, 9)


def test_a_tuple_is_used_as_it_is_or_refused_with_the_layers_name():
    groups = by_name(sparsity_param_groups(mlp(3, 4, 2), group_lasso=0.1, group_by=[1]))
    assert groups["0.weight"]["group_by"] == (1,) and groups["0.weight"]["view"] is None
    with pytest.raises(ValueError, match=r"cell.weight_ih: group_by: expected dims in .* got \(2,\)"):
        sparsity_param_groups(nn.ModuleDict({"cell": nn.GRUCell(3, 2)}), group_by=(2,))
    with pytest.raises(ValueError, match=r"group_by: expected one of .* got 'rows'"):
        sparsity_param_groups(mlp(3, 2), group_by="rows")


def test_layer_weight_in_blocks():
    param = nn.Parameter(torch.arange(4 * 3 * 2.0).reshape(4, 3, 2))
    assert LayerWeight("w", param).blocked().shape == (1, 4, 3, 2)
    blocked = LayerWeight("w", param, blocks=2, transposed=True).blocked()  # [in=4, out/2=3, taps=2]
    assert blocked.shape == (2, 3, 2, 2)
    assert blocked[1, 2, 0].tolist() == param[2, 2].tolist()


# How strongly


def test_one_value_per_layer_and_layers_with_equal_keys_share_a_group():
    groups = sparsity_param_groups(mlp(3, 4, 5, 2), group_lasso=[0.1, 0.2, 0.1], l1=0.5)
    assert [[name for name, _ in group["params"]] for group in groups] == [
        ["0.weight", "2.weight"],
        ["1.weight"],
        ["0.bias", "1.bias", "2.bias"],
    ]
    assert [(group["group_lasso"], group["l1"]) for group in groups] == [(0.1, 0.5), (0.2, 0.5), (0.0, 0.0)]


@pytest.mark.parametrize("key", [*COEFFICIENTS, "weight_decay"])
@pytest.mark.parametrize(
    "value, message",
    [([0.1], "a number or 2 values, one per layer, got 1"), (-1.0, ">= 0, got"), ([0, math.inf], "finite")],
)
def test_wrong_values_are_refused(key, value, message):
    with pytest.raises(ValueError, match=f"{key}: expected .*{message}"):
        sparsity_param_groups(mlp(3, 4, 2), **{key: value})


def test_what_is_zero_everywhere_is_left_to_the_optimizer():
    model = mlp(3, 4, 2)
    optimizer = ProxSGD(sparsity_param_groups(model, l1=0.1), weight_decay=5e-4, group_lasso=0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 5e-4]
    assert [group["group_lasso"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert [group["l1"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_weight_decay_given_here_is_for_the_layer_weights_only():
    groups = sparsity_param_groups(mlp(3, 4, 2), weight_decay=[0.0, 5e-4])
    assert [group["weight_decay"] for group in groups] == [0.0, 5e-4, 0.0]


def test_scale_by_size():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Conv2d(4, 9, 1))
    for group_by, sizes in (("feature", (4, 9)), ("filter", (12, 4))):
        groups = sparsity_param_groups(
            model, group_lasso=0.1, exclusive_lasso=0.2, l1=0.3, group_by=group_by, scale="size"
        )
        for group, n in zip(groups, sizes):
            assert group["group_lasso"] == pytest.approx(0.1 * math.sqrt(n))
            assert group["exclusive_lasso"] == pytest.approx(0.2 / n)
            assert group["l1"] == 0.3


def test_scale_by_hand():
    groups = by_name(
        sparsity_param_groups(
            mlp(3, 4, 2), group_lasso=0.1, exclusive_lasso=[0.2, 0.4], scale={"1.weight": (10, 0.5)}
        )
    )
    assert [groups["0.weight"][key] for key in COEFFICIENTS[:2]] == [0.1, 0.2]
    assert [groups["1.weight"][key] for key in COEFFICIENTS[:2]] == [1.0, 0.2]


@pytest.mark.parametrize(
    "scale, message",
    [
        ({"0.bias": (1, 1)}, r"expected names among \['0.weight', '1.weight'\], got \['0.bias'\]"),
        ({"0.weight": (1,)}, "expected two finite factors"),
        ({"0.weight": (1, -1)}, "expected two finite factors"),
        ("sqrt", "expected None, 'size' or a dict .* got 'sqrt'"),
    ],
)
def test_scale_refuses(scale, message):
    with pytest.raises(ValueError, match=message):
        sparsity_param_groups(mlp(3, 4, 2), group_lasso=0.1, scale=scale)


def test_cges_shares_lambda_by_the_schedule():
    groups = cges_param_groups(mlp(3, 4, 5, 2), lam=0.1, m=0.2)
    assert [group["group_lasso"] for group in groups] == pytest.approx([0.08, 0.05, 0.02, 0])
    assert [group["exclusive_lasso"] for group in groups] == pytest.approx([0.02, 0.05, 0.08, 0])


def test_cges_counts_the_included_layers_only():
    groups = cges_param_groups(mlp(3, 4, 5, 2), 0.1, 0.2, include=["0.weight", "2.weight"], scale="size")
    assert [group["group_lasso"] for group in groups[:-1]] == pytest.approx(
        [0.08 * math.sqrt(4), 0.02 * math.sqrt(2)]
    )


# In the optimizer


def test_the_optimizer_takes_the_zoo_and_kills_layer_weights_only():
    model = Zoo()
    groups = sparsity_param_groups(model, group_lasso=1e6)
    names = [[name for name, _ in group["params"]] for group in groups]
    optimizer = ProxSGD(groups, lr=0.1, freeze_zeros="element")
    assert [group["param_names"] for group in optimizer.param_groups] == names
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    for name, p in model.named_parameters():
        if name in ZOO_LAYERS:
            assert (p == 0).all(), name
        else:  # zero-initialised biases too are not frozen by an optimizer-wide freeze_zeros
            moved = 0.1 if p.requires_grad else 0.0
            torch.testing.assert_close(p, before[name] - moved, msg=name)


# Weights that are no parameters, parameters without names, and those that come later

COMPUTED = {
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(4, 4), lambda: nn.Conv2d(4, 4, 3)], ids=["linear", "conv"]
)
def test_weights_that_are_no_parameters_are_named(compute, make):
    model = nn.Sequential(compute(make()), nn.Sequential(nn.Linear(4, 4)))
    for helper in (sparsity_param_groups, cges_param_groups):
        options = dict(group_lasso=0.1) if helper is sparsity_param_groups else dict(lam=0.1)
        with pytest.warns(
            UserWarning, match=r"Sequential: no penalty for \['0.weight'\], which are no param"
        ) as seen:
            groups = helper(model, **options)
        assert len(seen) == 1
        assert [name for name, _ in groups[0]["params"]] == ["1.0.weight"]
    with pytest.warns(UserWarning, match=r"nothing is pruned for \['0.weight'\]"):
        prune_to_density(model, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsity_param_groups(model, group_lasso=0.1, include=["1.0.weight"])
        sparsity_param_groups(model[1], group_lasso=0.1)
    with pytest.raises(ValueError, match=r"got none but \['0.weight'\], which are computed from other"):
        sparsity_param_groups(model[:1], group_lasso=0.1)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_some_of_a_layers_weights_may_be_no_parameters():
    model = nn.Sequential(nn.utils.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"))
    with pytest.warns(UserWarning, match=r"no penalty for \['0.weight_hh_l0'\], which"):
        groups = sparsity_param_groups(model, l1=0.1)
    assert [name for name, _ in groups[0]["params"]] == ["0.weight_ih_l0"]


def test_parameters_without_names_fit_a_zero_redundancy_optimizer(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    plain = copy.deepcopy(model)
    for m in (model, plain):
        m(torch.ones(1, 4)).sum().backward()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        options = dict(optimizer_class=ProxSGD, lr=0.1, momentum=0.9)
        groups = sparsity_param_groups(model, group_lasso=0.3, names=False)
        ZeroRedundancyOptimizer(groups, **options).step()
    finally:
        dist.destroy_process_group()
    ProxSGD(sparsity_param_groups(plain, group_lasso=0.3), lr=0.1, momentum=0.9).step()
    for p, q in zip(model.parameters(), plain.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("key", ["group_lasso", "weight_decay"])
@pytest.mark.parametrize("value", ["1e-3", None, b"ab", {0.1}, ["0.1"]])
def test_a_coefficient_that_is_no_number_is_refused(key, value):
    text = re.escape(f"{key}: expected a number or one value per layer, got {value!r}")
    with pytest.raises(TypeError, match=text):
        sparsity_param_groups(nn.Linear(3, 2), **{key: value})
    for wrong in (dict(names="False"), dict(lam="1e-3")):
        helper = cges_param_groups if "lam" in wrong else sparsity_param_groups
        with pytest.raises(TypeError, match=f"{next(iter(wrong))}: expected a (bool|number), got"):
            helper(nn.Linear(3, 2), **wrong)


def test_coefficients_may_be_tensors_and_arrays():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    for value in (torch.tensor([0.25, 0.5]), np.array([0.25, 0.5]), (0.25, torch.tensor(0.5))):
        groups = sparsity_param_groups(model, l1=value)
        assert [group["l1"] for group in groups] == [0.25, 0.5, 0.0]
    assert sparsity_param_groups(model, l1=torch.tensor(0.25))[0]["l1"] == 0.25


def test_a_parametrized_conv1d_is_named():
    model = nn.Sequential(parametrizations.weight_norm(Conv1D(4, 3)), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match=r"no penalty for \['0.weight'\]"):
        sparsity_param_groups(model, l1=0.1)
