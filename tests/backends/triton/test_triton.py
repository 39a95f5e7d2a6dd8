"""What is particular to the Triton executor: launches, tickets, windows, alignment, and when it can serve."""

import copy
import inspect
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.programs import ROOT, run_python
from helpers.right import DTYPES, INTERPRETED, check_step, fresh
from helpers.steps import assert_same_bits, everything, give_grads, parameters, train
from torch import nn

from cges_kernels import ProxSGD, available_backends, prox, prox_
from cges_kernels.backends import registry, unplanned
from cges_kernels.backends.extension import BUILT
from cges_kernels.core.groups import Layout

tl = pytest.importorskip("triton.language")  # the interpreter looks for it here
executor = pytest.importorskip("cges_kernels.backends.triton.executor")
split = pytest.importorskip("cges_kernels.backends.triton.split")
tiles = pytest.importorskip("cges_kernels.backends.triton.tiles")

BACKEND = "triton"
pytestmark = pytest.mark.skipif(BACKEND not in available_backends(), reason="no GPU, no interpreter")
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="for the interpreter")

WHOLE, SPLIT = "whole_groups", "split_groups"
MODES = ("sequential", "exact")
PENALTY = dict(group_lasso=0.2, exclusive_lasso=0.01, l1=0.05)
MIXED = [(6, 5), (70, 5), (9,), (0, 3), (40, 20), (3, 90), (4, 3, 3, 3)]  # groups that fit SMALL, and longer


def optimizer_of(params, **options):
    return ProxSGD(params, **{"lr": 0.3, "momentum": 0.9, "backend": BACKEND, **options})


def steps_of(params, steps=2, **options):
    """All that a few steps leave behind."""
    optimizer = optimizer_of(params, **options)
    train(optimizer, params, range(steps))
    return everything(optimizer)


def tables_of(optimizer):
    return [tables for _, tables in optimizer._planner.plans[BACKEND]._executor.tables]


class Noted:
    """A kernel whose launches are written down."""

    def __init__(self, name, log):
        self.name, self.kernel, self.log = name, getattr(executor, name), log

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.log.append(SimpleNamespace(name=self.name, grid=grid, args=args, constants=constants))
            return self.kernel[grid](*args, **constants)

        return launch


@pytest.fixture
def launches(monkeypatch):
    log = []
    for name in (WHOLE, SPLIT):
        monkeypatch.setattr(executor, name, Noted(name, log))
    return log


@pytest.fixture
def small_tiles(monkeypatch):
    """Groups of up to 32 fit a tile; longer ones come in chunks of 32."""
    unplanned.forget()  # what is kept was cut otherwise
    for kind in (tiles.COLUMNS, tiles.ROWS, tiles.GENERAL):
        monkeypatch.setitem(tiles.TILES, kind.value, (tiles.Tile(32, 32, 16), tiles.Tile(0, 32, 16)))
    yield
    unplanned.forget()


# Launches


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("prox_mode", MODES)
def test_a_step_is_one_launch_per_dtype_and_path(launches, prox_mode):
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
    empty = parameters([(0, 3), (0,)])
    train(optimizer_of(empty, **PENALTY), empty, range(2))
    with torch.no_grad():
        prox_(empty, **PENALTY, backend=BACKEND)
        prox_([], **PENALTY, backend=BACKEND)
    assert not launches


@pytest.mark.usefixtures("small_tiles")
def test_prox_in_place_is_one_launch_per_dtype_and_path(launches):
    prox_([fresh(shape) for shape in MIXED], **PENALTY, prox_mode="exact", backend=BACKEND)
    assert sorted(x.name for x in launches) == [SPLIT, WHOLE]


@pytest.fixture
def built(monkeypatch):
    """Those whose tables are made, prox_ having kept none so far."""
    log, make = [], executor.DeviceTables._cut
    monkeypatch.setattr(
        executor.DeviceTables, "_cut", lambda tables, aligned: log.append(tables) or make(tables, aligned)
    )
    monkeypatch.setattr(unplanned, "_kept", type(unplanned._kept)())
    return log


@pytest.mark.usefixtures("small_tiles")
def test_prox_in_place_keeps_its_tables_for_lists_alike(built):
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
    def call(n):
        prox_([fresh((n, 2))], **PENALTY, backend=BACKEND)

    for n in (*range(1, unplanned.MOST_KEPT + 1), 1, unplanned.MOST_KEPT + 1, 1):
        call(n)
    assert len(built) == unplanned.MOST_KEPT + 1
    call(2)  # went when the last came
    assert len(built) == unplanned.MOST_KEPT + 2 and len(unplanned._kept) == unplanned.MOST_KEPT
    monkeypatch.setattr(unplanned, "stream_of", lambda device: "another")
    call(2)  # on another stream
    assert len(built) == unplanned.MOST_KEPT + 3
    with monkeypatch.context() as patch:
        patch.setattr(executor, WHOLE, None)
        with pytest.raises(TypeError):
            call(2)
    call(2)
    assert len(built) == unplanned.MOST_KEPT + 4
    with torch.inference_mode():  # its tensors are of no use outside
        call(2)
    call(2)
    assert len(built) == unplanned.MOST_KEPT + 5


@pytest.mark.usefixtures("small_tiles")
def test_parameters_without_gradients_are_left_alone():
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
    """Steps with a hyperparameter changed before each; every tensor stays where it is."""
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
    import triton

    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **job: compiled.append(job))
    steps = changing_steps(prox_mode)
    next(steps)
    compiled.clear()
    for _ in steps:
        assert not compiled


# Steps after one another


TOGGLES = [
    *({}, dict.fromkeys(PENALTY, 0.0), dict(PENALTY), dict(freeze_zeros="group")),
    *(dict(prox_mode="exact"), dict(exclusive_lasso=0.0), dict(freeze_zeros="element", exclusive_lasso=0.03)),
    *(dict(prox_mode="sequential", freeze_zeros=None), dict(momentum=0), dict(momentum=0.5, l1=0.0)),
]


@pytest.mark.usefixtures("small_tiles")
def test_whatever_is_toggled_between_steps_the_reference_agrees(launches):
    """Long groups and short; gradients come and go, in new memory; a zero group comes to life."""
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
            optimizer.param_groups[1].update(TOGGLES[step - 3])  # another mode in the same launch
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


# Bits


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("prox_mode", "dtype"), [("sequential", torch.bfloat16), ("exact", torch.float32)], ids=str
)
def test_bits_depend_neither_on_the_neighbours_nor_on_the_run(prox_mode, dtype):
    options = dict(prox_mode=prox_mode, **PENALTY)
    together = steps_of(parameters(MIXED, dtype), **options)
    assert_same_bits(together, steps_of(parameters(MIXED, dtype), **options))
    params, order = parameters(MIXED, dtype), (4, 0, 6, 2, 5, 3, 1)
    optimizer = optimizer_of([params[i] for i in order], **options)
    for step in range(2):
        give_grads(params, step)
        optimizer.step()
    assert_same_bits(together[: len(MIXED)], params)
    for i in (0, 1):
        params = parameters(MIXED, dtype)
        optimizer = optimizer_of([params[i]], **options)
        for step in range(2):
            give_grads(params, step)
            optimizer.step()
        assert_same_bits([together[i]], [params[i]])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("prox_mode", MODES)
def test_several_windows_give_the_same_bits_as_one(launches, monkeypatch, prox_mode):
    results = []
    for l2_bytes in (2**30, 1):
        monkeypatch.setattr(executor, "_l2_bytes", lambda device, size=l2_bytes: size)
        results.append(steps_of(parameters(MIXED, torch.float32), prox_mode=prox_mode, **PENALTY))
    assert_same_bits(*results)
    one, several = ({len(x.args[0]) // x.args[8] for x in launches[i:] if x.name == SPLIT} for i in (0, 4))
    assert one == {1, *several} and min(several) >= 3


@pytest.mark.usefixtures("small_tiles")
def test_the_plan_in_python_gives_the_same_bits(monkeypatch):
    if "cpu" not in BUILT:
        pytest.skip("the C++ extension is not built")
    results = [steps_of(parameters(MIXED, torch.float32), **PENALTY)]
    monkeypatch.delitem(BUILT, "cpu")
    results.append(steps_of(parameters(MIXED, torch.float32), **PENALTY))
    assert_same_bits(*results)


@pytest.mark.usefixtures("small_tiles")
def test_everything_differs_in_one_optimizer():
    """Specs, modes, freezing, momentum and dtypes side by side give what each alone gives."""
    kinds = [
        dict(group_by="filter", prox_mode="exact", **PENALTY),
        dict(group_by="tensor", freeze_zeros="group", momentum=0, group_lasso=0.5),
        dict(group_by="channel", freeze_zeros="element", nesterov=True, weight_decay=0.1, l1=0.1),
        dict(maximize=True, dampening=0.5),
        dict(group_by=(1,), view=(4, 10, 6), prox_mode="exact", exclusive_lasso=0.1),
    ]

    def made():
        params = [parameters([(40, 6), (12, 20)], dtype, seed=i) for i, dtype in enumerate(DTYPES)]
        params.append(parameters([(20, 12)], seed=9))
        for p in params[1] + params[2]:
            p.data[:, 1::2] = 0.0
        return params

    everyone = made()
    optimizer = optimizer_of([{"params": params, **kind} for params, kind in zip(everyone, kinds)])
    for step in range(2):
        for params in everyone:
            give_grads(params, step)
        optimizer.step()
    for together, params, kind in zip(everyone, made(), kinds):
        alone = steps_of(params, **kind)
        buffers = [optimizer.state[p].get("momentum_buffer") for p in together]
        assert_same_bits([*together, *(buf for buf in buffers if buf is not None)], alone)
        assert not all(torch.equal(p, q) for p, q in zip(together, made()[0]))


# Programs at the same time


@pytest.fixture
def three_at_once(monkeypatch):
    """Runs the programs of split_groups three at a time.

    The ``late``-th that comes to wait for others sleeps until all of them are done, or for half a second.
    """
    from triton.runtime.interpreter import InterpretedFunction

    kernel, wait_for = executor.split_groups, split.wait_for
    program = kernel.rewrite()

    def set_up(tickets, late):
        todo, waits, ends = (iter(range(tickets)) for _ in range(3))
        others_are_done = threading.Event()

        def wait_late(count, at_least):
            if next(waits) == late:
                others_are_done.wait(timeout=0.5)
            return wait_for(count, at_least)

        @np.errstate(all="ignore")
        def work(args):
            for _ in todo:
                program(**args)
                if next(ends) == tickets - 2:
                    others_are_done.set()

        def run(**args):  # is called for each program; the first call runs them all
            threads = [threading.Thread(target=work, args=[args], daemon=True) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(timeout=10)
            assert not any(thread.is_alive() for thread in threads), "a program waits in vain"

        run.__signature__, run.__module__ = inspect.signature(program), program.__module__
        run.__annotations__ = program.__annotations__
        monkeypatch.setattr(split, "wait_for", wait_late)
        monkeypatch.setitem(InterpretedFunction.rewritten_fn, kernel.fn, run)

    return set_up


@needs_interpreter
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("prox_mode", "late"), [("sequential", 1), ("sequential", 4), *(("exact", n) for n in (1, 4, 40, 73))]
)
def test_programs_may_be_late(three_at_once, prox_mode, late):
    """Also one that has nothing to do, its panel's search having ended before its sweep."""
    w, options = fresh((70, 5)), dict(prox_mode=prox_mode, backend=BACKEND, **PENALTY)
    expected = prox(w, **options)
    three_at_once(tickets=3 * (25 if prox_mode == "exact" else 2), late=late)
    assert torch.equal(prox(w, **options), expected)


# How tensors are cut

ALIGNED = [
    (Layout(1, 64, 48, 1), torch.float32, tiles.COLUMNS, 4),
    (Layout(1, 64, 50, 1), torch.float32, tiles.COLUMNS, 1),
    (Layout(1, 64, 50, 1), torch.float64, tiles.COLUMNS, 2),
    (Layout(1, 64, 48, 1), torch.bfloat16, tiles.COLUMNS, 8),
    (Layout(1, 64, 44, 1), torch.float16, tiles.COLUMNS, 1),
    (Layout(3, 5, 16, 1), torch.float32, tiles.COLUMNS, 4),
    (Layout(1, 1, 10, 72), torch.float32, tiles.ROWS, 4),
    (Layout(1, 1, 10, 70), torch.float32, tiles.ROWS, 1),
    (Layout(3, 5, 12, 1), torch.float32, tiles.GENERAL, 1),
    (Layout(1, 16, 16, 16), torch.float32, tiles.GENERAL, 1),
]


@pytest.mark.parametrize(("layout", "dtype", "kind", "vec"), ALIGNED, ids=str)
def test_accesses_are_16_bytes_where_every_row_begins_on_16(layout, dtype, kind, vec):
    for aligned in (True, False):
        variant = tiles.cut(layout, True, dtype, aligned).variant
        assert (variant.kind, variant.vec) == (kind.value, vec if aligned else 1)


WIDE = [
    (Layout(1, 1 << 40, 64, 1), False),  # chunks are addressed from where they begin
    (Layout(1, 5, 1 << 27, 1), False),
    (Layout(1, 8, 1 << 28, 1), True),
    (Layout(1, 1, 1 << 40, 64), False),
    (Layout(1, 1, 1 << 10, 1 << 30), False),
    (Layout(1, 1, 2, 1 << 31), True),
    (Layout(1, 1 << 10, 1 << 10, (1 << 11) - 1), False),  # by division, from the tensor's first element
    (Layout(1, 1 << 10, 1 << 10, 1 << 11), True),
]


@pytest.mark.parametrize(("layout", "wide"), WIDE, ids=str)
def test_offsets_beyond_32_bits_are_wide(monkeypatch, layout, wide):
    monkeypatch.setattr(
        tiles, "np", SimpleNamespace(arange=lambda *args: np.zeros(1))
    )  # of 2**40 panels, one
    _, _, red, keep, _, got = tiles.cut(layout, True, torch.float32, True).variant
    furthest = layout.group_size * layout.num_groups - 1
    if layout.R1 == 1:
        furthest = min(furthest, (keep - 1) * layout.R2 + red - 1)
    elif layout.R2 == 1:
        furthest = min(furthest, (red - 1) * layout.K2 + keep - 1)
    assert got == wide and (got or furthest < 2**31)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("group_by", ["feature", "filter", "channel"])
def test_wide_offsets_give_the_same_bits(monkeypatch, group_by):
    shapes = [(70, 12), (5, 7, 11), (6, 40)]
    expected = steps_of(parameters(shapes, torch.float32), group_by=group_by, **PENALTY)

    def wide(*args):
        cut = tiles.cut(*args)
        return cut._replace(variant=cut.variant._replace(wide=True))

    monkeypatch.setattr(executor, "cut", wide)
    assert_same_bits(expected, steps_of(parameters(shapes, torch.float32), group_by=group_by, **PENALTY))


# When it can serve

TOO_OLD = [("3.5.1", r"triton >= 3\.6 is needed, found 3\.5\.1"), ("2.3", r"triton >= 3\.6 .* found 2\.3")]


def refused(match):
    """Asked for, and only then, it says why it cannot serve."""
    params = [nn.Parameter(torch.ones(4, 3, device="cpu"))]
    assert BACKEND not in available_backends()
    ProxSGD(params)
    prox(params[0].detach(), l1=0.1)
    for call in (
        lambda: ProxSGD(params, backend=BACKEND),
        lambda: prox(params[0].detach(), l1=0.1, backend=BACKEND),
        lambda: prox_([], l1=0.1, backend=BACKEND),
    ):
        with pytest.raises(RuntimeError, match=rf"backend='triton' cannot serve: .*{match}"):
            call()


def test_refused_without_triton(monkeypatch):
    monkeypatch.setattr(registry, "util", SimpleNamespace(find_spec=lambda name: None))
    refused(r"triton >= 3\.6 is needed and not installed; pip install triton")


@pytest.mark.parametrize(("version", "match"), TOO_OLD)
def test_refused_where_triton_is_too_old(monkeypatch, version, match):
    monkeypatch.setattr(registry.metadata, "version", lambda name: version)
    refused(match)


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0", "4.0+rocm"])
def test_versions_that_serve(monkeypatch, version):
    monkeypatch.setattr(registry.metadata, "version", lambda name: version)
    assert BACKEND in available_backends()


def test_refused_without_a_gpu(monkeypatch):
    monkeypatch.setattr(registry, "triton_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    refused("no GPU that Triton compiles for is here; TRITON_INTERPRET=1")


def test_tensors_elsewhere_are_refused(monkeypatch):
    monkeypatch.setattr(registry, "triton_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    w = torch.ones(4, 3, device="cpu")
    for call in (
        lambda: ProxSGD([nn.Parameter(w)], backend=BACKEND),
        lambda: prox(w, l1=0.1, backend=BACKEND),
        lambda: prox_([w], l1=0.1, backend=BACKEND),
    ):
        with pytest.raises(RuntimeError, match="triton: it serves tensors on cuda or xpu, got one on cpu"):
            call()
    assert torch.equal(w, torch.ones(4, 3, device="cpu"))


def test_all_else_works_without_triton():
    run_python(
        "import sys, torch\n"
        "sys.modules['triton'] = None\n"
        "import cges_kernels as k\n"
        "assert 'triton' not in k.available_backends()\n"
        "p = torch.nn.Parameter(torch.ones(3, 2))\n"
        "k.ProxSGD([p], group_lasso=0.1)\n"
        "assert k.prox(p.detach(), l1=0.5).sum() == 3\n"
        "try:\n"
        "    k.ProxSGD([p], backend='triton')\n"
        "except RuntimeError as error:\n"
        "    assert 'triton >= 3.6 is needed' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('no error')\n",
        cwd=ROOT,
    )


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("prox_mode", MODES)
def test_with_cpu_as_default_device(prox_mode):
    """Whatever is made for the step is put where its tensors are."""
    with torch.device("cpu"):
        for shape in ((64, 48), (17000, 19)):
            check_step(
                BACKEND,
                *(fresh(shape) for _ in range(3)),
                lr=0.5,
                momentum=0.9,
                prox_mode=prox_mode,
                **PENALTY,
            )


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 2**30), (2**20 + 1, 2048), (1, 2**31 + 8)], ids=str)
def test_more_than_2_31_elements(shape):
    w = torch.randn(shape, dtype=torch.bfloat16)
    columns = torch.randint(shape[1], (50,))
    before = w[:, columns].clone()
    prox_([w], group_lasso=0.5, l1=0.1, backend=BACKEND)
    expected = prox(before, group_lasso=0.5, l1=0.1, backend="reference")
    torch.testing.assert_close(w[:, columns], expected, rtol=2**-7, atol=0)
