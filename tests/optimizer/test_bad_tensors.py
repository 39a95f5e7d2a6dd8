"""Tensors that cannot be parameters, and the same memory twice, are refused, and nothing has been written."""

import warnings

import pytest
import torch
from helpers.refusals import OPTIONS, as_bytes, assert_recovers, parameters, rejected, started
from helpers.steps import give_grads
from torch import nn

from cges_kernels import ProxSGD, penalty, prox, prox_


def base():
    """24 numbers to make views of."""
    return torch.arange(24.0)


BAD_TENSORS = {
    "integer": (lambda: torch.arange(6), ValueError, ["expected .*floating-point", "got torch.int64"]),
    "bool": (lambda: torch.ones(3, dtype=torch.bool), ValueError, ["floating-point", "got torch.bool"]),
    "complex": (lambda: torch.zeros(3).cfloat(), ValueError, ["expected a real", "got torch.complex64"]),
    "sparse": (lambda: torch.eye(3).to_sparse(), ValueError, ["expected a dense", "got .*torch.sparse_coo"]),
    "sparse_csr": (lambda: torch.eye(3).to_sparse_csr(), ValueError, ["a dense", "got .*sparse_csr"]),
    "meta": (lambda: torch.empty(3, 2, device="meta"), ValueError, ["expected a tensor with memory", "meta"]),
    "gaps": (lambda: base().view(4, 6)[:, ::2], ValueError,
             ["expected a dense, non-overlapping", r"shape \(4, 3\) with strides \(6, 2\)"]),
    "rows of a wider one": (lambda: base().view(4, 6)[:, :5], ValueError,
                            ["expected a dense", r"shape \(4, 5\) with strides \(6, 1\)"]),
    "overlapping": (lambda: base().as_strided((3, 4), (2, 1)), ValueError,
                    ["expected a dense, non-overlapping", r"shape \(3, 4\) with strides \(2, 1\)"]),
    "expanded": (lambda: base()[:1].expand(4, 3), ValueError,
                 ["expected a dense, non-overlapping", r"shape \(4, 3\) with strides \(0, 0\)"]),
    "no tensor": (lambda: [1.0, 2.0], TypeError, ["expected a tensor|can only optimize Tensors", "list"]),
}  # fmt: skip


@pytest.fixture(params=BAD_TENSORS.values(), ids=BAD_TENSORS)
def bad_tensor(request):
    """One of BAD_TENSORS: the tensor, the error, and what its text matches."""
    make, error, words = request.param
    return make(), error, words


def test_optimizer_refuses_a_tensor(fastest_backend, bad_tensor):
    """The constructor and add_param_group refuse it, and training goes on."""
    w, error, words = bad_tensor
    with pytest.raises(error) as caught:
        ProxSGD([*parameters(), w], **OPTIONS, backend=fastest_backend)
    for word in words:
        caught.match(word)
    optimizer, params = started(fastest_backend)
    with rejected(optimizer, error, *words):
        optimizer.add_param_group({"params": [*parameters(seed=1), w]})
    assert_recovers(optimizer, params, fastest_backend)


def test_step_refuses_a_tensor_put_into_a_param_group(checked_backend, bad_tensor):
    """A step checks parameters that were put into a param group by hand."""
    w, error, words = bad_tensor
    if not isinstance(w, torch.Tensor):
        pytest.skip("torch.optim.Optimizer itself walks over these")
    optimizer, params = started(checked_backend)
    optimizer.param_groups[0]["params"].append(w)
    if w.is_floating_point() and w.layout == torch.strided:
        w.grad = torch.zeros_like(w)
    for _ in range(2):
        with rejected(optimizer, error, r"params'\]\[3\]", *words):
            optimizer.step()
    optimizer.param_groups[0]["params"].pop()
    assert_recovers(optimizer, params, checked_backend)


def test_functions_refuse_a_tensor(checked_backend, bad_tensor):
    """prox_ names the bad tensor of its list and has changed none of the others."""
    w, error, words = bad_tensor
    tensors = [p.detach() for p in parameters()]
    before = [as_bytes(x) for x in tensors]
    with pytest.raises(error) as caught:
        prox_([*tensors, w], l1=0.1, backend=checked_backend)
    for word in [r"tensors\[3\]", *words]:
        caught.match(word)
    assert [as_bytes(x) for x in tensors] == before


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["integer", "complex", "sparse", "meta", "no tensor"])
def test_prox_and_penalty_refuse_a_tensor(name, requires_grad):
    """With and without gradients, which take different code, the error is the same."""
    make, error, words = BAD_TENSORS[name]
    w = make()
    if requires_grad and name in ("complex", "sparse", "meta"):
        w.requires_grad_()
    for function in (prox, penalty):
        with pytest.raises(error) as caught:
            function(w, l1=0.1)
        for word in words:
            caught.match(word)


@pytest.mark.parametrize("name", ["gaps", "overlapping", "expanded"])
def test_prox_treats_a_tensor_with_gaps_the_same_with_and_without_gradients(name):
    """prox gives the same values or the same error in both cases."""
    w = BAD_TENSORS[name][0]()
    outcomes = []
    for x in (w, w.detach().requires_grad_()):
        try:
            outcomes.append(prox(x, group_lasso=0.1, backend="reference").tolist())
        except ValueError as error:
            outcomes.append(str(error).split(": ")[-1])
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    "function", [prox, lambda w, **options: prox_([w], **options)], ids=["prox", "prox_"]
)
def test_a_tensor_whose_memory_is_freed_is_refused(checked_backend, function):
    """prox and prox_ raise an error instead of reading freed memory."""
    w = torch.ones(3, 4)
    w.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="expected a tensor with memory, got one whose memory is freed"):
        function(w, l1=0.1, backend=checked_backend)


def test_lazy_parameters_are_refused_before_the_first_batch(checked_backend):
    """The error says to run one batch, after which the parameter is taken."""
    lazy = nn.LazyLinear(3)
    with pytest.raises(
        ValueError, match=r"\[0\].*expected an initialised parameter, got a lazy one.*run one batch"
    ):
        ProxSGD(lazy.parameters(), **OPTIONS, backend=checked_backend)
    with pytest.raises(ValueError, match=r"expected an initialised .*got a lazy one"):
        prox_([lazy.weight], l1=0.1, backend=checked_backend)
    lazy(torch.ones(2, 5)).sum().backward()
    ProxSGD(lazy.parameters(), **OPTIONS, backend=checked_backend).step()


# The same memory given twice


def test_the_same_tensor_twice_is_refused(checked_backend):
    """The constructor and add_param_group refuse it, in one param group or in two."""
    optimizer, params = started(checked_backend)
    p, q = parameters(seed=1)[:2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.optim warns before we refuse
        with pytest.raises(ValueError, match=r"\['params'\]\[2\].*expected each .*once, got the same"):
            ProxSGD([p, q, p], **OPTIONS, backend=checked_backend)
        with rejected(optimizer, ValueError, "expected each .*once", "got the same"):
            optimizer.add_param_group({"params": [p, q, p]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        ProxSGD([{"params": [p, q]}, {"params": [p]}], **OPTIONS, backend=checked_backend)
    with rejected(optimizer, ValueError, "more than one parameter group"):
        optimizer.add_param_group({"params": [p, params[0]]})
    assert_recovers(optimizer, params, checked_backend)


def test_step_refuses_a_tensor_put_in_twice(checked_backend):
    """A step notices a parameter that was put into its group a second time by hand."""
    optimizer, params = started(checked_backend)
    optimizer.param_groups[0]["params"].append(params[0])
    with rejected(optimizer, ValueError, r"\['params'\]\[3\].*expected each .*once", "got the same"):
        optimizer.step()
    optimizer.param_groups[0]["params"].pop()
    assert_recovers(optimizer, params, checked_backend)


def test_step_refuses_a_tensor_put_into_two_groups(checked_backend):
    """A step notices a parameter that was put into a second group by hand."""
    params = parameters()
    optimizer = ProxSGD([{"params": params[:2]}, {"params": params[2:]}], **OPTIONS, backend=checked_backend)
    give_grads(params, 0)
    optimizer.step()
    optimizer.param_groups[1]["params"].append(params[0])
    with rejected(optimizer, ValueError, r"\[1\]\['params'\]\[1\].*expected each .*once"):
        optimizer.step()


SAME_MEMORY = {
    "the same view": lambda x: (x[:6], x[:6]),
    "another shape": lambda x: (x.view(4, 6), x),
    "beginning alike": lambda x: (x, x[:6]),
    "partial overlap": lambda x: (x[:6], x[3:9]),
    "one inside the other": lambda x: (x[:9], x[3:6]),
}


@pytest.mark.parametrize("views", SAME_MEMORY.values(), ids=SAME_MEMORY)
def test_prox_in_place_refuses_overlapping_memory(fastest_backend, views):
    """Views that overlap in any way are refused before anything is written."""
    x = base()
    with pytest.raises(ValueError, match=r"tensors\[1\].*expected each tensor once, got .*tensors\[0\]"):
        prox_(views(x), l1=0.1, backend=fastest_backend)
    assert torch.equal(x, base())


@pytest.mark.parametrize("views", SAME_MEMORY.values(), ids=SAME_MEMORY)
def test_optimizer_refuses_overlapping_memory(fastest_backend, views):
    """Two parameters that overlap are refused: a fused pass would update the memory twice at once."""
    x = base()
    with pytest.raises(ValueError, match=r"\['params'\]\[1\].*expected each .*once"):
        ProxSGD([nn.Parameter(v) for v in views(x)], **OPTIONS, backend=fastest_backend)


def test_neighbours_in_one_storage_are_fine(checked_backend):
    """Views that lie side by side, empty ones among them, do not count as overlapping."""
    x = base()
    wanted = prox(x, l1=0.5)
    prox_([x[12:], x[:0], x[:5], x[5:12], x[12:12]], l1=0.5, backend=checked_backend)
    assert torch.equal(x, wanted)
    ProxSGD([nn.Parameter(v) for v in (x[:5], x[5:5], x[5:])], **OPTIONS, backend=checked_backend)
