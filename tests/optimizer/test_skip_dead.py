"""skip_dead: groups that are held at zero are skipped, and no bit of the result depends on it.

The CPU and the CUDA executor keep lists of held groups, and have to drop them whenever something else may
have written to these. What concerns the CUDA executor alone is tested in test_cuda_skip_dead.py.
"""

import copy
import itertools
import pickle

import pytest
import torch
from helpers.right import DTYPES, MODES
from helpers.tiers import TILES, covering, each_value
from helpers.twins import DEAD, DYING, EXECUTORS, LIVE, RULES, SHAPE, Twins

from cges_kernels import ProxSGD, prune_to_density

pytestmark = pytest.mark.skipif("cpu" not in EXECUTORS, reason="the CPU executor is not built")

# The CPU executor cuts the longest of these rows into pieces; the CUDA executor has no list for rows so long.
LONG = {"cpu": (37, 5000), "cuda": (37, 500)}


@covering(rule=RULES, dtype=DTYPES, mode=MODES, count=[1, 2, 9])
def test_no_bit_tells_of_it(threads, rule, dtype, mode, count):
    """Both give the same bits for any number of threads, and dead rows are really skipped."""
    threads(count)
    kind, options = RULES[rule]
    for executor in EXECUTORS:
        for shape in (SHAPE, (40, 256), LONG[executor], (8, 10, 7, 7)):
            twins = Twins(executor, kind, shape, dtype, prox_mode=mode, **options)
            twins.step(12, of_dead=float("nan"))
            p = twins.weights[0]
            assert not p[DEAD].any() and p[LIVE].any() and (rule == "adamw" or not p[DYING].any())
            assert twins.skip()


@pytest.mark.usefixtures("tiles")
@each_value(tiles=TILES, mode=MODES, dtype=[torch.float32, torch.float16])
def test_groups_that_go_in_pieces(mode, dtype):
    """The same for groups so large that they are cut into pieces."""
    twins = Twins("cpu", shape=(7, 70_000), dtype=dtype, prox_mode=mode, momentum=0.9)
    twins.step(4, of_dead=float("nan"))
    assert twins.skip()


def test_few_dead_elements_are_stepped_with_the_others():
    """On the CPU, gaps of few dead elements are stepped with the rest: that costs less than another tile."""
    twins = Twins("cpu", shape=(400, 17), momentum=0.9, group_lasso=0.3)
    twins.step(3, of_dead=float("nan"))
    assert not twins.skip()


def test_short_groups_are_skipped_with_their_neighbours():
    """Groups that are solved side by side are skipped where many neighbours are dead."""
    for size, mode in itertools.product((2, 9, 17, 64), MODES):
        twins = Twins("cpu", shape=(900, size), momentum=0.9, group_lasso=0.3, prox_mode=mode)
        twins.each(lambda p, optimizer: p.data[301:600].zero_())
        twins.step(4, of_dead=float("nan"))
        p, optimizer = twins.weights[0], twins.optimizers[0]
        p.data[[301, 599]] = 1.0
        optimizer.step()
        assert (p[[301, 599]] == 1.0).all() and (p[302:599] == 0).all() and p[300].any() and p[600].any()


def test_channels_last():
    """Groups are found in the memory order of channels_last."""
    for executor in EXECUTORS:
        twins = Twins(executor, momentum=0.9)
        for p, optimizer in zip(twins.weights, twins.optimizers):
            p.data = p.data.view(40, 12, 5, 5).to(memory_format=torch.channels_last)
            optimizer.refresh()
        twins.step(4)
        assert twins.skip()


def test_a_copy_looks_for_itself():
    """A deep copy or an unpickled optimizer does not take over the list of held groups."""
    for executor in EXECUTORS:
        twins = Twins(executor, momentum=0.9)
        twins.step(3)
        for travel in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
            twins.optimizers = [travel(optimizer) for optimizer in twins.optimizers]
            twins.weights = [optimizer.param_groups[0]["params"][0] for optimizer in twins.optimizers]
            twins.each(in_place)
            twins.step(3)
            with torch.no_grad():
                twins.each(lambda p, optimizer: p[DEAD].zero_())
            twins.step(3)
        assert twins.skip()


def test_compiled_steps_between():
    """A compiled step between plain ones does not make the list wrong."""
    for executor in EXECUTORS:
        twins = Twins(executor, momentum=0.9)
        twins.step(3)
        for optimizer in twins.optimizers:
            torch.compile(optimizer.step, backend="eager")()
        twins.check()
        twins.step(2)


def in_place(p, optimizer):
    """Ways to write to a dead row, or to its buffer, between steps; this one is in place."""
    with torch.no_grad():
        p[DEAD] = 1.0


def in_its_buffer(p, optimizer):
    optimizer.state[p]["momentum_buffer"][DEAD] = 1.0


def by_another_buffer(p, optimizer):
    optimizer.state[p]["momentum_buffer"] = torch.ones_like(p)


def behind_its_back(p, optimizer):
    """Through .data, which bumps no version, and so with refresh()."""
    p.data[DEAD] = 1.0
    optimizer.refresh()


def by_other_memory(p, optimizer):
    p.data = torch.ones_like(p)


def by_other_memory_of_a_buffer(p, optimizer):
    optimizer.state[p]["momentum_buffer"].data = torch.ones_like(p)


def by_a_checkpoint(p, optimizer):
    saved = optimizer.state_dict()
    saved["state"][0]["momentum_buffer"][DEAD] = 1.0
    with torch.no_grad():
        p[DEAD] = 1.0
    optimizer.load_state_dict(saved)


def by_a_checkpoint_of_what_the_buffer_was(p, optimizer):
    """Changes the buffer by a checkpoint that holds another one."""
    saved = optimizer.state_dict()
    saved["state"][0] = {"momentum_buffer": torch.ones_like(p)}
    optimizer.load_state_dict(saved)


def by_pruning(p, optimizer):
    """Writes zeros and momenta by prune_to_density."""
    model = torch.nn.Linear(p.shape[1], p.shape[0], bias=False)
    model.weight = p
    prune_to_density(model, 0.2, optimizer=optimizer, freeze_zeros="group")


def without_holding_zeros(p, optimizer):
    """Makes steps in which freeze_zeros is off or another mode."""
    for mode in (None, "element", "group"):
        optimizer.param_groups[0]["freeze_zeros"] = mode
        p.grad = torch.ones_like(p)
        optimizer.step()


def without_momentum(p, optimizer):
    """Makes steps without momentum: rows that die in them keep the momentum that they had."""
    optimizer.param_groups[0].update(momentum=0.0, group_lasso=400.0)
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    optimizer.param_groups[0].update(momentum=0.9, group_lasso=2.0)


@pytest.mark.parametrize(
    "write",
    [
        *(in_place, in_its_buffer, by_another_buffer, behind_its_back, by_other_memory),
        *(by_other_memory_of_a_buffer, by_a_checkpoint),
        *(by_a_checkpoint_of_what_the_buffer_was, by_pruning, without_holding_zeros, without_momentum),
    ],
)
def test_what_is_written_meanwhile_is_noticed(write):
    """After each way of writing, the next step is that of an optimizer that never skipped."""
    for executor in EXECUTORS:
        twins = Twins(executor, momentum=0.9)
        twins.step(3)
        before = twins.optimizers[0].state[twins.weights[0]]["momentum_buffer"].clone()
        twins.each(write)
        twins.step(1)
        after = twins.optimizers[0].state[twins.weights[0]]["momentum_buffer"]
        assert not torch.equal(before, after)
        twins.step(2)


def test_a_step_that_overflows_changes_nothing_and_forgets_nothing():
    """An overflow leaves weights as they are, and dead rows are still skipped afterwards."""
    for executor in EXECUTORS:
        twins = Twins(executor, momentum=0.9)
        twins.step(3)
        for overflow in (1.0, 0.0):
            scale_loss(twins, overflow)
            twins.step(2)
        assert twins.skip()


def test_what_is_written_before_a_step_that_overflows_is_noticed():
    """Also by the step after, although the host of a GPU does not know that nothing was stepped."""
    for executor, write in itertools.product(EXECUTORS, (in_place, in_its_buffer)):
        twins = Twins(executor, momentum=0.9)
        twins.step(3)
        twins.each(write)
        for overflow in (1.0, 1.0, 0.0):
            scale_loss(twins, overflow)
            twins.step(1)
        assert twins.weights[0][DEAD].any() == (write is in_place)
        twins.step(2)


def scale_loss(twins, overflow):
    """Leaves on both what torch.amp.GradScaler does."""
    for p, optimizer in zip(twins.weights, twins.optimizers):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor([2.0, overflow], device=p.device)


def test_groups_without_a_list_are_stepped_as_ever():
    """Columns, groups too long for lists, single elements and biases are all stepped."""
    shapes = [((30, 40), "feature"), ((40, 1), "filter"), ((50,), "filter"), ((8, 9000), "filter")]
    for executor, (shape, spec) in itertools.product(EXECUTORS, shapes):
        twins = Twins(executor, shape=shape, group_by=spec, momentum=0.9, group_lasso=0.1)
        twins.step(4)


def test_a_text_is_no_flag():
    """skip_dead="yes" is a TypeError."""
    with pytest.raises(TypeError, match="skip_dead: expected a bool, got 'yes'"):
        ProxSGD([torch.nn.Parameter(torch.ones(2, 20))], skip_dead="yes")
