"""torch.compile(optimizer.step). test_operators.py tests the operators that a compiled step becomes."""

import pytest
import torch
import torch._dynamo.testing
from helpers.compiled import COMPILES, PENALTY, SGD, SHAPES
from helpers.right import MODES
from helpers.steps import assert_same_bits, copies, everything, give_grads, parameters
from helpers.tiers import covering, each_value
from torch import nn

from cges_kernels import ProxAdamW, ProxSGD, available_backends

pytestmark = COMPILES


def pair_of_optimizers(backend, **options):
    """Equal parameters twice, each in two param groups of different specs, and an optimizer for each."""
    params = parameters(SHAPES, torch.float32)
    twins = copies(params)

    def made(x):
        groups = [{"params": x[:2]}, {"params": x[2:], "group_by": (1, 2), "view": (5, 6, 2)}]
        return ProxSGD(groups, backend=backend, **{**SGD, **PENALTY, **options})

    return params, twins, made(params), made(twins)


def assert_same(ours, plain):
    """Parameters and states agree to the bit, and the same parameters have states."""
    assert_same_bits(everything(ours), everything(plain))
    held = [
        [optimizer.state[p].keys() for group in optimizer.param_groups for p in group["params"]]
        for optimizer in (ours, plain)
    ]
    assert held[0] == held[1]


@covering(prox_mode=MODES, momentum=[0.0, 0.9], executor=available_backends())
def test_a_compiled_step_has_the_bits_of_a_plain_one(executor, prox_mode, momentum):
    """This holds in both modes, with and without momentum, for every executor."""
    options = dict(prox_mode=prox_mode, momentum=momentum, freeze_zeros="group", nesterov=momentum > 0)
    params, twins, ours, plain = pair_of_optimizers(executor, **options)
    step = torch.compile(ours.step, fullgraph=True, backend="aot_eager")
    for i in range(4):
        give_grads(params, i, twins)
        step()
        plain.step()
        assert_same(ours, plain)
    assert any((p == 0).any() for p in params)


def test_inductor_compiles_it():
    """torch.compile's default backend compiles the whole step into one graph."""
    params, twins, ours, plain = pair_of_optimizers("auto")
    step = torch.compile(ours.step, fullgraph=True)
    for i in range(3):
        give_grads(params, i, twins)
        step()
        plain.step()
        assert_same(ours, plain)


def test_new_values_in_tensors_compile_nothing(checked_backend):
    """New values of tensor hyperparameters take effect without a recompilation."""
    tensors = {k: torch.tensor(v) for k, v in {"lr": 0.125, **PENALTY}.items()}
    params, twins, ours, plain = pair_of_optimizers(
        checked_backend, **{k: v.clone() for k, v in tensors.items()}
    )
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(ours.step, fullgraph=True, backend=count)
    for i in range(5):
        give_grads(params, i, twins)
        step()
        plain.step()
        assert_same(ours, plain)
        if i == 1:  # two graphs: one begins momentum, the other goes on with it
            compiled = count.frame_count
        for group, other in zip(ours.param_groups, plain.param_groups):
            for key in tensors:
                group[key].mul_(0.75)
                other[key].mul_(0.75)
    assert count.frame_count == compiled == 2


def test_a_new_number_is_seen(checked_backend):
    """A plain number or a mode that changes takes effect, by a recompilation."""
    params, twins, ours, plain = pair_of_optimizers(checked_backend)
    step = torch.compile(ours.step, fullgraph=True, backend="aot_eager")
    numbers = ((0.1, "sequential"), (0.1, "exact"), (0.05, "exact"))
    for i, (lr, mode) in enumerate(numbers):
        for optimizer in (ours, plain):
            for group in optimizer.param_groups:
                group.update(lr=lr, prox_mode=mode)
        give_grads(params, i, twins)
        step()
        plain.step()
        assert_same(ours, plain)


def test_compiled_and_plain_steps_may_alternate(checked_backend):
    """Both kinds of step go on with the same state."""
    params, twins, ours, plain = pair_of_optimizers(checked_backend)
    step = torch.compile(ours.step, fullgraph=True, backend="aot_eager")
    for i in range(4):
        give_grads(params, i, twins)
        ours.step() if i % 2 else step()
        plain.step()
        assert_same(ours, plain)


def test_a_parameter_without_gradient_is_left_alone(checked_backend):
    """A parameter whose gradient is None is skipped, and its momentum begins later."""
    params, twins, ours, plain = pair_of_optimizers(checked_backend)
    step = torch.compile(ours.step, fullgraph=True, backend="aot_eager")
    for i, missing in enumerate((1, 2, None)):
        give_grads(params, i, twins)
        if missing is not None:
            params[missing].grad = twins[missing].grad = None
        step()
        plain.step()
        assert_same(ours, plain)


def test_gradients_and_buffers_of_another_memory_order(checked_backend):
    """A gradient and a buffer with other strides than the parameter's are brought into its layout."""
    params, twins, ours, plain = pair_of_optimizers(checked_backend)
    step = torch.compile(ours.step, fullgraph=True, backend="aot_eager")
    for i in range(3):
        give_grads(params, i, twins)
        if i == 1:
            buf = ours.state[params[0]]["momentum_buffer"]
            ours.state[params[0]]["momentum_buffer"] = buf.t().contiguous().t()
            params[0].grad = params[0].grad.t().contiguous().t()
        step()
        plain.step()
        assert_same(ours, plain)


def test_bad_hyperparameters_are_refused(checked_backend):
    """The checks of a plain step are in force, and nothing is written."""
    params, twins, ours, _ = pair_of_optimizers(checked_backend)
    give_grads(params, 0, twins)
    before = [p.detach().clone() for p in params]
    ours.param_groups[1]["l1"] = -1.0
    step = torch.compile(ours.step, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="l1: expected a finite number >= 0, got -1"):
        step()
    assert_same_bits(params, before)


def test_a_first_step_that_may_overflow_is_refused():
    """A compiled step makes new buffers even if it overflows: a plain step has to come first."""
    params, twins, ours, _ = pair_of_optimizers("auto", fused=True)
    give_grads(params, 0, twins)
    ours.grad_scale, ours.found_inf = torch.ones(()), torch.ones(())
    step = torch.compile(ours.step, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="take one step before"):
        step()


@pytest.mark.parametrize("compiled", [False, True])
def test_backward_through_a_stepped_parameter_raises(checked_backend, compiled):
    """As with torch's optimizers: autograd has saved a value that the step has overwritten."""
    params, twins, ours, _ = pair_of_optimizers(checked_backend)
    give_grads(params, 0, twins)
    loss = sum((p**2).sum() for p in params)
    (torch.compile(ours.step, fullgraph=True, backend="aot_eager") if compiled else ours.step)()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "bad",
    [
        lambda params, buffers: buffers[0].flatten()[:9],
        lambda params, buffers: buffers[0].half(),
        lambda params, buffers: params[0].detach(),
    ],
    ids=["another_shape", "another_dtype", "memory_of_the_parameter"],
)
def test_a_bad_momentum_buffer_is_refused_before_anything_is_written(checked_backend, bad):
    """A buffer of another shape or dtype, or one that is the parameter itself, is an error."""
    params, twins, ours, _ = pair_of_optimizers(checked_backend)
    give_grads(params, 0, twins)
    ours.step()
    before = [p.detach().clone() for p in params]
    entry = ours.state[params[0]]
    entry["momentum_buffer"] = bad(params, [entry["momentum_buffer"]])
    with pytest.raises(Exception, match=r"expected a momentum_buffer|expected each tensor once"):
        torch.compile(ours.step, fullgraph=True, backend="aot_eager")()
    assert_same_bits(params, before)


def test_a_differentiable_step_is_not_compiled():
    """differentiable=True is refused: the operator has no derivative."""
    params, twins, ours, _ = pair_of_optimizers("auto", differentiable=True)
    give_grads(params, 0, twins)
    with pytest.raises(Exception, match="differentiable=False in a step"):
        torch.compile(ours.step, fullgraph=True, backend="aot_eager")()


@pytest.mark.parametrize("make, key", [(ProxSGD, "momentum"), (ProxAdamW, "betas")])
def test_tensors_that_no_kernel_reads_are_not_compiled(make, key):
    """A rule's options as tensors are refused: the graph would have to hold them as numbers.

    So is a flag that is none.
    """
    params = parameters()
    half = torch.tensor(0.5)
    optimizer = make(params, lr=0.1, **{key: (half, half) if key == "betas" else half})
    give_grads(params, 0)
    compiled = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=f"expected numbers as {key}, got a tensor"):
        compiled()
    optimizer.param_groups[0]["maximize"] = 3
    with pytest.raises(Exception, match="maximize: expected a bool, got 3"):
        compiled()


def test_param_groups_without_gradients_do_not_share_tables(fused_backend):
    """Optimizers that differ only in a param group that is not stepped must not take each other's tables."""
    for more in (0, 1):
        torch._dynamo.reset()
        p, idle = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(5))
        optimizer = ProxSGD(
            [{"params": [p]}, *[{"params": [idle], "l1": 0.5}] * more], lr=0.1, backend=fused_backend
        )
        p.grad = torch.ones_like(p)
        torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")()
        assert torch.equal(p.detach(), torch.full_like(p, 0.9)) and idle.sum() == 5


@pytest.mark.gpu
def test_cudagraphs_of_inductor_leave_the_step_outside(kernel_backend):
    """Replays of a CUDA graph would use tables that the operator does not keep alive."""
    params, twins, ours, plain = pair_of_optimizers(kernel_backend)
    step = torch.compile(ours.step, fullgraph=True, mode="reduce-overhead")
    for i in range(5):
        give_grads(params, i, twins)
        step()
        plain.step()
        assert_same(ours, plain)


@pytest.mark.gpu
def test_a_compiled_step_is_not_captured(kernel_backend):
    """Capturing a compiled step is an error that says to capture optimizer.step itself."""
    params, twins, ours, _ = pair_of_optimizers(kernel_backend)
    step = torch.compile(ours.step, fullgraph=True, backend="aot_eager")
    for i in range(2):
        give_grads(params, i, twins)
        step()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match=r"expected optimizer\.step itself in a graph"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            step()


@each_value(executor=available_backends(), prox_mode=MODES, options=[{}, dict(decoupled_weight_decay=False)])
def test_a_compiled_step_of_adamw_has_the_bits_of_a_plain_one(executor, prox_mode, options):
    """The same for ProxAdamW, with a plain step among the compiled ones."""
    params = parameters(SHAPES, torch.float32)
    twins = copies(params)
    ours, plain = (
        ProxAdamW(x, lr=0.1, backend=executor, prox_mode=prox_mode, **PENALTY, **options)
        for x in (params, twins)
    )
    step = torch.compile(ours.step, fullgraph=True, backend="aot_eager")
    for i in range(4):
        give_grads(params, i, twins)
        ours.step() if i == 2 else step()
        plain.step()
        assert_same(ours, plain)
    assert float(ours.state[params[0]]["step"]) == 4


def test_inductor_compiles_adamw():
    """torch.compile's default backend compiles ProxAdamW's step into one graph."""
    params = parameters(SHAPES, torch.float32)
    twins = copies(params)
    ours, plain = (ProxAdamW(x, lr=0.1, **PENALTY) for x in (params, twins))
    step = torch.compile(ours.step, fullgraph=True)
    for i in range(3):
        give_grads(params, i, twins)
        step()
        plain.step()
        assert_same(ours, plain)
