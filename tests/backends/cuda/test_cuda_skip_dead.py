"""skip_dead in the CUDA executor: which bytes its kernels touch, and what CUDA graphs do to its lists.

That no bit depends on it, whoever else writes to weights and states, is tested in test_skip_dead.py.
"""

import pytest
import torch
from helpers import emulated
from helpers.cuda import BACKEND, needs_cuda, on_emulator, path_of, rows
from helpers.right import DTYPES, INTERPRETED, MODES, OPTIMIZERS, fresh
from helpers.tiers import each_value
from helpers.twins import DEAD, PENALTY, RULES, SHAPE, Twins

from cges_kernels import proximal

pytestmark = needs_cuda


class Steps:
    """Steps of parameters with dead rows, beside the same steps without skip_dead, and what kernels touch."""

    def __init__(self, device, kind, params, groups=({},), **options):
        self.device, self.params = device, params
        self.others = [torch.nn.Parameter(p.detach().clone()) for p in params]
        self.optimizer, self.plain = (
            OPTIMIZERS[kind](
                [{"params": xs[i :: len(groups)], **group} for i, group in enumerate(groups)],
                lr=0.05,
                backend=BACKEND,
                **{**PENALTY, **options},
                skip_dead=skip,
            )
            for xs, skip in ((self.params, True), (self.others, False))
        )
        for group, told in zip(self.plain.param_groups, groups):
            assert not told.get("skip_dead") and group.update(skip_dead=False) is None

    def step(self, without=()):
        """One step, with NaN as gradients of dead rows; ``without`` has indices of tensors without one.

        Returns, for each tensor that is stepped, which of its rows are touched, all or none of their bytes.
        """
        before = [[p, q] for p, q in zip(self.params, self.others)]
        for i, (p, q) in enumerate(before):
            grad = torch.empty_like(p).copy_(fresh(p.shape, p.dtype))
            if p.dim() > 1:
                grad[~alive(p)] = torch.nan
            p.grad, q.grad = (None, None) if i in without else (grad, grad.clone())
        self.begun = len(self.optimizer.state) > 0  # whether there are states to read
        accesses = self.device.accesses(self.optimizer.step)
        self.plain.step()
        return [None if p.grad is None else self.touched(accesses, p, q) for p, q in before]

    def touched(self, accesses, p, q):
        """Compares p with q, and the accesses to p's tensors with each other."""
        ours, plain = (
            [x for x in optimizer.state[w].values() if x.shape == w.shape]
            for optimizer, w in ((self.optimizer, p), (self.plain, q))
        )
        assert torch.equal(p, q) and len(ours) == len(plain) and all(map(torch.equal, ours, plain))
        of_w, of_grad, *of_states = (
            [n.view(len(p), -1) for n in emulated.traffic(accesses, x.detach())] for x in (p, p.grad, *ours)
        )
        found = of_w[0][:, :1]  # how often the first byte of each row is read
        assert set(found.flatten().tolist()) <= {0, 1}
        assert all((n == found).all() for n in (*of_w, of_grad[0])) and not of_grad[1].any()
        for reads, writes in of_states:
            assert (writes == found).all() and (reads == (found if self.begun else 0)).all()
        return found.flatten() == 1


def alive(p):
    return p.detach().flatten(1).any(1)


def mostly_dead(shape, dtype=torch.float32, offset=0):
    """Weights of which whole blocks of rows are zero, and of the others every second row."""
    memory = torch.empty(offset + fresh(shape).numel(), dtype=dtype)
    w = memory[offset:].view(shape).copy_(fresh(shape, dtype))
    if w.dim() > 1:
        w[: len(w) // 2] = 0.0
        w[::2] = 0.0
    return torch.nn.Parameter(w)


@on_emulator
@each_value(dtype=DTYPES, mode=MODES, offset=[0, 1])
def test_no_byte_of_a_dead_row_is_touched(device, poisoned_memory, dtype, mode, offset):
    """Nothing of a row is read or written that the step before held at zero; of others each byte once."""
    shapes = [shape for shape in rows(dtype) if len(shape) > 1 and shape[1] > 1]
    others = [(40, 1), (77,)]
    for rule, (kind, options) in RULES.items():
        params = [mostly_dead(shape, dtype, offset) for shape in [*others, *shapes]]
        assert set.union(*(path_of(p.shape, dtype=dtype) for p in params)) == {"rows"}
        steps = Steps(device, kind, params, prox_mode=mode, group_lasso=0.5, **options)
        was = [None] * len(params)  # which rows were alive before the last step
        for n in range(4):
            now = [alive(p) if p.dim() > 1 else None for p in params]
            touched = steps.step()
            # The second step is the first whose states are there, so it takes no list from the one before.
            lists = n > (0 if rule == "plain" else 1)
            for i, got in enumerate(touched):
                expected = was[i] if lists and i >= len(others) else torch.ones_like(got)
                assert torch.equal(got, expected), (rule, params[i].shape, n)
            was = now
        assert sum(int((~x).sum()) for x in was[len(others) :]) > 100


@on_emulator
def test_each_tensor_has_a_list_of_its_own(device):
    """A write to a tensor ends its own list alone, and only param groups with skip_dead have lists."""
    params = [mostly_dead(shape) for shape in [(70, 8), (9, 48), (7, 147), (33, 136)]]
    steps = Steps(device, RULES["momentum"][0], params, [{}, dict(skip_dead=False)], momentum=0.9)
    for _ in range(3):
        touched = steps.step()
    all_of = [bool(x.all()) for x in touched]
    assert all_of == [False, True, False, True]
    with torch.no_grad():
        for xs in (steps.params, steps.others):
            xs[2][0] = 1.0
    touched = steps.step()
    assert bool(touched[2].all()) and not touched[0].all()
    touched = steps.step(without=[0])
    assert touched[0] is None and not touched[2].all() and touched[2][0]
    assert torch.equal(steps.step()[0], alive(params[0]))


def test_nothing_is_skipped_from_a_capture_on(monkeypatch):
    """Neither a captured step skips nor any after it, because replays write without moving a version."""

    twins = Twins(BACKEND, momentum=0.9)
    dead = iter(range(DEAD, len(twins.weights[0]), 3))

    def write_unseen():
        row = next(dead)
        twins.each(lambda p, optimizer: p.data[row].fill_(1.0))

    twins.step(3)
    write_unseen()
    with monkeypatch.context() as m:
        m.setattr(proximal, "is_capturing", lambda: True)
        m.setattr(proximal, "_capture_health_check", lambda _: None)
        twins.step()
    for _ in range(2):
        for _ in range(2):
            write_unseen()
            twins.step()
        twins.each(lambda p, optimizer: optimizer.refresh())
        twins.step(3)


@on_emulator
def test_one_small_step_of_each_kind_of_team(device):
    """Skipping by teams of part of a warp and of several warps; ThreadSanitizer runs this test."""
    params = [mostly_dead(shape) for shape in [(70, 8), (9, 48), (5, 512)]]
    steps = Steps(device, RULES["momentum"][0], params, momentum=0.9, prox_mode="exact")
    for _ in range(3):
        touched = steps.step()
    assert not any(x.all() for x in touched)


@pytest.mark.gpu
def test_a_graph_between_steps_that_skip():
    """Captured steps and their replays are those of an optimizer that never skipped; so are steps after."""
    for kind, options in RULES.values():
        twins = Twins(BACKEND, kind, SHAPE, capturable=True, **options)
        twins.step(3)
        twins.give_grads()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graphs = [torch.cuda.CUDAGraph() for _ in twins.optimizers]
        for graph, optimizer in zip(graphs, twins.optimizers):
            with torch.cuda.graph(graph, stream=stream):
                optimizer.step()
        for _ in range(3):
            for p in twins.weights:
                p.data[DEAD + 3] += 1.0
            for graph in graphs:
                graph.replay()
            torch.cuda.synchronize()
            twins.check()
            assert twins.weights[0][DEAD + 3].any()
        twins.step(2)
        assert not INTERPRETED and not twins.skip()
