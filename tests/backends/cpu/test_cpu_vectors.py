"""The CPU executor's loops for each instruction set, and their conversions from and to 16 bits."""

import pytest
import torch
from helpers.right import ADAMW, DTYPES, MODES, SGD, check_step, inputs, one_step, states_of, training
from helpers.tiers import covering, each_value

from cges_kernels import prox
from cges_kernels.backends.extension import BUILT

pytestmark = pytest.mark.skipif("cpu" not in BUILT, reason="the extension is not built")

VECTOR_BYTES = [16, 32, 64]  # any x86-64, AVX2, AVX-512; a processor without one of them takes its best
HALVES = [torch.float16, torch.bfloat16]
ALL_BITS = torch.arange(-(2**15), 2**15).to(torch.int16)


@pytest.fixture
def vectors():
    """A function that limits the size of vectors, in bytes."""
    yield BUILT["cpu"].limit_vector_bytes
    BUILT["cpu"].limit_vector_bytes(64)


@pytest.mark.usefixtures("poisoned_memory")
@covering(
    vector_bytes=VECTOR_BYTES,
    dtype=DTYPES,
    group_by=["feature", "filter", "tensor"],
    prox_mode=MODES,
    freeze_zeros=[None, "group", "element"],
    rule=[SGD, ADAMW],
)
def test_each_instruction_set_is_right(vectors, vector_bytes, group_by, dtype, prox_mode, freeze_zeros, rule):
    """Steps are right by every instruction set."""
    vectors(vector_bytes)
    for shape in ((300, 250), (40, 9)):
        w, grad = inputs(shape, dtype, 2)
        w.flatten()[::5] = 0.0
        told = training(w, group_by, prox_mode, rule) | {"freeze_zeros": freeze_zeros}
        check_step("cpu", w, grad, states_of(rule, shape, dtype), steps=1, **told)


@each_value(vector_bytes=VECTOR_BYTES, dtype=HALVES)
def test_all_16_bits_are_widened_and_rounded_as_torch_does(vectors, vector_bytes, dtype):
    """Every 16-bit number is widened, and results are rounded, to torch's bits.

    Each result is one number less half of another, which float32 holds up to its last bits.
    """
    vectors(vector_bytes)
    w = ALL_BITS.view(dtype)
    grad = w[torch.randperm(len(w))]
    got, _ = one_step("cpu", w, grad, lr=0.5)
    expected = (w.float() - 0.5 * grad.float()).to(dtype)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got[~got.isnan()].view(torch.int16), expected[~got.isnan()].view(torch.int16))


@each_value(vector_bytes=VECTOR_BYTES, dtype=HALVES)
def test_what_shrinks_rounds_once_and_is_never_minus_zero(vectors, vector_bytes, dtype):
    """Shrunk numbers are rounded once, and zeros are +0.0, down to the least numbers of the dtype."""
    vectors(vector_bytes)
    w = ALL_BITS.view(dtype)
    w = w[w.isfinite()]
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    t = 0.75 * least
    got = prox(w, l1=t, backend="cpu")
    z = w.float()
    expected = (z.sign() * (z.abs() - t).clamp_min(0)).to(dtype)
    assert torch.equal(got.float(), expected.float()) and not torch.signbit(got[got == 0]).any()


@each_value(vector_bytes=VECTOR_BYTES, dtype=HALVES)
def test_every_length_is_converted_whole(vectors, vector_bytes, dtype):
    """No length leaves elements at the end of a row unconverted."""
    vectors(vector_bytes)
    for n in (*range(1, 70), 511, 512, 513, 1025):
        w, grad, buf = inputs((1, n), dtype)
        check_step("cpu", w, grad, buf, **training(w, "filter", "sequential"))
