"""Group specs, and the canonical layout (K1, R1, K2, R2) that each becomes."""

import itertools

import pytest
import torch
from helpers.right import SPECS
from hypothesis import given, settings
from hypothesis import strategies as st

from cges_kernels.core.groups import (
    Layout,
    canonical_layout,
    check_spec,
    has_groups,
    is_dense,
    reduced_dims,
    viewed,
)


def in_memory_order(shape, order):
    """A dense tensor of ``shape`` whose dims lie in memory in ``order``, outermost first."""
    return torch.empty([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])


CONTIGUOUS = [
    # two dims, [out, in]
    ((64, 48), "feature", (1, 64, 48, 1)),
    ((64, 48), "filter", (64, 48, 1, 1)),
    ((64, 48), "channel", (1, 64, 48, 1)),
    ((64, 48), "tensor", (1, 64 * 48, 1, 1)),
    # a convolution, [out, in, kh, kw]
    ((16, 8, 3, 5), "feature", (1, 16, 8 * 15, 1)),
    ((16, 8, 3, 5), "filter", (16, 8 * 15, 1, 1)),
    ((16, 8, 3, 5), "channel", (1, 16, 8, 15)),
    ((16, 8, 3, 5), "tensor", (1, 16 * 8 * 15, 1, 1)),
    # one and three kernel dims
    ((16, 8, 3), "channel", (1, 16, 8, 3)),
    ((16, 8, 2, 3, 4), "channel", (1, 16, 8, 24)),
    # tuples of dims, in any order and counted from either end
    ((16, 8, 3, 5), (0,), (1, 16, 8 * 15, 1)),
    ((16, 8, 3, 5), (1,), (16, 8, 15, 1)),
    ((16, 8, 3, 5), (2, 3), (16 * 8, 15, 1, 1)),
    ((16, 8, 3, 5), (3, 2), (16 * 8, 15, 1, 1)),
    ((16, 8, 3, 5), (-1, -2), (16 * 8, 15, 1, 1)),
    ((16, 8, 3, 5), (1, 3), (16, 8, 3, 5)),
    ((16, 8, 3, 5), (), (16 * 8 * 15, 1, 1, 1)),
    # dims of size 1 join either neighbour
    ((37, 1), "feature", (1, 37, 1, 1)),
    ((1, 29), "feature", (29, 1, 1, 1)),
    ((1, 29), "filter", (1, 29, 1, 1)),
    ((37, 1), "filter", (37, 1, 1, 1)),
    ((16, 8, 1, 1), "channel", (1, 16, 8, 1)),
    ((16, 1, 3, 3), "feature", (1, 16, 9, 1)),
    ((16, 1, 3, 3), "channel", (1, 16 * 9, 1, 1)),
    ((4, 1, 5, 1, 6), (1, 3), (4 * 5 * 6, 1, 1, 1)),
    ((1, 1, 1), "channel", (1, 1, 1, 1)),
    # one dim and none
    ((7,), (0,), (1, 7, 1, 1)),
    ((7,), (), (7, 1, 1, 1)),
    ((), (), (1, 1, 1, 1)),
]


def test_contiguous_layouts():
    """A contiguous tensor's layout is the one worked out by hand: neighbours of one kind are merged."""
    for shape, group_by, expected in CONTIGUOUS:
        assert canonical_layout(torch.empty(shape), group_by) == Layout(*expected), (shape, group_by)


def test_named_specs_without_groups():
    """A named spec makes no groups of one dim or none, nor of empty tensors: each element is kept."""
    for group_by in SPECS:
        for shape in ((7,), (), (0,), (0, 5), (5, 0), (3, 0, 2, 2)):
            x = torch.empty(shape)
            assert canonical_layout(x, group_by) == Layout(x.numel(), 1, 1, 1), (shape, group_by)


def test_channels_last_layouts():
    """Layouts follow the order in memory: channels_last needs no copy and gives other factors."""
    flat = torch.empty(16, 8, 3, 5).to(memory_format=torch.channels_last)
    deep = torch.empty(16, 8, 3, 1, 5).to(memory_format=torch.channels_last_3d)
    for group_by, expected in (
        ("feature", (1, 16, 15 * 8, 1)),
        ("filter", (16, 15 * 8, 1, 1)),
        ("channel", (1, 16 * 15, 8, 1)),
        ("tensor", (1, 16 * 15 * 8, 1, 1)),
        ((1,), (16 * 15, 8, 1, 1)),
        ((2, 3), (16, 15, 8, 1)),
    ):
        assert canonical_layout(flat, group_by) == Layout(*expected), group_by
        with_depth = tuple(d + (d > 2) for d in reduced_dims(4, group_by))
        assert canonical_layout(deep, with_depth) == Layout(*expected), group_by


def test_transposed_layouts():
    """A transposed matrix has the layout of its memory, with the dims' roles exchanged."""
    for group_by, expected in (
        ("feature", (48, 64, 1, 1)),
        ("filter", (1, 48, 64, 1)),
        ("channel", (48, 64, 1, 1)),
        ("tensor", (1, 48 * 64, 1, 1)),
    ):
        assert canonical_layout(torch.empty(48, 64).t(), group_by) == Layout(*expected), group_by


def test_view_layouts():
    """view= gives the layout of the viewed tensor, whether it comes as a tuple or a list."""
    for shape, view, group_by, expected in (
        # a grouped convolution: "feature" within each group of channels
        ((64, 8, 3, 3), (4, 16, 8, 3, 3), (1,), (4, 16, 8 * 9, 1)),
        ((32, 24), (4, 8, 24), (1, 2), (4, 8 * 24, 1, 1)),  # attention heads
        ((80, 30), (4, 20, 30), (0, 2), (1, 4, 20, 30)),  # LSTM units across their four gates
        ((64, 48), (64, -1), "filter", (64, 48, 1, 1)),
        ((60,), (12, 5), "filter", (12, 5, 1, 1)),  # a bias viewed as two dims has groups
        ((12, 5), (60,), "filter", (60, 1, 1, 1)),  # a matrix viewed as one dim has none
    ):
        w = torch.empty(shape)
        assert canonical_layout(w, group_by, view) == Layout(*expected), view
        assert canonical_layout(w, group_by, list(view)) == canonical_layout(w.view(view), group_by), view


def test_a_storage_offset_does_not_matter():
    """A tensor that begins later in its storage has the same layout."""
    w = torch.empty(100)[7 : 7 + 60].view(12, 5)
    assert canonical_layout(w, "filter") == Layout(12, 5, 1, 1)


def test_a_layout_knows_its_groups():
    """num_groups is K1*K2 and group_size is R1*R2."""
    layout = canonical_layout(torch.empty(16, 8, 3, 5), (1, 3))
    assert (layout.num_groups, layout.group_size) == (16 * 3, 8 * 5)


@st.composite
def dense_tensors(draw):
    """(a tensor of random shape and memory order, a spec)."""
    shape = draw(st.lists(st.integers(1, 4), max_size=6))
    order = draw(st.permutations(range(len(shape))))
    tuples = st.lists(st.sampled_from(range(len(shape))), unique=True).map(tuple) if shape else st.just(())
    return in_memory_order(shape, order), draw(tuples | st.sampled_from(SPECS))


def logical_groups(w, group_by):
    """Each element's group by the spec's definition, numbered by its kept coordinates, in memory order."""
    kept = [n if d not in reduced_dims(w.dim(), group_by) else 1 for d, n in enumerate(w.shape)]
    if not has_groups(w.dim(), group_by):
        kept = list(w.shape)
    numbers = torch.arange(torch.Size(kept).numel()).view(kept).expand(w.shape)
    by_offset = torch.full((w.numel(),), -1)
    by_offset.as_strided(w.shape, w.stride()).copy_(numbers)
    return by_offset.tolist()


def groups_of_the_layout(layout):
    """Each element's group by the layout's formula for offset and group, in memory order."""
    K1, R1, K2, R2 = layout
    groups = [-1] * (K1 * R1 * K2 * R2)
    for k1, r1, k2, r2 in itertools.product(range(K1), range(R1), range(K2), range(R2)):
        groups[((k1 * R1 + r1) * K2 + k2) * R2 + r2] = k1 * K2 + k2
    return groups


def runs(w, group_by):
    """The kinds of dims in memory order: "K" for kept, "R" for reduced, one letter for each run."""
    reduced = reduced_dims(w.dim(), group_by) if has_groups(w.dim(), group_by) else ()
    dims = sorted((d for d in range(w.dim()) if w.shape[d] > 1), key=w.stride, reverse=True)
    return "".join(kind for kind, _ in itertools.groupby("R" if d in reduced else "K" for d in dims))


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(dense_tensors())
def test_a_layout_groups_exactly_the_elements_that_the_spec_says(drawn):
    """Two elements share a group by the layout just when they share one by the spec.

    Shapes, memory orders and specs are random.
    """
    w, group_by = drawn
    if runs(w, group_by) not in ("", "K", "R", "KR", "RK", "KRK", "RKR", "KRKR"):
        with pytest.raises(ValueError, match="expected at most kept, reduced, kept, reduced"):
            canonical_layout(w, group_by)
        return
    layout = canonical_layout(w, group_by)
    pairs = set(zip(logical_groups(w, group_by), groups_of_the_layout(layout), strict=True))
    logical, of_layout = zip(*pairs)
    # groups correspond one to one
    assert len(set(logical)) == len(set(of_layout)) == len(pairs) == layout.num_groups
    assert layout.num_groups * layout.group_size == w.numel()


def test_reduced_dims():
    """Each named spec reduces the documented dims; negative ones count from the end."""
    assert [reduced_dims(4, spec) for spec in SPECS] == [(0,), (1, 2, 3), (0, 2, 3), (0, 1, 2, 3)]
    assert [reduced_dims(2, spec) for spec in SPECS] == [(0,), (1,), (0,), (0, 1)]
    assert reduced_dims(4, (-1, 1)) == (1, 3)
    assert reduced_dims(0, ()) == ()


def test_named_specs_make_groups_of_two_dims_or_more():
    """A named spec never makes one group of a whole bias; a tuple of dims may."""
    assert [has_groups(ndim, "feature") for ndim in range(4)] == [False, False, True, True]
    assert has_groups(1, (0,)) and has_groups(0, ())


DENSE = {
    "contiguous": torch.empty(4, 6),
    "transposed": torch.empty(4, 6).t(),
    "channels_last": torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "empty": torch.empty(4, 6)[:, :0],
    "size-1 dims of any stride": torch.empty(6).as_strided((1, 6, 1), (50, 1, 0)),
    "0-d": torch.empty(()),
}
NOT_DENSE = {
    "columns left out": torch.empty(4, 6)[:, ::2],
    "rows cut": torch.empty(4, 6)[:, :5],
    "expanded": torch.empty(4, 1).expand(4, 6),
    "overlapping": torch.empty(20).as_strided((4, 6), (2, 1)),
    "one dim, strided": torch.empty(10)[::2],
}


@pytest.mark.parametrize("w", DENSE.values(), ids=DENSE)
def test_dense_tensors_are_taken(w):
    """Every dense, non-overlapping tensor has a layout that covers all its elements."""
    assert is_dense(w)
    assert canonical_layout(w).num_groups * canonical_layout(w).group_size == w.numel()


@pytest.mark.parametrize("w", NOT_DENSE.values(), ids=NOT_DENSE)
def test_tensors_with_gaps_or_overlaps_are_refused(w):
    """A tensor that the layout's index arithmetic cannot describe is an error that names its strides."""
    assert not is_dense(w)
    with pytest.raises(ValueError, match=r"expected a dense, non-overlapping tensor.*got shape .* strides"):
        canonical_layout(w)


@pytest.mark.parametrize(
    ("w", "group_by"),
    [
        (torch.empty(2, 3, 2, 3, 2), (0, 2, 4)),  # R K R K R
        (torch.empty(2, 3, 2, 3, 2), (1, 3)),  # K R K R K
        (torch.empty(2, 3, 2, 3), (0, 2)),  # R K R K
        (in_memory_order((2, 3, 4, 5), (0, 2, 1, 3)), (0, 1)),  # R K R K; a contiguous one would be R K
    ],
    ids=["RKRKR", "KRKRK", "RKRK", "permuted"],
)
def test_too_many_alternations_are_refused(w, group_by):
    """A spec that needs more runs than K R K R is an error that names the shape and the spec."""
    message = r"expected at most kept, reduced, kept, reduced in memory order; permute"
    with pytest.raises(ValueError, match=message) as error:
        canonical_layout(w, group_by)
    assert str(tuple(w.shape)) in str(error.value) and str(group_by) in str(error.value)


@pytest.mark.parametrize(
    ("group_by", "view", "error", "message"),
    [
        (
            "rows",
            None,
            ValueError,
            r"group_by: expected one of \('feature', .*\) or a tuple of dims, got 'rows'",
        ),
        ("", None, ValueError, "group_by: expected one of .* got ''"),
        (0, None, TypeError, "group_by: expected one of .* or a tuple of ints, got 0"),
        (None, None, TypeError, "group_by: .* got None"),
        ((0, "1"), None, TypeError, "group_by: .* got .0, '1'."),
        ((0.0,), None, TypeError, "group_by: .* got .0.0,."),
        ((True,), None, TypeError, "group_by: .* got .True,."),
        ("feature", 6, TypeError, "view: expected None or a tuple of ints, got 6"),
        ("feature", "6", TypeError, "view: expected None or a tuple of ints, got '6'"),
        ("feature", (2.0, 3), TypeError, "view: expected None or a tuple of ints, got .2.0, 3."),
    ],
    ids=str,
)
def test_malformed_specs_are_refused(group_by, view, error, message):
    """Specs and views of wrong types or unknown names are errors that say what was expected."""
    with pytest.raises(error, match=message):
        check_spec(group_by, view)


@pytest.mark.parametrize(
    ("group_by", "message"),
    [
        ((2,), r"expected dims in \[-2, 2\) of a 2-d tensor, got \(2,\)"),
        ((-3,), r"expected dims in \[-2, 2\) of a 2-d tensor, got \(-3,\)"),
        ((0, 0), r"expected each dim once, got \(0, 0\)"),
        ((1, -1), r"expected each dim once, got \(1, -1\)"),
        ("rows", "expected one of .* got 'rows'"),
    ],
    ids=str,
)
def test_dims_that_are_not_there_are_refused(group_by, message):
    """A dim out of range, or the same dim twice, is an error."""
    with pytest.raises(ValueError, match=message):
        canonical_layout(torch.empty(4, 6), group_by)


@pytest.mark.parametrize(
    ("w", "view"),
    [
        (torch.empty(4, 6), (5, 5)),
        (torch.empty(4, 6), (-1, 7)),
        (torch.empty(4, 6), (-1, -1)),
        (torch.empty(4, 6).t(), (24,)),
        (torch.empty(2, 8, 3, 3).to(memory_format=torch.channels_last), (2, 72)),
    ],
    ids=["size", "indivisible", "two unknowns", "transposed", "channels_last"],
)
def test_views_that_cannot_be_are_refused(w, view):
    """A view that does not fit the shape or the strides is an error that names both."""
    for function in (lambda: viewed(w, view), lambda: canonical_layout(w, "feature", view)):
        with pytest.raises(ValueError, match=r"view: expected a shape that .* can be viewed as") as error:
            function()
        assert f"got {view}" in str(error.value) and str(tuple(w.shape)) in str(error.value)


def test_a_one_element_tensor_may_be_viewed_without_dims():
    """The view () is legal for one element."""
    assert canonical_layout(torch.empty(1, 1), "feature", ()) == Layout(1, 1, 1, 1)
