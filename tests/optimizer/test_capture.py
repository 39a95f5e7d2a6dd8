"""Learning rates and coefficients as tensors that kernels read, and steps in CUDA graphs."""

import warnings

import pytest
import torch
from helpers.right import MODES, device_of
from helpers.steps import assert_same_bits, copies, give_grads, parameters
from helpers.tiers import covering

from cges_kernels import CoefficientWarmup, ProxSGD, available_backends, proximal
from cges_kernels.backends.planner import IN_KERNELS

SHAPES = [(33, 7), (20,), (5, 3, 2, 2)]
# Numbers of few bits, so that products are exact in any order and precision.
NUMBERS = dict(lr=0.125, group_lasso=0.75, exclusive_lasso=0.03125, l1=0.25)
SGD = dict(momentum=0.5, weight_decay=0.25)


def as_tensors(numbers, device):
    """The same numbers as float32 tensors."""
    return {k: torch.tensor(v, dtype=torch.float32, device=device) for k, v in numbers.items()}


@covering(
    dtype=[torch.float32, torch.float64, torch.bfloat16],
    prox_mode=MODES,
    executor=[name for name in IN_KERNELS if name in available_backends()],
)
def test_tensors_are_the_numbers_that_they_hold(executor, prox_mode, dtype):
    """Tensors, all together or each alone, give the bits of numbers, also changed in place."""
    every = as_tensors(NUMBERS, device_of(executor))
    for chosen in (list(NUMBERS), *([key] for key in NUMBERS)):
        params = parameters(SHAPES, dtype)
        twins = copies(params)
        tensors = {key: every[key].clone() for key in chosen}
        options = dict(SGD, backend=executor, prox_mode=prox_mode)
        ours = ProxSGD(params, **options, **{**NUMBERS, **tensors})
        plain = ProxSGD(twins, **options, **NUMBERS)
        for step, factor in enumerate((1.0, 0.5, 0.0, 2.0)):
            for key in chosen:
                tensors[key].fill_(NUMBERS[key] * factor)
                plain.param_groups[0][key] = NUMBERS[key] * factor
            give_grads(params, step, twins)
            ours.step()
            plain.step()
            assert_same_bits(params, twins)
        assert any((p == 0).any() for p in params)


def test_no_step_waits_for_a_tensor(kernel_backend, monkeypatch):
    """The host never asks for the value of a tensor that the kernels can read."""
    params = parameters(SHAPES, torch.float32)
    tensors = as_tensors(NUMBERS, device_of(kernel_backend))
    ours = ProxSGD(params, **SGD, **tensors, backend=kernel_backend)
    give_grads(params, 0)
    ours.step()

    def refuse(*_):
        raise AssertionError("the host asked for a tensor's value")

    for name in ("item", "__float__", "__bool__", "tolist", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    tensors["lr"].fill_(0.0625)
    ours.step()


def test_another_tensor_takes_the_place_of_one(kernel_backend):
    """A tensor that is replaced by another tensor, or by a number, takes effect in the next step."""
    params = parameters(SHAPES, torch.float32)
    twins = copies(params)
    tensors = as_tensors(NUMBERS, device_of(kernel_backend))
    ours = ProxSGD(params, **SGD, **tensors, backend=kernel_backend)
    plain = ProxSGD(twins, **SGD, **NUMBERS, backend=kernel_backend)
    values = (torch.tensor(0.5, device=device_of(kernel_backend)), 0.125, torch.tensor([0.25]))
    for step, l1 in enumerate(values):
        ours.param_groups[0]["l1"] = l1
        plain.param_groups[0]["l1"] = float(l1)
        give_grads(params, step, twins)
        ours.step()
        plain.step()
        assert_same_bits(params, twins)


def test_tensors_that_kernels_cannot_read_are_read_by_the_host(fused_backend):
    """float64 tensors on the CPU take effect, also when changed in place."""
    params = parameters(SHAPES, torch.float32)
    twins = copies(params)
    tensors = {k: torch.tensor(v, dtype=torch.float64, device="cpu") for k, v in NUMBERS.items()}
    ours = ProxSGD(params, **SGD, **tensors, backend=fused_backend)
    plain = ProxSGD(twins, **SGD, **NUMBERS, backend=fused_backend)
    for step in range(2):
        give_grads(params, step, twins)
        ours.step()
        plain.step()
        assert_same_bits(params, twins)
        tensors["l1"].mul_(2)
        plain.param_groups[0]["l1"] *= 2


@pytest.mark.parametrize("key", ["momentum", "dampening", "weight_decay"])
def test_other_tensors_are_read_by_the_host(fused_backend, key):
    """Momentum, dampening and weight decay may be tensors as well."""
    params = parameters(SHAPES, torch.float32)
    twins = copies(params)
    value = torch.tensor(0.25, device=device_of(fused_backend))
    ours = ProxSGD(params, backend=fused_backend, **{**SGD, **NUMBERS, key: value})
    plain = ProxSGD(twins, backend=fused_backend, **{**SGD, **NUMBERS, key: 0.25})
    for step in range(3):
        give_grads(params, step, twins)
        ours.step()
        plain.step()
        assert_same_bits(params, twins)
        value.mul_(0.5)
        plain.param_groups[0][key] *= 0.5


def test_schedulers_change_tensors_in_place(kernel_backend):
    """Schedules write into the tensor, so that a graph that reads it follows."""
    params = parameters(SHAPES, torch.float32)
    tensors = as_tensors(NUMBERS, device_of(kernel_backend))
    ours = ProxSGD(params, **SGD, **tensors, backend=kernel_backend)
    warmup = CoefficientWarmup(ours, steps=4)
    schedule = torch.optim.lr_scheduler.StepLR(ours, 1, gamma=0.5)
    give_grads(params, 0)
    for i in range(1, 4):
        ours.step()
        warmup.step()
        schedule.step()
        assert ours.param_groups[0]["lr"] is tensors["lr"] and float(tensors["lr"]) == 0.125 * 0.5**i
        assert ours.param_groups[0]["l1"] is tensors["l1"] and float(tensors["l1"]) == 0.25 * i / 4


class Capture:
    """A step that is made to believe that it is captured, and has to fail before it does anything."""

    def __init__(self, kernel_backend, monkeypatch, **options):
        self.params = parameters(SHAPES, torch.float32)
        self.optimizer = ProxSGD(self.params, backend=kernel_backend, **{**SGD, **NUMBERS, **options})
        give_grads(self.params, 0)
        self.monkeypatch = monkeypatch

    def fails_with(self, text):
        before = copies(self.params)
        self.monkeypatch.setattr(proximal, "is_capturing", lambda: True)
        self.monkeypatch.setattr(proximal, "_capture_health_check", lambda _: None)
        with pytest.raises(RuntimeError, match=text):
            self.optimizer.step()
        assert_same_bits(self.params, before)


def test_the_first_step_is_not_for_a_graph(kernel_backend, monkeypatch):
    """A first step allocates tables and buffers, which a graph must not."""
    Capture(kernel_backend, monkeypatch).fails_with(
        "expected a step of the same parameters and options before"
    )


def test_momentum_cannot_begin_in_a_graph(kernel_backend, monkeypatch):
    """A missing momentum buffer is an error: every replay would start it anew."""
    capture = Capture(kernel_backend, monkeypatch)
    capture.optimizer.step()
    del capture.optimizer.state[capture.params[2]]["momentum_buffer"]
    capture.fails_with(r"param_groups\[0\]\['params'\]\[2\]: expected its momentum_buffer")


def test_a_graph_leaves_no_parameter_out(kernel_backend, monkeypatch):
    """A parameter without a gradient is an error: replays would always skip it."""
    capture = Capture(kernel_backend, monkeypatch)
    capture.optimizer.step()
    capture.params[1].grad = None
    capture.fails_with(r"param_groups\[0\]\['params'\]\[1\]: expected a gradient during capture, got None")


def test_a_graph_asks_the_host_for_no_tensor(kernel_backend, monkeypatch):
    """A tensor that only the host can read is an error: its value would be frozen."""
    capture = Capture(kernel_backend, monkeypatch, lr=torch.tensor(0.1, dtype=torch.float64))
    capture.optimizer.step()
    capture.fails_with(r"param_groups\[0\]\['lr'\]: .*float32 tensor of one element .*got torch.float64")


def test_numbers_do_not_change_within_a_graph(kernel_backend, monkeypatch):
    """A new number beside a tensor is an error, because checking it would need the tensor's value."""
    capture = Capture(kernel_backend, monkeypatch, lr=torch.tensor(0.125))
    capture.optimizer.step()
    capture.optimizer.param_groups[0]["l1"] = 0.5
    capture.fails_with("expected the last step's hyperparameters during capture")


def test_what_a_graph_comes_back_to_outlives_the_plans(kernel_backend, monkeypatch):
    """Plans that were captured are kept when an option changes: graphs hold addresses of their tables.

    Nor does a capture make new tables of hyperparameters, although it ends skip_dead.
    """
    capture = Capture(kernel_backend, monkeypatch, freeze_zeros="group", skip_dead=True)
    capture.optimizer.step()
    plan = capture.optimizer._planner.plans[kernel_backend]
    tables = list(plan._executor.hyper.values()) if kernel_backend == "triton" else []
    for _ in range(2):
        with monkeypatch.context() as m:
            m.setattr(proximal, "is_capturing", lambda: True)
            m.setattr(proximal, "_capture_health_check", lambda _: None)
            capture.optimizer.step()
    assert all(any(x is y for y in plan._executor.hyper.values()) for x in tables)
    capture.optimizer.param_groups[0]["group_by"] = "filter"
    capture.optimizer.step()
    assert capture.optimizer._planner.plans[kernel_backend] is not plan
    assert any(plan in kept.values() for kept in capture.optimizer._planner._in_graphs)


def test_options_do_not_change_within_a_graph(kernel_backend, monkeypatch):
    """A changed option is an error, because new plans would have to be made."""
    capture = Capture(kernel_backend, monkeypatch)
    capture.optimizer.step()
    capture.optimizer.param_groups[0]["group_by"] = "filter"
    capture.fails_with("expected a step of the same parameters and options before")


@pytest.mark.parametrize("executor", ["reference", "cpu"])
def test_executors_that_need_the_host_are_in_no_graph(executor, monkeypatch):
    """The reference and the CPU executor refuse to be captured."""
    capture = Capture(executor, monkeypatch)
    capture.optimizer.step()
    capture.fails_with(f"expected an executor of .*'cuda', 'triton'.* got '{executor}'")


@pytest.mark.gpu
@pytest.mark.parametrize("prox_mode", MODES)
def test_replays_follow_tensors(kernel_backend, prox_mode):
    """Replays read the tensors' present values and give the bits of plain steps."""
    params = parameters(SHAPES, torch.float32)
    twins = copies(params)
    tensors = as_tensors(NUMBERS, "cuda")
    options = dict(SGD, backend=kernel_backend, prox_mode=prox_mode)
    ours = ProxSGD(params, capturable=True, **options, **tensors)
    plain = ProxSGD(twins, **options, **NUMBERS)
    give_grads(params, 0, twins)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of torch warn that this step is not captured
        ours.step()
    plain.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for factor in (1.0, 0.5, 0.0, 2.0):
        for key, value in NUMBERS.items():
            tensors[key].fill_(value * factor)
            plain.param_groups[0][key] = value * factor
        graph.replay()
        plain.step()
        assert_same_bits(params, twins)


@pytest.mark.gpu
def test_a_graph_of_a_whole_iteration(kernel_backend):
    """Backward and step in one graph give the bits of plain training.

    Plain steps on other gradients come between replays.
    """
    params = parameters(SHAPES, torch.float32)
    twins = copies(params)
    ours = ProxSGD(params, backend=kernel_backend, capturable=True, **SGD, **NUMBERS)
    plain = ProxSGD(twins, backend=kernel_backend, **SGD, **NUMBERS)
    x = [torch.randn_like(p) for p in params]

    def iterate(stepped, params):
        sum((p * p * y).sum() for p, y in zip(params, x)).backward()
        stepped.step()

    for stepped, its in ((ours, params), (plain, twins)):
        iterate(stepped, its)
        stepped.zero_grad()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        iterate(ours, params)
    in_graph = [p.grad for p in params]
    for _ in range(2):
        graph.replay()
        iterate(plain, twins)
        plain.zero_grad()
        assert_same_bits(params, twins)
        for p, q in zip(params, twins):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        plain.step()
        plain.zero_grad()
        assert_same_bits(params, twins)
        for p, grad in zip(params, in_graph):
            p.grad = grad.zero_()


@pytest.mark.gpu
def test_torch_refuses_a_capture_without_capturable(kernel_backend):
    """torch's own check for capturable=True is in force."""
    params = parameters(SHAPES, torch.float32)
    ours = ProxSGD(params, backend=kernel_backend, **SGD, **NUMBERS)
    give_grads(params, 0)
    ours.step()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ours.step()
