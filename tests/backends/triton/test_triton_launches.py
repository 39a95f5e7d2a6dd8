"""The Triton executor's launches: their number, their arguments, and what later steps reuse of the first."""

import copy

import pytest
import torch
from helpers.right import MODES, fresh
from helpers.steps import assert_same_bits, everything, give_grads, parameters, train
from helpers.triton_launches import (
    BACKEND,
    MIXED,
    PENALTY,
    SPLIT,
    WHOLE,
    executor,
    needs_triton,
    optimizer_of,
    tables_of,
)

from cges_kernels import prox, prox_
from cges_kernels.backends import unplanned

pytestmark = needs_triton

# Launches


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("prox_mode", MODES)
def test_a_step_is_one_launch_per_dtype_and_path(launches, prox_mode):
    """Each dtype and each of two kernels takes one launch, whatever the param groups."""
    params = [
        *parameters(MIXED, torch.float32),
        *parameters([(5, 4)]),
        *parameters([(40, 3)], torch.bfloat16),
    ]
    groups = [{"params": params[::2], "freeze_zeros": "group"}, {"params": params[1::2], "momentum": 0}]
    optimizer = optimizer_of(groups, prox_mode=prox_mode, **PENALTY)
    expected = [(WHOLE, "fp32"), (SPLIT, "fp32"), (WHOLE, "fp64"), (SPLIT, "bf16")]
    for step in range(3):
        give_grads(params, step)
        params[step].grad = None
        optimizer.step()
        assert sorted((x.name, x.constants["STORED"].name) for x in launches) == sorted(expected)
        launches.clear()


def test_nothing_to_do_is_not_launched(launches):
    """Empty tensors and lists cause no launch."""
    empty = parameters([(0, 3), (0,)])
    train(optimizer_of(empty, **PENALTY), empty, range(2))
    with torch.no_grad():
        prox_(empty, **PENALTY, backend=BACKEND)
        prox_([], **PENALTY, backend=BACKEND)
    assert not launches


@pytest.mark.usefixtures("small_tiles")
def test_prox_in_place_is_one_launch_per_dtype_and_path(launches):
    """The same for prox_."""
    prox_([fresh(shape) for shape in MIXED], **PENALTY, prox_mode="exact", backend=BACKEND)
    assert sorted(x.name for x in launches) == [SPLIT, WHOLE]


@pytest.fixture
def built(monkeypatch):
    """The tables that are made during the test, beginning with none kept."""
    log, make = [], executor.DeviceTables._cut
    monkeypatch.setattr(
        executor.DeviceTables, "_cut", lambda tables, aligned: log.append(tables) or make(tables, aligned)
    )
    monkeypatch.setattr(unplanned, "_kept", type(unplanned._kept)())
    return log


@pytest.mark.usefixtures("small_tiles")
def test_prox_in_place_keeps_its_tables_for_lists_alike(built):
    """Tables are made once for each list of shapes, dtype and spec, and results stay right."""
    kinds = [
        ([(70, 6), (6, 8)], torch.float64, "feature"),
        ([(70, 6), (6, 8)], torch.float64, "filter"),
        ([(6, 8), (70, 6)], torch.float64, "feature"),
        ([(70, 6), (6, 8)], torch.float32, "feature"),
        ([(0, 3), (5,)], torch.float64, "feature"),
        ([(0, 3), (5,)], torch.float64, (0,)),
    ]
    for penalty in (PENALTY, PENALTY, dict(l1=0.1)):
        for shapes, dtype, group_by in kinds:
            options = dict(**penalty, group_by=group_by)
            tensors = [fresh(shape, dtype) for shape in shapes]
            expected = [prox(w, **options, backend="reference") for w in tensors]
            prox_(tensors, **options, backend=BACKEND)
            for got, right in zip(tensors, expected):
                torch.testing.assert_close(got, right)
                assert torch.equal(got == 0, right == 0)
        assert len(built) == len(kinds)


def test_prox_in_place_keeps_few_tables_and_none_that_failed(built, monkeypatch):
    """Few tables are kept, and only those that can be used again.

    The oldest is dropped at a limit. Tables serve one stream, and are dropped after a failed launch and after
    inference mode.
    """

    def call(n):
        prox_([fresh((n, 2))], **PENALTY, backend=BACKEND)

    for n in (*range(1, unplanned.MOST_KEPT + 1), 1, unplanned.MOST_KEPT + 1, 1):
        call(n)
    assert len(built) == unplanned.MOST_KEPT + 1
    call(2)  # was dropped when the last one was made
    assert len(built) == unplanned.MOST_KEPT + 2 and len(unplanned._kept) == unplanned.MOST_KEPT
    monkeypatch.setattr(unplanned, "stream_of", lambda device: "another")
    call(2)  # the same call on another stream
    assert len(built) == unplanned.MOST_KEPT + 3
    with monkeypatch.context() as patch:
        patch.setattr(executor, WHOLE, None)
        with pytest.raises(TypeError):
            call(2)
    call(2)
    assert len(built) == unplanned.MOST_KEPT + 4
    with torch.inference_mode():  # tensors made in inference mode cannot be used outside of it
        call(2)
    call(2)
    assert len(built) == unplanned.MOST_KEPT + 5


@pytest.mark.usefixtures("small_tiles")
def test_parameters_without_gradients_are_left_alone():
    """A step without gradients changes nothing and makes no state."""
    params = parameters(MIXED, torch.float32)
    optimizer = optimizer_of(params, **PENALTY)
    optimizer.step()
    assert_same_bits(params, parameters(MIXED, torch.float32))
    assert not any(optimizer.state.values())


CHANGES = [
    *(dict(lr=0.01), dict(momentum=0.9), dict(weight_decay=0.1), dict(nesterov=True), dict(maximize=True)),
    *(dict(group_lasso=0.1), dict(exclusive_lasso=0.1), dict(l1=0.1), dict.fromkeys(PENALTY, 0.0)),
    *(dict(nesterov=False, dampening=0.5), dict(momentum=0)),
]


def changing_steps(prox_mode):
    """Steps with a hyperparameter changed before each, while every tensor stays where it is."""
    params = parameters([(6, 5), (70, 5)], torch.float32)
    optimizer = optimizer_of(params, momentum=0, prox_mode=prox_mode)
    give_grads(params, 0)
    for change in [{}, *CHANGES]:
        optimizer.param_groups[0].update(change)
        optimizer.step()
        yield


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("prox_mode", MODES)
def test_changed_hyperparameters_change_no_constant(launches, prox_mode):
    """A new hyperparameter reaches the kernel through memory, not as a constant, which would compile anew."""
    for _ in changing_steps(prox_mode):
        pass
    for name in (WHOLE, SPLIT):
        kinds = [
            (x.grid, [a for a in x.args if not isinstance(a, torch.Tensor)], x.constants)
            for x in launches
            if x.name == name
        ]
        assert len(kinds) == len(CHANGES) + 1 and all(kind == kinds[0] for kind in kinds)


@pytest.mark.gpu
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("prox_mode", MODES)
def test_changed_hyperparameters_compile_nothing(monkeypatch, prox_mode):
    """On a GPU no kernel is compiled after the first step."""
    import triton

    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **job: compiled.append(job))
    steps = changing_steps(prox_mode)
    next(steps)
    compiled.clear()
    for _ in steps:
        assert not compiled


# Steps one after another


TOGGLES = [
    *({}, dict.fromkeys(PENALTY, 0.0), dict(PENALTY), dict(freeze_zeros="group")),
    *(dict(prox_mode="exact"), dict(exclusive_lasso=0.0), dict(freeze_zeros="element", exclusive_lasso=0.03)),
    *(dict(prox_mode="sequential", freeze_zeros=None), dict(momentum=0), dict(momentum=0.5, l1=0.0)),
]


@pytest.mark.usefixtures("small_tiles")
def test_whatever_is_toggled_between_steps_the_reference_agrees(launches):
    """Steps follow the reference through changes of mode, freezing, momentum and gradients.

    Groups are long and short, and all counters end at 0.
    """
    everyone = [parameters([(70, 5), (3, 90), (6, 5), (40,)]) for _ in range(2)]
    for params in everyone:
        params[0].data[:, 1] = params[1].data[1] = 0.0
    pair = []
    for params, backend in zip(everyone, (BACKEND, "reference")):
        groups = [{"params": params[::2]}, {"params": params[1::2], "group_by": "filter"}]
        pair.append(optimizer_of(groups, backend=backend, **PENALTY))
    for step, change in enumerate(TOGGLES):
        for params, optimizer in zip(everyone, pair):
            optimizer.param_groups[0].update(change)
            optimizer.param_groups[1].update(TOGGLES[step - 3])  # so that one launch has two modes
            give_grads(params, step)
            params[step % 5 % 4].grad = None
            optimizer.step()
        for got, expected in zip(*map(everything, pair)):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
            assert torch.equal(got == 0, expected == 0)
    assert len(launches) == 2 * len(TOGGLES)
    (tables,) = tables_of(pair[0])
    assert not tables.cut_tables.counters.any()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("prox_mode", MODES)
def test_buffers_replaced_by_a_checkpoint(prox_mode):
    """After load_state_dict steps go on with the loaded buffers."""
    params, others = (parameters([(70, 5), (6, 5)]) for _ in range(2))
    first, second = (optimizer_of(x, prox_mode=prox_mode, **PENALTY) for x in (params, others))
    train(first, params, range(2))
    train(second, others, range(5, 6))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for p, q in zip(params, others):
        q.data.copy_(p.data)
    train(first, params, range(2, 4))
    train(second, others, range(2, 4))
    assert_same_bits(everything(first), everything(second))


def elsewhere(x, offset):
    """A copy whose memory begins ``offset`` elements after a multiple of 16 bytes."""
    return torch.empty(x.numel() + offset, dtype=x.dtype)[offset:].view(x.shape).copy_(x)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("shape", [(70, 12), (12, 8), (3, 88)], ids=str)
def test_a_gradient_that_moves_is_cut_anew(launches, shape):
    """The width of accesses follows the gradient's alignment from step to step."""
    params, others = parameters([shape]), parameters([shape])
    optimizer, reference = (
        optimizer_of(params, **PENALTY),
        optimizer_of(others, backend="reference", **PENALTY),
    )
    for step, offset in enumerate((1, 0, 0, 3)):
        give_grads(params, step)
        give_grads(others, step)
        params[0].grad = elsewhere(params[0].grad, offset)
        optimizer.step()
        reference.step()
        torch.testing.assert_close(params[0], others[0], rtol=1e-12, atol=1e-12)
    assert [variant.vec for x in launches for variant in x.constants["VARIANTS"]] == [1, 2, 2, 1]


@pytest.mark.usefixtures("small_tiles")
def test_a_graph_keeps_its_tables_when_a_gradient_moves(monkeypatch):
    """Tables that a CUDA graph uses are neither changed nor dropped."""
    params = parameters([(70, 12)])
    optimizer = optimizer_of(params, **PENALTY)

    def step(offset, capturing):
        give_grads(params, 0)
        params[0].grad = elsewhere(params[0].grad, offset)
        monkeypatch.setattr(executor, "is_capturing", lambda: capturing)
        optimizer.step()
        (tables,) = tables_of(optimizer)
        return tables, tables.cut_tables

    step(0, False)
    tables, captured = step(0, True)
    rows = captured.tensors.clone()
    tables, other = step(1, False)
    assert other is not captured and tables.in_graphs == [captured] and torch.equal(captured.tensors, rows)
    step(1, True)
    assert tables.in_graphs == [captured, other] and torch.equal(captured.tensors, rows)
    with pytest.raises(RuntimeError, match="one captured graph per optimizer, got a second"):
        step(1, True)
