"""Another update rule in the CUDA kernels: Lion, by the struct of lion.cu alone, on the emulator."""

import ctypes
import re
from pathlib import Path

import pytest
import torch
from cuda_emulator.build import CSRC, build, compiler
from helpers.emulated import THREADS
from helpers.lion import lion_update
from helpers.right import MODES, assert_right, coefficients, inputs, threshold_margin

from cges_kernels.core import reference

SOURCE = Path(__file__).parent / "lion.cu"


@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_the_kernels_take_lion(tmp_path):
    """All kernels compile with Lion, and a first and a later step of rows with penalties are right."""
    struct = re.search(r"struct Lion \{.*?\n\};\n", SOURCE.read_text(), re.S)
    assert len(struct[0].splitlines()) < 40
    options = {"defines": [f"CGES_THREADS={THREADS}"], "extra_flags": ["-fvisibility=default"]}
    library = ctypes.CDLL(str(build(tmp_path / "lion.so", [SOURCE, CSRC / "cuda" / "cut.cpp"], **options)))
    rule = {"betas": (0.8, 0.4), "weight_decay": 0.2, "maximize": True}
    numbers = (ctypes.c_float * 5)(0.5, 0.9, 0.2, 0.6, -1)  # lr 0.5
    for first, prox_mode in ((True, MODES[0]), (False, MODES[1])):
        w, grad, exp_avg = (x.cpu() for x in inputs((30, 90), torch.float32))
        penalty = coefficients(w, "filter")
        thresholds = [0.5 * penalty[key] for key in ("group_lasso", "exclusive_lasso", "l1")]
        z, state = w.clone(), exp_avg.clone()
        pointers = (ctypes.c_void_p(x.data_ptr()) for x in (z, grad, state))
        step = (ctypes.c_float * 3)(*thresholds), prox_mode == "exact", first, *w.shape
        library.lion_step(numbers, *step, *pointers)
        given = (w, grad) if first else (w, grad, exp_avg)
        told = dict(lr=0.5, update=lion_update, prox_mode=prox_mode, **rule, **penalty)
        truth = reference.step(*given, accumulate=torch.float64, **told)
        same = reference.step(*given, accumulate=torch.float32, **told)
        assert_right(z, truth[0], same[0], threshold_margin(*given, **told), torch.float32)
        assert_right(state, truth[1], same[1], torch.zeros_like(truth[1]), torch.float32)
        assert 0 < (z == 0).sum() < z.numel()
