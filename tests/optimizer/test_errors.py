"""Bad input: the error says what was expected and what came, and nothing has been written."""

import copy
import warnings

import numpy as np
import pytest
import torch
from helpers.refusals import OPTIONS, as_bytes, assert_recovers, parameters, rejected, started
from helpers.steps import give_grads, needs_cpu
from torch import nn

from cges_kernels import ProxSGD, available_backends, penalty, prox, prox_

NAN, INF = float("nan"), float("inf")

# Hyperparameters: refused by the constructor, by add_param_group, and by the step after they are changed

BAD_OPTIONS = [
    *((dict([(name, value)]), ValueError, [name, "expected .*>= 0", f"got {value}"])
      for name in ("group_lasso", "exclusive_lasso", "l1") for value in (-0.5, NAN, INF, -INF)),
    (dict(group_lasso="much"), TypeError, ["group_lasso", "expected a number", "got 'much'"]),
    (dict(l1=None), TypeError, ["l1", "expected a number", "got None"]),
    (dict(l1=torch.tensor(1)), TypeError, ["l1: expected .*floating-point tensor", "got torch.int64"]),
    (dict(lr=np.array(0.1)), TypeError, ["lr: expected a number", "got array"]),
    (dict(l1=torch.tensor([0.1, 0.2])), ValueError, ["l1", "expected a number", r"got shape \(2,\)"]),
    (dict(lr=-0.1), ValueError, ["Invalid learning rate: -0.1"]),
    (dict(lr=NAN), ValueError, ["Invalid learning rate: nan"]),
    (dict(lr=torch.tensor(-0.5)), ValueError, ["Invalid learning rate", "-0.5"]),
    (dict(lr=torch.tensor([0.1, 0.2])), ValueError, ["Tensor lr must be 1-element", r"got shape \(2,\)"]),
    (dict(momentum=-0.9), ValueError, ["Invalid momentum value: -0.9"]),
    (dict(momentum=NAN), ValueError, ["Invalid momentum value: nan"]),
    (dict(weight_decay=-0.1), ValueError, ["Invalid weight_decay value: -0.1"]),
    (dict(weight_decay=NAN), ValueError, ["Invalid weight_decay value: nan"]),
    (dict(dampening=NAN), ValueError, ["Invalid dampening value: nan"]),
    (dict(nesterov=True, momentum=0), ValueError,
     ["Nesterov momentum requires a momentum and zero dampening", "got momentum=0"]),
    (dict(nesterov=True, momentum=0.9, dampening=0.3), ValueError,
     ["Nesterov momentum requires a momentum and zero dampening", "dampening=0.3"]),
    (dict(group_by="features"), ValueError, ["group_by: expected one of .*'feature'", "got 'features'"]),
    (dict(group_by=None), TypeError, ["group_by: expected", "got None"]),
    (dict(group_by=0), TypeError, ["group_by: expected", "got 0"]),
    (dict(group_by=(0.0,)), TypeError, ["group_by: expected", r"got \(0.0,\)"]),
    (dict(group_by=(1,)), ValueError, [r"params'\]\[2\]", r"expected dims in \[-1, 1\)", r"got \(1,\)"]),
    (dict(group_by=(-2,)), ValueError, [r"params'\]\[2\]", r"expected dims in \[-1, 1\)", r"got \(-2,\)"]),
    (dict(group_by=(0, 0)), ValueError, ["expected each dim once", r"got \(0, 0\)"]),
    (dict(group_by=(0, -1)), ValueError, ["expected each dim once", r"got \(0, -1\)"]),
    (dict(view=(5, 5), group_by=(0,)), ValueError, ["view: expected .*4, 3", r"got \(5, 5\)"]),
    (dict(view=7), TypeError, ["view: expected", "got 7"]),
    (dict(view=(2.0, 6)), TypeError, ["view: expected", r"got \(2.0, 6\)"]),
    (dict(prox_mode="exakt"), ValueError, ["prox_mode: expected one of .*'exact'", "got 'exakt'"]),
    (dict(prox_mode=None), ValueError, ["prox_mode: expected one of", "got None"]),
    (dict(freeze_zeros="some"), ValueError, ["freeze_zeros: expected one of .*'element'", "got 'some'"]),
    (dict(freeze_zeros=True), ValueError, ["freeze_zeros: expected one of", "got True"]),
    *((dict([(name, value)]), TypeError, [f"{name}: expected a number, got {value!r}"])
      for name, value in
      (("lr", "1e-3"), ("lr", None), ("momentum", "0.9"), ("dampening", "0"), ("weight_decay", "0.1"))),
    *((dict([(name, "False")]), TypeError, [f"{name}: expected a bool", "got 'False'"])
      for name in ("nesterov", "maximize", "differentiable", "foreach", "fused")),
    (dict(fused=True, foreach=True), RuntimeError, ["`fused` and `foreach` cannot be `True` together"]),
    (dict(fused=True, differentiable=True), RuntimeError, ["`fused` does not support `differentiable`"]),
]  # fmt: skip


@pytest.fixture(params=BAD_OPTIONS, ids=lambda case: "-".join(f"{k}={v}" for k, v in case[0].items()))
def bad(request):
    return request.param


def test_constructor_refuses(bad):
    options, error, words = bad
    params = parameters()
    before = [as_bytes(p) for p in params]
    with pytest.raises(error) as caught:
        ProxSGD(params, **{**OPTIONS, **options})
    for word in words:
        caught.match(word)
    assert [as_bytes(p) for p in params] == before


def test_add_param_group_refuses(backend, bad):
    options, error, words = bad
    optimizer, params = started(backend)
    with rejected(optimizer, error, *words):
        optimizer.add_param_group({"params": parameters(seed=1), **options})
    assert_recovers(optimizer, params, backend)


def test_step_refuses_what_was_changed(backend, bad):
    options, error, words = bad
    if "fused" in options or "foreach" in options:
        backend = "auto"
    optimizer, params = started(backend)
    group = optimizer.param_groups[0]
    good = {key: group[key] for key in options}
    group.update(options)
    for _ in range(2):  # the second attempt is no better
        with rejected(optimizer, error, *words):
            optimizer.step()
    group.update(good)
    assert_recovers(optimizer, params, backend)


def test_load_state_dict_refuses(backend, bad):
    """What step would refuse, and before anything has changed."""
    options, error, words = bad
    if "fused" in options or "foreach" in options:
        backend = "auto"
    optimizer, params = started(backend)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0].update(options)
    with rejected(optimizer, error, *words):
        optimizer.load_state_dict(state)
    assert_recovers(optimizer, params, backend)


def test_load_state_dict_refuses_full_values_that_no_schedule_could_use():
    optimizer, params = started("cpu")
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["initial_l1"] = "x"
    with rejected(optimizer, TypeError, "initial_l1: expected a number", "got 'x'"):
        optimizer.load_state_dict(state)
    assert_recovers(optimizer, params, "cpu")


def test_load_state_dict_refuses_a_backend_that_cannot_serve():
    optimizer, params = started("cpu")
    with rejected(optimizer, RuntimeError, "take the reference executor", "got backend='cpu'"):
        optimizer.load_state_dict(ProxSGD(parameters(), foreach=True, backend="reference").state_dict())
    assert_recovers(optimizer, params, "cpu")


@pytest.mark.parametrize("options", [dict(fused=True), dict(backend="cpu")])
def test_a_gradient_of_another_dtype_is_refused_where_the_reference_may_not_step(options):
    p = nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16))
    p.grad_dtype = torch.float32
    with pytest.raises(
        RuntimeError,
        match=r"params'\]\[0\]: expected a gradient of its own dtype, torch.bfloat16, got torch.float32",
    ):
        ProxSGD([p], **options)


@pytest.mark.parametrize(
    "function", [prox, lambda w, **options: prox_([w], **options)], ids=["prox", "prox_"]
)
def test_a_tensor_whose_memory_is_freed_is_refused(backend, function):
    w = torch.ones(3, 4)
    w.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="expected a tensor with memory, got one whose memory is freed"):
        function(w, l1=0.1, backend=backend)


@pytest.mark.parametrize("which", ["parameter", "gradient", "momentum_buffer"])
def test_a_step_of_freed_memory_is_refused(backend, which):
    optimizer, params = started(backend)
    p = params[0]
    freed = {"parameter": p, "gradient": p.grad, "momentum_buffer": optimizer.state[p]["momentum_buffer"]}
    freed[which].untyped_storage().resize_(0)
    with pytest.raises((ValueError, RuntimeError), match=r"\[0\]: expected .*memory, got .*(freed|none)"):
        optimizer.step()


def test_a_flag_as_text_is_refused_where_nothing_steps():
    with pytest.raises(TypeError, match="capturable: expected a bool, got 'no'"):
        ProxSGD(parameters(), capturable="no")


def test_step_refuses_a_tensor_lr_made_negative_in_place(backend):
    lr = torch.tensor(0.1, dtype=torch.float64)  # kernels read float32 ones, which no one checks
    optimizer, params = started(backend, lr=lr)
    lr.neg_()
    with rejected(optimizer, ValueError, "Invalid learning rate", "-0.1"):
        optimizer.step()
    lr.neg_()
    assert_recovers(optimizer, params, backend, lr=lr.clone())


def test_step_refuses_when_the_last_group_is_faulty(backend):
    params = parameters()
    optimizer = ProxSGD([{"params": [p]} for p in params], **OPTIONS, backend=backend)
    give_grads(params, 0)
    optimizer.step()
    optimizer.param_groups[2]["l1"] = -1.0
    optimizer.param_groups[0]["lr"] = 0.5
    with rejected(optimizer, ValueError, "l1: expected .*>= 0", "got -1"):
        optimizer.step()


FUNCTIONAL = [
    case
    for case in BAD_OPTIONS
    if set(case[0]) <= {"group_lasso", "exclusive_lasso", "l1", "group_by", "view", "prox_mode"}
]


@pytest.mark.parametrize("case", FUNCTIONAL, ids=lambda case: str(case[0]))
def test_functions_refuse(backend, case):
    options, error, words = case
    tensors = [torch.randn(4, 3), torch.randn(6)]  # the spec fails for the last
    before = [as_bytes(w) for w in tensors]
    w = tensors[1]
    if "view" in options:
        options = {**options, "group_by": "feature"}
        words = [word.replace("4, 3", "4, 3|6,") for word in words]
    calls = [
        lambda: prox_(tensors, **options, backend=backend),
        lambda: prox(w, **options, backend=backend),
        lambda: prox(w.clone().requires_grad_(), **options, backend=backend),
    ]
    if "prox_mode" not in options:
        calls.append(lambda: penalty(w, **options))
    for call in calls:
        with pytest.raises(error) as caught:
            call()
        for word in words:
            if not word.startswith("params"):
                caught.match(word)
    assert [as_bytes(w) for w in tensors] == before


# Tensors


def base():
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
    make, error, words = request.param
    return make(), error, words


def test_optimizer_refuses_a_tensor(backend, bad_tensor):
    w, error, words = bad_tensor
    with pytest.raises(error) as caught:
        ProxSGD([*parameters(), w], **OPTIONS, backend=backend)
    for word in words:
        caught.match(word)
    optimizer, params = started(backend)
    with rejected(optimizer, error, *words):
        optimizer.add_param_group({"params": [*parameters(seed=1), w]})
    assert_recovers(optimizer, params, backend)


def test_step_refuses_a_tensor_put_into_a_param_group(backend, bad_tensor):
    w, error, words = bad_tensor
    if not isinstance(w, torch.Tensor):
        pytest.skip("torch.optim.Optimizer itself walks over these")
    optimizer, params = started(backend)
    optimizer.param_groups[0]["params"].append(w)
    if w.is_floating_point() and w.layout == torch.strided:
        w.grad = torch.zeros_like(w)
    for _ in range(2):
        with rejected(optimizer, error, r"params'\]\[3\]", *words):
            optimizer.step()
    optimizer.param_groups[0]["params"].pop()
    assert_recovers(optimizer, params, backend)


def test_functions_refuse_a_tensor(backend, bad_tensor):
    w, error, words = bad_tensor
    tensors = [p.detach() for p in parameters()]
    before = [as_bytes(x) for x in tensors]
    with pytest.raises(error) as caught:
        prox_([*tensors, w], l1=0.1, backend=backend)
    for word in [r"tensors\[3\]", *words]:
        caught.match(word)
    assert [as_bytes(x) for x in tensors] == before


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["integer", "complex", "sparse", "meta", "no tensor"])
def test_prox_and_penalty_refuse_a_tensor(name, requires_grad):
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
    w = BAD_TENSORS[name][0]()
    outcomes = []
    for x in (w, w.detach().requires_grad_()):
        try:
            outcomes.append(prox(x, group_lasso=0.1, backend="reference").tolist())
        except ValueError as error:
            outcomes.append(str(error).split(": ")[-1])
    assert outcomes[0] == outcomes[1]


def test_lazy_parameters_are_refused_before_the_first_batch(backend):
    lazy = nn.LazyLinear(3)
    with pytest.raises(
        ValueError, match=r"\[0\].*expected an initialised parameter, got a lazy one.*run one batch"
    ):
        ProxSGD(lazy.parameters(), **OPTIONS, backend=backend)
    with pytest.raises(ValueError, match=r"expected an initialised .*got a lazy one"):
        prox_([lazy.weight], l1=0.1, backend=backend)
    lazy(torch.ones(2, 5)).sum().backward()
    ProxSGD(lazy.parameters(), **OPTIONS, backend=backend).step()


# The same memory twice


def test_the_same_tensor_twice_is_refused(backend):
    optimizer, params = started(backend)
    p, q = parameters(seed=1)[:2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.optim warns of this one before it is refused
        with pytest.raises(ValueError, match=r"\['params'\]\[2\].*expected each .*once, got the same"):
            ProxSGD([p, q, p], **OPTIONS, backend=backend)
        with rejected(optimizer, ValueError, "expected each .*once", "got the same"):
            optimizer.add_param_group({"params": [p, q, p]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        ProxSGD([{"params": [p, q]}, {"params": [p]}], **OPTIONS, backend=backend)
    with rejected(optimizer, ValueError, "more than one parameter group"):
        optimizer.add_param_group({"params": [p, params[0]]})
    assert_recovers(optimizer, params, backend)


def test_step_refuses_a_tensor_put_in_twice(backend):
    optimizer, params = started(backend)
    optimizer.param_groups[0]["params"].append(params[0])
    with rejected(optimizer, ValueError, r"\['params'\]\[3\].*expected each .*once", "got the same"):
        optimizer.step()
    optimizer.param_groups[0]["params"].pop()
    assert_recovers(optimizer, params, backend)


def test_step_refuses_a_tensor_put_into_two_groups(backend):
    params = parameters()
    optimizer = ProxSGD([{"params": params[:2]}, {"params": params[2:]}], **OPTIONS, backend=backend)
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
def test_prox_in_place_refuses_overlapping_memory(backend, views):
    x = base()
    with pytest.raises(ValueError, match=r"tensors\[1\].*expected each tensor once, got .*tensors\[0\]"):
        prox_(views(x), l1=0.1, backend=backend)
    assert torch.equal(x, base())


@pytest.mark.parametrize("views", SAME_MEMORY.values(), ids=SAME_MEMORY)
def test_optimizer_refuses_overlapping_memory(backend, views):
    """Two parameters, one memory: a fused pass would update it twice at once."""
    x = base()
    with pytest.raises(ValueError, match=r"\['params'\]\[1\].*expected each .*once"):
        ProxSGD([nn.Parameter(v) for v in views(x)], **OPTIONS, backend=backend)


def test_neighbours_in_one_storage_are_fine(backend):
    x = base()
    wanted = prox(x, l1=0.5)
    prox_([x[12:], x[:0], x[:5], x[5:12], x[12:12]], l1=0.5, backend=backend)
    assert torch.equal(x, wanted)
    ProxSGD([nn.Parameter(v) for v in (x[:5], x[5:5], x[5:])], **OPTIONS, backend=backend)


# Gradients and momentum buffers


def shorter(p):
    p.data = p.data[:2].clone()


def transposed(p):
    p.data = p.data.t().contiguous()


def double(p):
    p.data = p.data.double()


def sparse_grad(p):
    p.grad = p.grad.to_sparse()


def other_dtype_of_grad(p):
    grad, p.grad = p.grad, None
    p.grad_dtype = torch.bfloat16
    p.grad = grad.bfloat16()


BAD_GRADS = [
    (shorter, [r"\[?\(?2, 3", r"got [\[(]4, 3"]),
    (transposed, ["3, 4", r"got [\[(]4, 3"]),
    (double, ["expected a gradient", "(?i)(float64|double)", "(?i)got.* (torch.float32|float)"]),
    (sparse_grad, ["expected a dense gradient", "(?i)got .*layout .*sparse", "not supported"]),
    (other_dtype_of_grad, ["expected a gradient", "(?i)float", "(?i)got.*bfloat16"]),
]


@pytest.mark.parametrize("spoil,words", BAD_GRADS, ids=[case[0].__name__ for case in BAD_GRADS])
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_step_refuses_a_gradient(backend, momentum, spoil, words):
    """The last of several parameters is the faulty one; the first has its first gradient here."""
    if backend == "reference" and spoil in (double, other_dtype_of_grad):
        pytest.skip("it steps these, as torch's for-loop SGD does: test_optimizer.py")
    params = [nn.Parameter(p.detach()) for p in (*parameters(), torch.randn(4, 3))]
    optimizer = ProxSGD(params, **{**OPTIONS, "momentum": momentum}, backend=backend)
    give_grads(params[1:], 0)
    optimizer.step()
    give_grads(params, 1)
    spoil(params[-1])
    for _ in range(2):
        with rejected(optimizer, RuntimeError, r"params'\]\[3\]", *words):
            optimizer.step()


@needs_cpu
@pytest.mark.parametrize("faulty", [0, 1])
def test_step_writes_neither_fused_nor_reference_groups_when_one_is_faulty(faulty):
    params = parameters()
    groups = [{"params": params[:1]}, {"params": params[1:], "foreach": True}]
    optimizer = ProxSGD(groups, **OPTIONS)
    give_grads(params, 0)
    optimizer.step()
    assert optimizer._planner.executors == ["cpu", "reference"]
    sparse_grad(params[faulty])
    with rejected(optimizer, RuntimeError, "expected a dense gradient"):
        optimizer.step()


BAD_BUFFERS = {
    "shape": (lambda p: torch.zeros(7), RuntimeError, ["expected a momentum_buffer", "6", r"got .*7"]),
    "broadcastable": (lambda p: torch.zeros(1), RuntimeError, ["expected a momentum_buffer", r"got [\[(]1"]),
    "sparse": (lambda p: torch.zeros(6).to_sparse(), RuntimeError, ["momentum_buffer", "(?i)got .*sparse"]),
    "meta": (lambda p: torch.zeros(6, device="meta"), RuntimeError, ["momentum_buffer", "got .*meta"]),
    "a list": (lambda p: [0.0] * 6, TypeError, ["expected a tensor as its momentum_buffer", "got list"]),
}


@pytest.mark.parametrize("case", BAD_BUFFERS.values(), ids=BAD_BUFFERS)
def test_step_refuses_a_momentum_buffer(backend, case):
    make, error, words = case
    optimizer, params = started(backend)
    good = optimizer.state[params[2]]["momentum_buffer"]
    optimizer.state[params[2]]["momentum_buffer"] = make(params[2])
    for _ in range(2):  # the second attempt must not forget what the first saw
        with rejected(optimizer, error, r"params'\]\[2\]", *words):
            optimizer.step()
    optimizer.state[params[2]]["momentum_buffer"] = good
    assert_recovers(optimizer, params, backend)


@pytest.mark.parametrize("spoil", [lambda b: torch.zeros(7), lambda b: b.double()], ids=["shape", "dtype"])
@needs_cpu
def test_step_refuses_a_momentum_buffer_changed_in_place(spoil):
    """The object is the same, its memory is another: what `buf.data = buf.data.to(...)` does."""
    optimizer, params = started("cpu")
    buf = optimizer.state[params[2]]["momentum_buffer"]
    good = buf.data
    buf.data = spoil(buf.data)
    for _ in range(2):
        with rejected(optimizer, RuntimeError, r"params'\]\[2\]", "expected a momentum_buffer", "got"):
            optimizer.step()
    buf.data = good
    assert_recovers(optimizer, params, "cpu")


# Backends


@pytest.mark.parametrize("absent", ["cpu", "triton", "cuda"])
def test_a_backend_that_cannot_serve_says_why(absent):
    params = parameters()
    before = [as_bytes(p) for p in params]
    if absent in available_backends():
        pytest.skip(f"{absent} serves here")
    for call in (
        lambda: ProxSGD(params, backend=absent),
        lambda: prox(params[0].detach(), l1=0.1, backend=absent),
        lambda: prox(params[0], l1=0.1, backend=absent),
        lambda: prox_([p.detach() for p in params], l1=0.1, backend=absent),
        lambda: prox_([], l1=0.1, backend=absent),
    ):
        with pytest.raises(RuntimeError, match=rf"{absent}.* cannot (serve|be served)[:.] .+"):
            call()
    assert [as_bytes(p) for p in params] == before


def test_an_unknown_backend_is_refused():
    for call in (
        lambda: ProxSGD(parameters(), backend="gpu"),
        lambda: prox(torch.ones(3), backend="gpu"),
        lambda: prox_([torch.ones(3)], backend="gpu"),
    ):
        with pytest.raises(ValueError, match=r"backend: expected 'auto' or one of .*'reference'.* got 'gpu'"):
            call()


def test_fused_cannot_be_the_reference():
    with pytest.raises(RuntimeError, match=r"fused=True cannot be served.*reference.*not fused"):
        ProxSGD(parameters(), fused=True, backend="reference")
    optimizer, params = started("reference")
    with rejected(optimizer, RuntimeError, "fused=True cannot be served"):
        optimizer.add_param_group({"params": parameters(seed=1), "fused": True})
    optimizer.param_groups[0]["fused"] = True
    with rejected(optimizer, RuntimeError, "fused=True cannot be served"):
        optimizer.step()
    optimizer.param_groups[0]["fused"] = None
    assert_recovers(optimizer, params, "reference")


@needs_cpu
@pytest.mark.parametrize(
    "option", [dict(foreach=True), dict(differentiable=True), dict(fused=False)], ids=str
)
def test_a_fused_backend_cannot_be_the_reference(option):
    with pytest.raises(RuntimeError, match="take the reference executor, got backend='cpu'"):
        ProxSGD(parameters(), backend="cpu", **option)


def test_prox_in_place_needs_no_grad(backend):
    p = parameters()[0]
    with pytest.raises(RuntimeError, match=r"tensors\[1\].*no_grad"):
        prox_([torch.ones(3), p], l1=0.1, backend=backend)


# Small things that are no error


TINY = [(), (0,), (1,), (5,), (0, 3), (3, 0), (1, 1), (1, 4), (4, 1), (2, 0, 3, 3)]


@pytest.mark.parametrize("prox_mode", ["sequential", "exact"])
@pytest.mark.parametrize("group_by", ["feature", "filter", "channel", "tensor", ()], ids=str)
@pytest.mark.parametrize("shape", TINY, ids=str)
def test_empty_and_tiny_tensors_work(backend, prox_mode, group_by, shape):
    """l1 alone where there are no groups; the formula for one number where a group is one element."""
    w = torch.randn(shape, dtype=torch.float64)
    alpha, beta, gamma = 0.125, 0.25, 0.0625
    options = dict(group_lasso=alpha, exclusive_lasso=beta, l1=gamma, group_by=group_by, prox_mode=prox_mode)
    result = prox(w, **options, backend=backend)
    assert result.shape == w.shape and result.dtype == w.dtype

    u = (w.abs() - gamma).clamp(min=0)
    reduced = {"feature": shape[:1], "filter": shape[1:], "channel": shape[:1] + shape[2:], "tensor": shape}
    one_element_each = all(n == 1 for n in reduced.get(group_by, ()))
    if len(shape) < 2 and group_by != ():
        torch.testing.assert_close(result, u * w.sign())
    elif one_element_each and prox_mode == "exact":
        torch.testing.assert_close(result, (u - alpha).clamp(min=0) / (1 + beta) * w.sign())
    elif one_element_each:
        s = torch.where(u > alpha, 1 - alpha / u, 0.0)
        torch.testing.assert_close(result, s * (u - beta * u) * w.sign())

    in_place = w.clone()
    prox_([in_place], **options, backend=backend)
    assert torch.equal(in_place, result)
    p = nn.Parameter(w.clone())
    p.grad = torch.zeros_like(p)
    ProxSGD([p], lr=1.0, momentum=0.9, **options, backend=backend).step()
    assert torch.equal(p, result)


def test_nothing_to_do_is_no_error(backend):
    prox_([], l1=0.1, backend=backend)
    prox_(torch.ones(3), l1=0.1, backend=backend)  # a single tensor will do
    optimizer, params = started(backend)
    before = [as_bytes(p) for p in params]
    optimizer.zero_grad()
    optimizer.step()
    assert [as_bytes(p) for p in params] == before
    assert prox(torch.ones(1, 1), l1=0.5, view=(), backend=backend).item() == 0.5
