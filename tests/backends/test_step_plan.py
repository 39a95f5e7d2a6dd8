"""StepPlan, in C++ and in Python: what a step checks and gathers, and what it leaves behind.

A plan is made for lists of parameters. gather() compares them with those of a step and collects addresses;
run() hands the table to an executor.
"""

import pytest
import torch
from helpers.plans import is_alive, make_plan, memory, parameters, run, snapshot, watched
from torch import nn

from cges_kernels.core.hyperparameters import Hyperparameters, Phase
from cges_kernels.core.rules import ADAMW

# Whether the plan fits the step's parameters


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
    """gather() returns False after each change of the lists or of a parameter's memory, and makes no state.

    The first parameter's memory stays where it was, so that the address does not give the change away.
    """
    params = parameters()
    groups = [params[:2], params[2:]]
    plan, state = make_plan(Plan, *map(list, groups)), {}
    assert plan.gather(groups, state)
    place = params[0].data_ptr()
    change(groups)
    assert params[0].data_ptr() == place
    assert not plan.gather(groups, state)
    # the earlier gather is void as well
    with pytest.raises(RuntimeError, match="expected a gather that succeeded"):
        run(plan)
    assert not state


def test_gather_knows_the_parameters_and_not_the_lists(Plan):
    """Other lists of the same parameters fit the plan."""
    params = parameters()
    plan = make_plan(Plan, params[:2], [], params[2:])
    assert plan.gather([list(params[:2]), [], list(params[2:])], {})


def test_run_needs_a_gather_each_time(Plan):
    """A gather serves one run only."""
    params = parameters()
    plan = make_plan(Plan, params)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"StepPlan\.run: expected a gather .*, got none"):
            run(plan)
        assert plan.gather([params], {})
        run(plan)


# The table


def test_table_has_a_row_per_parameter_group_by_group(Plan):
    """Rows hold addresses and the phase of the states: without one, skipped, first, or running."""
    plain, momentum = parameters(), parameters()
    plan, state = make_plan(Plan, plain, [], momentum), {}
    plan.set_hyperparameters(0, Hyperparameters(lr=0.1))
    plain[1].grad = momentum[2].grad = None
    state[momentum[0]] = {"momentum_buffer": torch.randn(4, 3)}
    state[momentum[1]] = {"momentum_buffer": None}
    buf = state[plain[0]] = {"momentum_buffer": torch.randn(4, 3)}
    assert plan.gather([plain, [], momentum], state)
    table = run(plan)
    assert [row.w for row in table] == [p.data_ptr() for p in plain + momentum]
    assert [row.grad for row in table] == [
        0 if p.grad is None else p.grad.data_ptr() for p in plain + momentum
    ]
    assert [row.phase for row in table] == [
        *(Phase.STATELESS, Phase.SKIPPED, Phase.STATELESS, Phase.STATELESS),
        *(Phase.RUNNING, Phase.FIRST, Phase.SKIPPED, Phase.FIRST),
    ]
    buffers = [state[p]["momentum_buffer"].data_ptr() if p in state else 0 for p in momentum]
    assert [row.state_0 for row in table] == [0, 0, 0, 0, *buffers] and buffers[2] == 0
    assert plain[2] not in state and state[plain[0]] is buf

    momentum[2].grad = torch.ones(6)
    assert plan.gather([plain, [], momentum], state)
    assert [row.phase for row in run(plan)[4:]] == [Phase.RUNNING, Phase.RUNNING, Phase.FIRST, Phase.RUNNING]


def test_empty_plans_have_an_empty_table(Plan):
    """Plans without parameters can be gathered and run."""
    for groups in ([], [[], []]):
        plan = make_plan(Plan, *groups)
        assert plan.gather(groups, {})
        assert run(plan) == []


def test_what_lies_otherwise_is_copied_into_the_order_of_the_parameter(Plan):
    """Gradients and buffers reach the executor in the parameter's layout.

    Here they have other strides or a pending minus sign.

    Buffers are replaced by the copy for good, and are not copied again.
    """
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
        for _, g, b, _, phase, *_ in table.tolist():
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
    assert [row.state_0 for row in run(plan)] == [b.data_ptr() for b in before]
    assert all(state[p]["momentum_buffer"] is b for p, b in zip(params, before))


def test_strides_that_move_nothing_are_no_reason_to_copy(Plan):
    """Strides of dims of size 1 do not matter."""
    params = parameters([(5, 1), (0, 3)])
    p = params[0]
    p.grad = torch.randn(1, 5).t()
    assert p.grad.stride() != p.stride()
    plan = make_plan(Plan, params)
    assert plan.gather([params], {})
    assert run(plan)[0][1] == p.grad.data_ptr()


# What a step leaves behind


def test_fresh_buffers_appear_with_the_run(Plan):
    """New momentum buffers get into the state by run(), not by gather(), with the parameter's layout."""
    params = parameters()
    params[1].data = params[1].data.to(memory_format=torch.channels_last)
    plan, state = make_plan(Plan, params), {}
    assert plan.gather([params], state)
    assert not state
    addresses = [row.state_0 for row in run(plan)]
    assert list(state) == params
    for p, address in zip(params, addresses):
        (buf,) = state[p].values()
        assert type(buf) is torch.Tensor and not buf.requires_grad
        assert (buf.shape, buf.stride(), buf.dtype) == (p.shape, p.stride(), p.dtype)
        assert buf.data_ptr() == address


def test_an_entry_of_the_state_is_kept(Plan):
    """A state entry with keys of the caller's own is filled, not replaced."""
    p, *_ = params = parameters()
    entry = {"mine": 3}
    plan, state = make_plan(Plan, params), {p: entry}
    assert plan.gather([params], state)
    run(plan)
    assert state[p] is entry and list(entry) == ["mine", "momentum_buffer"]


def test_versions_move_with_the_run(Plan):
    """Versions of stepped parameters and buffers are bumped by run(), not by gather()."""
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
    """Such parameters can be stepped."""
    with torch.inference_mode():
        p = torch.ones(3)
        p.grad = torch.ones(3)
        plan, state = make_plan(Plan, [p]), {}
        for _ in range(2):
            assert plan.gather([[p]], state)
            run(plan)


def test_a_launch_that_raises_leaves_everything_alone(Plan):
    """An error in run() changes no state and no version, voids the gather, and keeps no gradient."""
    params = parameters()
    plan, state = make_plan(Plan, params), {params[0]: {"momentum_buffer": torch.ones(4, 3)}}
    before = snapshot(params, state)
    watch = watched(params[1])
    assert plan.gather([params], state)

    def fail(table):
        raise ZeroDivisionError("no device")

    try:  # pytest.raises would keep the traceback, and its frames would keep the gradient
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
    """Ends a gather by a run."""
    run(plan)


def void(plan, params, state):
    """Ends a gather by another one whose parameters do not fit the plan."""
    assert not plan.gather([params[1:]], state)


def refused(plan, params, state):
    """Ends a gather by another one that raises an error."""
    params[3].grad = params[3].grad.to_sparse()
    try:
        plan.gather([params], state)
    except RuntimeError as error:
        assert "dense" in str(error)


@pytest.mark.parametrize("end", [stepped, void, refused])
def test_no_gradient_is_kept_alive(Plan, end):
    """However a gather ends, the plan holds no gradient afterwards: its memory can be freed."""
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


# A rule of two states that counts steps


def test_a_plan_of_adamw_keeps_both_moments_and_counts(Plan):
    """Rows hold both moments' addresses and the parameter's own count, and the state has torch's keys."""
    params = parameters()
    plan, state = make_plan(Plan, params, rule=ADAMW), {}
    params[1].grad = None
    for step in range(3):
        if step == 1:
            params[1].grad = torch.ones_like(params[1])
        assert plan.gather([params], state)
        rows = run(plan)
        assert [row.steps for row in rows] == [step + 1, step, *[step + 1] * 2]
        phases = [Phase.RUNNING if row.steps > 1 else Phase.FIRST for row in rows]
        phases[1] = Phase.SKIPPED if step == 0 else phases[1]
        assert [row.phase for row in rows] == phases
        for p, row in zip(params, rows):
            kept = [state.get(p, {}).get(key) for key in ADAMW.states]
            assert [0 if x is None else x.data_ptr() for x in kept] == [row.state_0, row.state_1]
            assert row.steps_address == 0
    assert [float(state[p]["step"]) for p in params] == [3, 2, 3, 3]
    assert list(state[params[0]]) == ["step", *ADAMW.states]


def test_a_step_that_overflows_is_not_counted(Plan):
    """A run with found_inf set does not count."""
    params = parameters()
    plan, state = make_plan(Plan, params, rule=ADAMW), {}
    for found_inf in (1.0, 0.0, 1.0):
        assert plan.gather([params], state)
        plan.run(lambda table: None, found_inf=torch.tensor(found_inf))
    assert [float(state[p]["step"]) for p in params] == [1.0] * len(params)
