"""Another update rule in the CPU executor's loops: Lion, by the struct of lion.cpp alone."""

import ctypes
import re
from pathlib import Path

import pytest
import torch
from cuda_emulator.build import FLAGS, compiler, run
from helpers.lion import lion_update
from helpers.right import assert_right, inputs
from torch.utils.cpp_extension import include_paths

SOURCE = Path(__file__).parent / "lion.cpp"


@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_rows_take_lion(tmp_path):
    """The loops for rows update with Lion: the first step and a later one, of float32 and float16.

    Rows are parts of longer ones, and take several of float16's blocks. z is in the compute type.
    """
    struct = re.search(r"struct Lion \{.*?\n\};\n", SOURCE.read_text(), re.S)
    assert len(struct[0].splitlines()) < 40
    headers = [f"-isystem{path}" for path in include_paths()]
    command = [compiler(), *FLAGS, "-fvisibility=default", *headers, "-shared", SOURCE]
    run([*map(str, command), "-o", str(tmp_path / "lion.so")])
    library = ctypes.CDLL(str(tmp_path / "lion.so"))
    lr, decay, betas = 0.5, 0.2, (0.8, 0.4)
    for dtype in (torch.float32, torch.float16):
        for first in (True, False):
            w, grad, exp_avg = (x.cpu() for x in inputs((5, 1300), dtype))
            state, z = exp_avg.clone(), torch.full((5, 1200), torch.nan, device="cpu")
            numbers = (ctypes.c_float * 5)(lr, 1 - lr * decay, 1 - betas[0], 1 - betas[1], -1)
            shape = (ctypes.c_int64 * 4)(5, 1100, 1300, 1200)
            pointers = (ctypes.c_void_p(x.data_ptr()) for x in (w, grad, state, z))
            getattr(library, f"lion_{str(dtype)[6:]}")(ctypes.c_bool(first), numbers, shape, *pointers)
            own = [x[:, :1100] for x in (w, grad) + (() if first else (exp_avg,))]
            options = dict(lr=lr, betas=betas, weight_decay=decay, maximize=True)
            truth = lion_update(*(x.double() for x in own), **options)
            same = lion_update(*(x.float() for x in own), **options)
            anywhere = torch.zeros_like(truth[0])
            assert_right(z[:, :1100], truth[0], same[0], anywhere, torch.float32)
            assert_right(state[:, :1100], truth[1], same[1], anywhere, dtype)
            assert torch.equal(state[:, 1100:], exp_avg[:, 1100:]) and z[:, 1100:].isnan().all()
