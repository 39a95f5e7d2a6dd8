"""Which weights of a model a recipe regularises, and by which groups."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from helpers.layers import Conv1D
from helpers.recipes import COEFFICIENTS, by_name, mlp
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from cges_kernels import ProxAdamW, ProxSGD
from cges_kernels.core.groups import NAMED_SPECS, reduced_dims
from cges_kernels.training.layers import LayerWeight, regularised_weights
from cges_kernels.training.recipes import sparsity_param_groups


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


def test_the_layers_of_every_kind_of_module_in_order():
    """Exactly the weights of layers are found, in the order of registration.

    A tied weight counts once, or not at all if an embedding owns it.
    """
    assert [w.name for w in regularised_weights(Zoo())] == ZOO_LAYERS


def test_frozen_layers_on_request():
    """frozen=True adds frozen layers in their places."""
    names = [w.name for w in regularised_weights(Zoo(), frozen=True)]
    assert sorted(names) == sorted([*ZOO_LAYERS, "frozen.weight"])
    assert names.index("frozen.weight") == names.index("hf.weight") + 1


def test_every_parameter_is_in_exactly_one_group_under_its_name():
    """No parameter is lost or doubled on the way into param groups."""
    model = Zoo()
    groups = sparsity_param_groups(model, group_lasso=1e-3)
    pairs = [pair for group in groups for pair in group["params"]]
    assert len(pairs) == len({id(p) for _, p in pairs})
    assert {n: id(p) for n, p in pairs} == {n: id(p) for n, p in model.named_parameters()}
    assert {name for group in groups[:-1] for name, _ in group["params"]} == set(ZOO_LAYERS)


def test_the_last_group_is_left_alone():
    """Everything that is not regularised gets coefficients of 0, and no freezing."""
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
    """There is no empty param group at the end."""
    (group,) = sparsity_param_groups(nn.Linear(3, 2, bias=False), l1=0.1)
    assert [name for name, _ in group["params"]] == ["weight"]
    ProxSGD([group])


def test_include_by_callable_by_names_and_by_the_name_of_a_tied_weight():
    """include may be a function or names, and overrides the rule for embeddings."""
    model = Zoo()
    assert [w.name for w in regularised_weights(model, lambda name, p: p.dim() == 1 and "bn" in name)] == [
        "bn.weight",
        "bn.bias",
    ]
    chosen = regularised_weights(model, {"head.weight", "up.weight"})
    assert [(w.name, w.transposed) for w in chosen] == [("up.weight", True), ("embedding.weight", False)]


def test_include_never_takes_a_frozen_weight():
    """A weight that needs no gradient is not regularised even if it is included."""
    names = [w.name for w in regularised_weights(Zoo(), lambda name, p: name.endswith(".weight"))]
    assert "norm.weight" in names and "frozen.weight" not in names


@pytest.mark.parametrize(
    "include, error, message",
    [
        (["conv.weight", "nope"], ValueError, r"include: expected names .* got \['nope'\]"),
        ("conv.weight", TypeError, "include: expected a callable or a collection .* got 'conv.weight'"),
        ([], ValueError, "expected at least one weight .* got none"),
    ],
)
def test_include_refuses(include, error, message):
    """Unknown names, a single string and an empty choice are errors."""
    with pytest.raises(error, match=message):
        sparsity_param_groups(Zoo(), include=include)
    with pytest.raises(TypeError, match=r"include: expected a callable or a collection .* got 3"):
        sparsity_param_groups(Zoo(), include=3)


def test_a_lazy_model_says_what_to_do():
    """Lazy layers are an error that says to run one batch, after which they are found."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"got lazy \['1.weight', '1.bias'\]; run one batch first"):
        sparsity_param_groups(model)
    model(torch.ones(1, 3))
    assert len(regularised_weights(model)) == 2


def naive_groups(weight, group_by):
    """Each element's group, from which (block, out, in, tap) the layer connects by it."""
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
    """A named spec groups what the layer connects, in whatever order a layer holds its weight."""
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
        # Number the elements. Two share a group exactly where the spec keeps the same index for both.
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
    """Only grouped convolutions need a view and a tuple of dims."""
    groups = by_name(sparsity_param_groups(Zoo(), l1=0.1, group_by="channel"))
    assert (groups["conv.weight"]["group_by"], groups["conv.weight"]["view"]) == ("channel", None)
    assert (groups["grouped.weight"]["group_by"], groups["grouped.weight"]["view"]) == (
        (1, 3, 4),
        (2, 3, 4, 3, 3),
    )


def test_a_feature_of_a_depthwise_convolution_is_one_weight():
    """There "feature" has groups of one element, and "filter" groups of a kernel."""
    (weight,) = regularised_weights(nn.Conv2d(4, 4, 3, groups=4))
    assert (weight.layout("feature").group_size, weight.layout("filter").group_size) == (1, 9)


def test_a_tuple_is_used_as_it_is_or_refused_with_the_layers_name():
    """A spec that does not fit a layer is an error that names the layer."""
    groups = by_name(sparsity_param_groups(mlp(3, 4, 2), group_lasso=0.1, group_by=[1]))
    assert groups["0.weight"]["group_by"] == (1,) and groups["0.weight"]["view"] is None
    with pytest.raises(ValueError, match=r"cell.weight_ih: group_by: expected dims in .* got \(2,\)"):
        sparsity_param_groups(nn.ModuleDict({"cell": nn.GRUCell(3, 2)}), group_by=(2,))
    with pytest.raises(ValueError, match=r"group_by: expected one of .* got 'rows'"):
        sparsity_param_groups(mlp(3, 2), group_by="rows")


def test_layer_weight_in_blocks():
    """blocked() is [blocks, out, in, taps], also of a transposed weight."""
    param = nn.Parameter(torch.arange(4 * 3 * 2.0).reshape(4, 3, 2))
    assert LayerWeight("w", param).blocked().shape == (1, 4, 3, 2)
    blocked = LayerWeight("w", param, blocks=2, transposed=True).blocked()  # [in=4, out/2=3, taps=2]
    assert blocked.shape == (2, 3, 2, 2)
    assert blocked[1, 2, 0].tolist() == param[2, 2].tolist()


def test_the_optimizer_takes_the_zoo_and_kills_layer_weights_only():
    """A huge penalty zeroes exactly the weights of layers."""
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
        else:  # biases that are 0 initially must not be frozen by the optimizer's freeze_zeros
            moved = 0.1 if p.requires_grad else 0.0
            torch.testing.assert_close(p, before[name] - moved, msg=name)


def test_parameters_without_names_fit_a_zero_redundancy_optimizer(tmp_path):
    """With names=False ZeroRedundancyOptimizer takes the groups, and makes the plain step."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        for make, options in ((ProxSGD, dict(lr=0.1, momentum=0.9)), (ProxAdamW, dict(lr=0.1))):
            model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
            plain = copy.deepcopy(model)
            for m in (model, plain):
                m(torch.ones(1, 4)).sum().backward()
            groups = sparsity_param_groups(model, group_lasso=0.3, names=False)
            ZeroRedundancyOptimizer(groups, optimizer_class=make, **options).step()
            make(sparsity_param_groups(plain, group_lasso=0.3), **options).step()
            for p, q in zip(model.parameters(), plain.parameters()):
                assert torch.equal(p, q)
    finally:
        dist.destroy_process_group()
