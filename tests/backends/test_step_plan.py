"""StepPlan, in C++ and in Python: what a step checks and gathers, and what it leaves behind."""

import ctypes
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from cges_kernels import ProxSGD
from cges_kernels.backends import gathering, planner
from cges_kernels.backends.extension import BUILT
from cges_kernels.core.groups import grouped_layout
from cges_kernels.core.hyperparameters import At, Hyperparameters, Phase

PLANS = {"python": gathering.StepPlan} | ({"c++": BUILT["cpu"].StepPlan} if "cpu" in BUILT else {})
SHAPES = [(4, 3), (2, 3, 2, 2), (6,), (5, 1)]


@pytest.fixture(params=PLANS)
def Plan(request):
    return PLANS[request.param]


def parameters(shapes=SHAPES):
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def make_plan(Plan, *groups, momentum=0.9):
    plan = Plan(groups, [[grouped_layout(p, "feature", None) for p in group] for group in groups])
    for i in range(len(groups)):
        plan.set_hyperparameters(i, Hyperparameters(lr=0.1, momentum=momentum))
    return plan


def run(plan):
    """Runs a gathered step that does nothing; its table as a list of rows."""
    tables = []
    plan.run(tables.append)
    (table,) = tables
    assert table.dtype == torch.int64 and table.device.type == "cpu" and table.shape[1:] == (4,)
    return table.tolist()


def memory(address, n):
    """The n floats that lie there."""
    return torch.tensor((ctypes.c_float * n).from_address(address)[:])


def snapshot(params, state):
    return [(p._version, p.tolist()) for p in params], {p: dict(entry) for p, entry in state.items()}


def watched(p):
    """Gives p a gradient whose memory tells whether it is alive after p has let go of it."""
    array = np.ones(tuple(p.shape), np.float32)
    p.grad = torch.from_numpy(array)
    return weakref.ref(array)


def is_alive(p, watch):
    p.grad = None
    if watch() is not None:  # then it may be garbage; collecting takes its time
        gc.collect()
    return watch() is not None


# Whether the plan matches


def replace(groups):
    groups[1][0] = nn.Parameter(groups[1][0].detach())


def swap(groups):
    groups[0].reverse()


def lengthen(groups):
    groups[1].append(nn.Parameter(torch.ones(3)))


def shorten(groups):
    groups[1].pop()


def add_a_group(groups):
    groups.append([])


def hand_on(groups):
    groups[1].insert(0, groups[0].pop())


def move(groups):
    p = groups[0][1]
    p.data = p.data.clone()


def reshape(groups):
    p = groups[1][0]
    p.data = p.data.view(2, 3)


def restride(groups):
    p = groups[0][0]
    p.data = p.data.as_strided((4, 3), (1, 4))


def retype(groups):
    p = groups[0][0]
    p.data = p.data.view(torch.float16).as_strided((4, 3), (3, 1))


CHANGES = [replace, swap, lengthen, shorten, add_a_group, hand_on, move, reshape, restride, retype]


@pytest.mark.parametrize("change", CHANGES)
def test_gather_notices(Plan, change):
    params = parameters()
    groups = [params[:2], params[2:]]
    plan, state = make_plan(Plan, *map(list, groups)), {}
    assert plan.gather(groups, state)
    place = params[0].data_ptr()
    change(groups)
    assert params[0].data_ptr() == place
    assert not plan.gather(groups, state)
    with pytest.raises(RuntimeError, match="expected a gather that succeeded"):  # the first one is void too
        run(plan)
    assert not state


def test_gather_knows_the_parameters_and_not_the_lists(Plan):
    params = parameters()
    plan = make_plan(Plan, params[:2], [], params[2:])
    assert plan.gather([list(params[:2]), [], list(params[2:])], {})


def test_run_needs_a_gather_each_time(Plan):
    params = parameters()
    plan = make_plan(Plan, params)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"StepPlan\.run: expected a gather .*, got none"):
            run(plan)
        assert plan.gather([params], {})
        run(plan)


# The table


def test_table_has_a_row_per_parameter_group_by_group(Plan):
    plain, momentum = parameters(), parameters()
    plan, state = make_plan(Plan, plain, [], momentum), {}
    plan.set_hyperparameters(0, Hyperparameters(lr=0.1))
    plain[1].grad = momentum[2].grad = None
    state[momentum[0]] = {"momentum_buffer": torch.randn(4, 3)}
    state[momentum[1]] = {"momentum_buffer": None}
    buf = state[plain[0]] = {"momentum_buffer": torch.randn(4, 3)}
    assert plan.gather([plain, [], momentum], state)
    table = run(plan)
    assert [row[0] for row in table] == [p.data_ptr() for p in plain + momentum]
    assert [row[1] for row in table] == [0 if p.grad is None else p.grad.data_ptr() for p in plain + momentum]
    assert [row[3] for row in table] == [
        *(Phase.STATELESS, Phase.SKIPPED, Phase.STATELESS, Phase.STATELESS),
        *(Phase.RUNNING, Phase.FIRST, Phase.SKIPPED, Phase.FIRST),
    ]
    buffers = [state[p]["momentum_buffer"].data_ptr() if p in state else 0 for p in momentum]
    assert [row[2] for row in table] == [0, 0, 0, 0, *buffers] and buffers[2] == 0
    assert plain[2] not in state and state[plain[0]] is buf

    momentum[2].grad = torch.ones(6)
    assert plan.gather([plain, [], momentum], state)
    assert [row[3] for row in run(plan)[4:]] == [Phase.RUNNING, Phase.RUNNING, Phase.FIRST, Phase.RUNNING]


def test_empty_plans_have_an_empty_table(Plan):
    for groups in ([], [[], []]):
        plan = make_plan(Plan, *groups)
        assert plan.gather(groups, {})
        assert run(plan) == []


def test_what_lies_otherwise_is_copied_into_the_order_of_the_parameter(Plan):
    params = parameters([(4, 3)] * 4)
    params[3].data = params[3].data.t().contiguous().t()
    grad, buf = torch.randn(4, 3), torch.randn(4, 3)
    others = [grad.t().contiguous().t(), torch.stack([grad] * 2, dim=2)[..., 0], torch._neg_view(-grad), grad]
    for p, other in zip(params, others):
        p.grad = other
    state = {p: {"momentum_buffer": other - grad + buf} for p, other in zip(params, others)}
    state[params[2]]["momentum_buffer"] = torch._neg_view(-buf)
    plan = make_plan(Plan, params)
    assert plan.gather([params], state)
    held = []

    def look(table):
        for _, g, b, phase in table.tolist():
            assert phase == Phase.RUNNING
            held.append((memory(g, 12), memory(b, 12)))

    plan.run(look)
    for p, (g, b) in zip(params, held):
        order = grad.t() if p is params[3] else grad
        wanted = buf.t() if p is params[3] else buf
        assert torch.equal(g, order.flatten())
        torch.testing.assert_close(b, wanted.flatten())
        kept = state[p]["momentum_buffer"]
        assert kept.stride() == p.stride() and not kept.is_neg()
        torch.testing.assert_close(kept, buf)
    before = [state[p]["momentum_buffer"] for p in params]
    assert plan.gather([params], state)
    assert [row[2] for row in run(plan)] == [b.data_ptr() for b in before]
    assert all(state[p]["momentum_buffer"] is b for p, b in zip(params, before))


def test_strides_that_move_nothing_are_no_reason_to_copy(Plan):
    params = parameters([(5, 1), (0, 3)])
    p = params[0]
    p.grad = torch.randn(1, 5).t()
    assert p.grad.stride() != p.stride()
    plan = make_plan(Plan, params)
    assert plan.gather([params], {})
    assert run(plan)[0][1] == p.grad.data_ptr()


# What a step leaves behind


def test_fresh_buffers_appear_with_the_run(Plan):
    params = parameters()
    params[1].data = params[1].data.to(memory_format=torch.channels_last)
    plan, state = make_plan(Plan, params), {}
    assert plan.gather([params], state)
    assert not state
    addresses = [row[2] for row in run(plan)]
    assert list(state) == params
    for p, address in zip(params, addresses):
        (buf,) = state[p].values()
        assert type(buf) is torch.Tensor and not buf.requires_grad
        assert (buf.shape, buf.stride(), buf.dtype) == (p.shape, p.stride(), p.dtype)
        assert buf.data_ptr() == address


def test_an_entry_of_the_state_is_kept(Plan):
    p, *_ = params = parameters()
    entry = {"mine": 3}
    plan, state = make_plan(Plan, params), {p: entry}
    assert plan.gather([params], state)
    run(plan)
    assert state[p] is entry and list(entry) == ["mine", "momentum_buffer"]


def test_versions_move_with_the_run(Plan):
    params = parameters()
    params[2].grad = None
    plan, state = make_plan(Plan, params), {}
    for _ in range(2):
        before = [p._version for p in params]
        assert plan.gather([params], state)
        assert [p._version for p in params] == before
        run(plan)
        assert [p._version > v for p, v in zip(params, before)] == [True, True, False, True]
    version = state[params[0]]["momentum_buffer"]._version
    assert plan.gather([params], state)
    run(plan)
    assert state[params[0]]["momentum_buffer"]._version > version


def test_parameters_made_in_inference_mode_have_no_version(Plan):
    with torch.inference_mode():
        p = torch.ones(3)
        p.grad = torch.ones(3)
        plan, state = make_plan(Plan, [p]), {}
        for _ in range(2):
            assert plan.gather([[p]], state)
            run(plan)


def test_a_launch_that_raises_leaves_everything_alone(Plan):
    params = parameters()
    plan, state = make_plan(Plan, params), {params[0]: {"momentum_buffer": torch.ones(4, 3)}}
    before = snapshot(params, state)
    watch = watched(params[1])
    assert plan.gather([params], state)

    def fail(table):
        raise ZeroDivisionError("no device")

    try:  # pytest.raises would keep the traceback, and with it the frames
        plan.run(fail)
    except ZeroDivisionError as error:
        assert "no device" in str(error)
    else:
        pytest.fail("the error is lost")
    after = snapshot(params, state)
    assert after[0] == before[0] and list(after[1]) == list(before[1])
    assert all(after[1][p]["momentum_buffer"] is b["momentum_buffer"] for p, b in before[1].items())
    with pytest.raises(RuntimeError, match="expected a gather"):
        run(plan)
    assert not is_alive(params[1], watch)


def stepped(plan, params, state):
    run(plan)


def void(plan, params, state):
    assert not plan.gather([params[1:]], state)


def refused(plan, params, state):
    params[3].grad = params[3].grad.to_sparse()
    try:
        plan.gather([params], state)
    except RuntimeError as error:
        assert "dense" in str(error)


@pytest.mark.parametrize("end", [stepped, void, refused])
def test_no_gradient_is_kept_alive(Plan, end):
    params = parameters()
    plan, state = make_plan(Plan, params), {}
    watch = watched(params[0])
    assert plan.gather([params], state)
    grad = params[0].grad
    assert is_alive(params[0], watch)
    params[0].grad = grad
    del grad
    end(plan, params, state)
    assert not is_alive(params[0], watch)


# What is refused, by both in the same words


def halve(p):
    p.data = p.data[: len(p) // 2].clone()


def bfloat16_gradient(p):
    p.grad, p.grad_dtype = None, torch.bfloat16
    p.grad = torch.ones(p.shape, dtype=torch.bfloat16)


def gradient(value):
    return lambda params, state: setattr(params[3], "grad", value(params[3]))


def buffer(value):
    return lambda params, state: state.update({params[3]: {"momentum_buffer": value(params)}})


def two_buffers(make):
    def spoil(params, state):
        for p, buf in zip((params[0], params[3]), make()):
            state[p] = {"momentum_buffer": buf}

    return spoil


LAST = r"^param_groups\[1\]\['params'\]\[1\]: "
ITS_BUFFER = r"^the momentum_buffer of param_groups\[1\]\['params'\]\[1\]: expected each tensor once, got "
FAULTS = {
    "sparse gradient": (gradient(lambda p: p.grad.to_sparse()), RuntimeError,
                        LAST + "expected a dense gradient, got layout torch.sparse_coo"),
    "short gradient": (lambda params, _: halve(params[3]), RuntimeError,
                       LAST + r"expected a gradient of shape \(2, 3\), .* got \(4, 3\), torch.float32"),
    "bfloat16 gradient": (lambda params, _: bfloat16_gradient(params[3]), RuntimeError,
                          LAST + r"expected a gradient of .* torch.float32 .* torch.bfloat16 on cpu"),
    "gradient that wraps": (gradient(lambda p: TwoTensor(p.grad, p.grad)), RuntimeError,
                            LAST + "expected a plain tensor as its gradient, got TwoTensor"),
    "no tensor": (buffer(lambda _: [0.0] * 12), TypeError,
                  LAST + "expected a tensor as its momentum_buffer, got list"),
    "sparse buffer": (buffer(lambda _: torch.zeros(4, 3).to_sparse()), RuntimeError,
                      LAST + "expected a dense momentum_buffer, got layout torch.sparse_coo"),
    "short buffer": (buffer(lambda _: torch.zeros(1, 3)), RuntimeError,
                     LAST + r"expected a momentum_buffer of shape \(4, 3\), .* got \(1, 3\)"),
    "float64 buffer": (buffer(lambda _: torch.zeros(4, 3, dtype=torch.float64)), RuntimeError,
                       LAST + r"expected a momentum_buffer of .* torch.float32 on cpu, got .* torch.float64"),
    "buffer elsewhere": (buffer(lambda _: torch.zeros(4, 3, device="meta")), RuntimeError,
                         LAST + r"expected a momentum_buffer of .* on cpu, got .* on meta"),
    "buffer that wraps": (buffer(lambda _: TwoTensor(torch.zeros(4, 3), torch.zeros(4, 3))), RuntimeError,
                          LAST + "expected a plain tensor as its momentum_buffer, got TwoTensor"),
    "one buffer for two": (two_buffers(lambda: [torch.zeros(4, 3)] * 2), ValueError,
                           ITS_BUFFER + r"the same as the momentum_buffer of param_groups\[0\].*\[0\] again"),
    "buffers that overlap": (two_buffers(lambda: torch.zeros(18).unfold(0, 12, 6).view(2, 4, 3)), ValueError,
                             ITS_BUFFER + "memory that the momentum_buffer of .* has too"),
    "a parameter as buffer": (buffer(lambda params: params[3]), ValueError,
                              ITS_BUFFER + r"the same as param_groups\[1\]\['params'\]\[1\] again"),
    "a parameter's memory": (buffer(lambda params: params[0].detach()), ValueError,
                             ITS_BUFFER + r"memory that param_groups\[0\]\['params'\]\[0\] has too"),
}  # fmt: skip


@pytest.mark.parametrize("spoil,error,text", FAULTS.values(), ids=FAULTS)
def test_gather_refuses(spoil, error, text):
    params, state = parameters([(4, 3)] * 4), {}
    spoil(params, state)
    before, texts = snapshot(params, state), []
    for Plan in PLANS.values():
        plan = make_plan(Plan, params[:2], params[2:])
        for _ in range(2):  # the second attempt must not forget what the first saw
            with pytest.raises(error, match=text) as caught:
                plan.gather([params[:2], params[2:]], state)
            texts.append(str(caught.value))
            with pytest.raises(RuntimeError, match="expected a gather"):
                run(plan)
    assert len(set(texts)) == 1
    after = snapshot(params, state)
    assert after[0] == before[0] and list(after[1]) == list(before[1])


def test_a_buffer_that_becomes_another_parameters_too_is_refused(Plan):
    params = parameters([(4, 3)] * 2)
    plan, state = make_plan(Plan, params), {}
    assert plan.gather([params], state)
    run(plan)
    assert plan.gather([params], state)
    run(plan)
    mine = state[params[1]]["momentum_buffer"]
    state[params[1]]["momentum_buffer"] = state[params[0]]["momentum_buffer"]
    for _ in range(2):
        with pytest.raises(ValueError, match="expected each tensor once, got the same"):
            plan.gather([params], state)
    state[params[1]]["momentum_buffer"] = mine
    assert plan.gather([params], state)


def test_buffers_may_be_neighbours_in_one_storage(Plan):
    params = parameters([(4, 3)] * 3)
    rows = torch.zeros(3, 4, 3)
    halves = torch.zeros(4, 3, 2).unbind(-1)  # these interleave, and are copied
    for buffers in (rows, [*halves, rows[0]]):
        state = {p: {"momentum_buffer": buf} for p, buf in zip(params, buffers)}
        plan = make_plan(Plan, params)
        assert plan.gather([params], state)
        assert [row[3] for row in run(plan)] == [Phase.RUNNING] * 3


@pytest.mark.parametrize(
    "params,layouts,text",
    [
        ([[]], [], "expected layouts for 1 param groups, got 0"),
        ([[], [torch.ones(6)]], [[], []], "expected 1 layouts in param group 1, got 0"),
        ([[torch.ones(6)]], [[(1, 2, 2, 1, True)]], "expected a layout of 6 elements, got 4"),
    ],
    ids=["groups", "tensors", "elements"],
)
def test_a_plan_refuses_layouts_of_something_else(Plan, params, layouts, text):
    with pytest.raises(ValueError, match=rf"^StepPlan: {text}$"):
        Plan(params, layouts)


def test_a_plan_refuses_hyperparameters_of_a_group_it_has_not(Plan):
    with pytest.raises(IndexError):
        make_plan(Plan, []).set_hyperparameters(1, Hyperparameters(lr=0.1))


class Dispatching(torch.Tensor):
    """A class of tensors that sees every operation on it."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} on the parameter's class")


def test_a_buffer_is_a_plain_tensor_whatever_the_parameters_class(Plan):
    p = torch.Tensor._make_subclass(Dispatching, torch.randn(4, 3).t())
    p.grad = torch.Tensor._make_subclass(Dispatching, torch.randn(4, 3).t())
    plan, state = make_plan(Plan, [p]), {}
    assert plan.gather([[p]], state)
    run(plan)
    buf = state[p]["momentum_buffer"]
    assert type(buf) is torch.Tensor and buf.stride() == (1, 3)


@pytest.mark.skipif("cpu" not in BUILT, reason="the extension is not built")
def test_the_cpu_executor_refuses_what_only_a_kernel_can_read():
    p = nn.Parameter(torch.ones(4, 3))
    p.grad = torch.ones(4, 3)
    plan = BUILT["cpu"].StepPlan([[p]], [[grouped_layout(p, "feature", None)]], "cpu")
    lr = torch.tensor(0.1)
    plan.set_hyperparameters(0, Hyperparameters(lr=At(lr.data_ptr())))
    assert plan.gather([[p]], {})
    with pytest.raises(RuntimeError, match="cpu executor: expected numbers, got addresses"):
        plan.run()
    assert torch.equal(p, torch.ones(4, 3))


@pytest.mark.skipif("cpu" not in BUILT, reason="the extension is not built")
@pytest.mark.parametrize("phase", [-2, 4])
def test_an_executor_refuses_a_phase_that_is_none(phase):
    w = torch.ones(4, 3)
    executor = BUILT["cpu"].Executor("cpu", [w], [grouped_layout(w, "feature", None)], [0])
    with pytest.raises(ValueError, match=f"phase: expected one of Phase, got {phase}"):
        executor.step([(w.data_ptr(), 0, 0, phase)], [Hyperparameters(lr=1.0, l1=0.5)])
    assert torch.equal(w, torch.ones(4, 3))


# Several executors in one optimizer


class Recorder(gathering.StepPlan):
    """The plan of an executor that only says what it was asked to do."""

    def __init__(self, executor, params, layouts, specs, log):
        super().__init__(params, layouts)
        self.executor, self.log = executor, log
        log.append((executor, "made"))

    def set_hyperparameters(self, group, hyperparameters):
        super().set_hyperparameters(group, hyperparameters)
        self.log.append((self.executor, "values", group, hyperparameters.lr))

    def run(self, grad_scale=None, found_inf=None):
        super().run(lambda table: self.log.append((self.executor, "runs", table[:, 0].tolist())))


@pytest.fixture
def log(monkeypatch):
    """What the plans of two executors are asked to do: "flat" serves groups of biases, "deep" the rest."""
    log = []
    monkeypatch.setattr(planner, "make_plan", lambda *args: Recorder(*args, log))
    monkeypatch.setattr(
        planner, "choose_backend", lambda backend, params, fused: "flat" if params[0].dim() < 2 else "deep"
    )
    return log


def two_executors():
    params = parameters([(4, 3), (6,), (3, 2), (7,)])
    groups = [{"params": [p], "lr": i + 1.0} for i, p in enumerate(params)]
    return ProxSGD(groups, momentum=0.9), params


def runs_of(params):
    flat, deep = ([p.data_ptr() for p in params[i::2]] for i in (1, 0))
    return [("deep", "runs", deep), ("flat", "runs", flat)]


def test_each_executor_has_a_plan_of_its_own_groups(log):
    optimizer, params = two_executors()
    optimizer.step()
    assert optimizer._planner.executors == ["deep", "flat"] * 2
    assert log == [
        *(("deep", "made"), ("flat", "made")),
        *(("deep" if i % 2 == 0 else "flat", "values", i, i + 1.0) for i in range(4)),
        *runs_of(params),
    ]
    log.clear()
    optimizer.param_groups[1]["lr"] = 5.0
    optimizer.step()
    assert log == [("flat", "values", 1, 5.0), *runs_of(params)]
    assert all(list(optimizer.state[p]) == ["momentum_buffer"] for p in params)


@pytest.mark.parametrize("faulty", range(4))
def test_no_executor_runs_when_one_has_something_to_refuse(log, faulty):
    optimizer, params = two_executors()
    others = [p for i, p in enumerate(params) if i != faulty]
    watches = [watched(p) for p in others]
    params[faulty].grad = params[faulty].grad.to_sparse()
    before = snapshot(params, optimizer.state)
    try:
        optimizer.step()
    except RuntimeError as error:
        assert f"param_groups[{faulty}]['params'][0]: expected a dense gradient" in str(error)
    else:
        pytest.fail("nothing was refused")
    assert not any("runs" in entry for entry in log)
    assert snapshot(params, optimizer.state) == before
    assert not any(is_alive(p, watch) for p, watch in zip(others, watches))


def test_a_parameter_that_moves_renews_all_plans_before_any_runs(log):
    optimizer, params = two_executors()
    optimizer.step()
    log.clear()
    params[3].data = params[3].data.clone()
    optimizer.step()
    assert [entry[1] for entry in log] == ["made"] * 2 + ["values"] * 4 + ["runs"] * 2
    assert log[-2:] == runs_of(params)


def test_a_plan_that_never_matches_is_an_error(log, monkeypatch):
    optimizer, _ = two_executors()
    monkeypatch.setattr(Recorder, "gather", lambda plan, params, state: plan.executor != "flat")
    with pytest.raises(RuntimeError, match=r"expected parameters that stay in place .* moved twice"):
        optimizer.step()
    assert not any("runs" in entry for entry in log)
