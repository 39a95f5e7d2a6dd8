"""StepPlan, in C++ and in Python: what both refuse in the same words; several executors in one optimizer."""

import pytest
import torch
from helpers.plans import PLANS, is_alive, make_plan, parameters, run, snapshot, watched
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from cges_kernels import ProxSGD
from cges_kernels.backends import gathering, planner
from cges_kernels.backends.extension import BUILT
from cges_kernels.backends.gathering import Row
from cges_kernels.core.groups import grouped_layout
from cges_kernels.core.hyperparameters import At, Hyperparameters, Phase

# What both refuse in the same words


def halve(p):
    p.data = p.data[: len(p) // 2].clone()


def bfloat16_gradient(p):
    p.grad, p.grad_dtype = None, torch.bfloat16
    p.grad = torch.ones(p.shape, dtype=torch.bfloat16)


def gradient(value):
    """A fault: the last parameter's gradient becomes this value."""
    return lambda params, state: setattr(params[3], "grad", value(params[3]))


def buffer(value):
    """A fault: the last parameter's momentum buffer becomes this value."""
    return lambda params, state: state.update({params[3]: {"momentum_buffer": value(params)}})


def two_buffers(make):
    """A fault: the first and the last parameter get these buffers."""

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
    """Each fault is refused in every attempt, in the same words by both plans, and nothing changes."""
    params, state = parameters([(4, 3)] * 4), {}
    spoil(params, state)
    before, texts = snapshot(params, state), []
    for Plan in PLANS.values():
        plan = make_plan(Plan, params[:2], params[2:])
        for _ in range(2):  # the second attempt has to look again
            with pytest.raises(error, match=text) as caught:
                plan.gather([params[:2], params[2:]], state)
            texts.append(str(caught.value))
            with pytest.raises(RuntimeError, match="expected a gather"):
                run(plan)
    assert len(set(texts)) == 1
    after = snapshot(params, state)
    assert after[0] == before[0] and list(after[1]) == list(before[1])


def test_a_buffer_that_becomes_another_parameters_too_is_refused(Plan):
    """A buffer that was fine is checked again once it serves two parameters."""
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
    """Buffers that share a storage without overlapping are accepted."""
    params = parameters([(4, 3)] * 3)
    rows = torch.zeros(3, 4, 3)
    halves = torch.zeros(4, 3, 2).unbind(-1)  # these interleave in memory, so they are copied
    for buffers in (rows, [*halves, rows[0]]):
        state = {p: {"momentum_buffer": buf} for p, buf in zip(params, buffers)}
        plan = make_plan(Plan, params)
        assert plan.gather([params], state)
        assert [row.phase for row in run(plan)] == [Phase.RUNNING] * 3


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
    """Layouts that do not fit the parameters in number or size are errors."""
    with pytest.raises(ValueError, match=rf"^StepPlan: {text}$"):
        Plan(params, layouts)


def test_a_plan_refuses_hyperparameters_of_a_group_it_has_not(Plan):
    """An index beyond the param groups is an IndexError."""
    with pytest.raises(IndexError):
        make_plan(Plan, []).set_hyperparameters(1, Hyperparameters(lr=0.1))


class Dispatching(torch.Tensor):
    """A class of tensors that fails on every operation on it."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} on the parameter's class")


def test_a_buffer_is_a_plain_tensor_whatever_the_parameters_class(Plan):
    """New buffers are made without any operation of the parameter's class."""
    p = torch.Tensor._make_subclass(Dispatching, torch.randn(4, 3).t())
    p.grad = torch.Tensor._make_subclass(Dispatching, torch.randn(4, 3).t())
    plan, state = make_plan(Plan, [p]), {}
    assert plan.gather([[p]], state)
    run(plan)
    buf = state[p]["momentum_buffer"]
    assert type(buf) is torch.Tensor and buf.stride() == (1, 3)


@pytest.mark.skipif("cpu" not in BUILT, reason="the extension is not built")
def test_the_cpu_executor_refuses_what_only_a_kernel_can_read():
    """An address in place of a learning rate is an error for the CPU executor, and nothing is written."""
    p = nn.Parameter(torch.ones(4, 3))
    p.grad = torch.ones(4, 3)
    plan = BUILT["cpu"].StepPlan([[p]], [[grouped_layout(p, "feature", None)]], "sgd", "cpu")
    lr = torch.tensor(0.1)
    plan.set_hyperparameters(0, Hyperparameters(lr=At(lr.data_ptr())))
    assert plan.gather([[p]], {})
    with pytest.raises(RuntimeError, match="cpu executor: expected numbers, got addresses"):
        plan.run()
    assert torch.equal(p, torch.ones(4, 3))


@pytest.mark.skipif("cpu" not in BUILT, reason="the extension is not built")
@pytest.mark.parametrize("phase", [-2, 4])
def test_an_executor_refuses_a_phase_that_is_none(phase):
    """Numbers just outside of Phase are errors, and nothing is written."""
    w = torch.ones(4, 3)
    executor = BUILT["cpu"].Executor("cpu", [w], [grouped_layout(w, "feature", None)], [0])
    with pytest.raises(ValueError, match=f"phase: expected one of Phase, got {phase}"):
        executor.step([Row(w.data_ptr(), phase=phase)], [Hyperparameters(lr=1.0, l1=0.5)])
    assert torch.equal(w, torch.ones(4, 3))


# Several executors in one optimizer


class Recorder(gathering.StepPlan):
    """A plan that logs what it is asked to do instead of stepping."""

    def __init__(self, executor, rule, params, layouts, specs, log):
        super().__init__(params, layouts, rule.name)
        self.executor, self.log = executor, log
        log.append((executor, "made"))

    def set_hyperparameters(self, group, hyperparameters):
        super().set_hyperparameters(group, hyperparameters)
        self.log.append((self.executor, "values", group, hyperparameters.lr))

    def run(self, grad_scale=None, found_inf=None):
        super().run(lambda table: self.log.append((self.executor, "runs", table[:, 0].tolist())))


@pytest.fixture
def log(monkeypatch):
    """The log of the plans of two made-up executors: "flat" serves groups of biases, "deep" the rest."""
    log = []
    monkeypatch.setattr(planner, "make_plan", lambda *args: Recorder(*args, log))
    monkeypatch.setattr(
        planner, "choose_backend", lambda backend, params, fused: "flat" if params[0].dim() < 2 else "deep"
    )
    return log


def two_executors():
    """An optimizer whose param groups alternate between the two executors."""
    params = parameters([(4, 3), (6,), (3, 2), (7,)])
    groups = [{"params": [p], "lr": i + 1.0} for i, p in enumerate(params)]
    return ProxSGD(groups, momentum=0.9), params


def runs_of(params):
    """The log's entries for a step that is run."""
    flat, deep = ([p.data_ptr() for p in params[i::2]] for i in (1, 0))
    return [("deep", "runs", deep), ("flat", "runs", flat)]


def test_each_executor_has_a_plan_of_its_own_groups(log):
    """Each plan gets its param groups' values and rows, and a changed value goes to its plan only."""
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
    """A fault in any param group stops all executors before anything is written, and no gradient is held."""
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
    """All plans are made anew before the first one runs."""
    optimizer, params = two_executors()
    optimizer.step()
    log.clear()
    params[3].data = params[3].data.clone()
    optimizer.step()
    assert [entry[1] for entry in log] == ["made"] * 2 + ["values"] * 4 + ["runs"] * 2
    assert log[-2:] == runs_of(params)


def test_a_plan_that_never_matches_is_an_error(log, monkeypatch):
    """A plan that does not fit even when it is new is an error instead of an endless loop."""
    optimizer, _ = two_executors()
    monkeypatch.setattr(Recorder, "gather", lambda plan, params, state: plan.executor != "flat")
    with pytest.raises(RuntimeError, match=r"expected parameters that stay in place .* moved twice"):
        optimizer.step()
    assert not any("runs" in entry for entry in log)
