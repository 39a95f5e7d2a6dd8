"""What the compiler made of the CUDA kernels, read from the extension itself: no GPU is needed."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from cges_kernels import ops

REGISTERS = 128  # two blocks of 256 threads share the 65,536 of a multiprocessor
DTYPES = {"If": "float32", "Id": "float64", "I13__nv_bfloat16": "bfloat16", "I6__half": "float16"}
KERNELS = {(name, dtype) for name in ("step_blocks", "step_clusters") for dtype in DTYPES.values()}

pytestmark = [
    pytest.mark.skipif(
        ops._C is None or not ops._C.cuda, reason="the extension is built without the CUDA executor"
    ),
    pytest.mark.xdist_group("cuda_compile"),
]


def kernel_of(mangled):
    name = next(name for name, _ in KERNELS if name in mangled)
    return name, next(dtype for code, dtype in DTYPES.items() if f"{name}{code}E" in mangled)


def dump(option):
    """Lines of what cuobjdump says, as (architecture, kernel, line)."""
    tool = shutil.which("cuobjdump")
    if tool is None and (found := importlib.util.find_spec("triton")):
        tool = Path(found.origin).parent / "backends/nvidia/bin/cuobjdump"
    if tool is None:
        pytest.skip("cuobjdump is neither on the PATH nor in Triton's package")
    said = subprocess.run([tool, option, ops._C.__file__], capture_output=True, text=True, check=True).stdout
    architecture = kernel = None
    for line in said.splitlines():
        if found := re.match(r"arch = sm_(\d+)", line):
            architecture = int(found[1])
        elif found := re.match(r"\s*Function\s*:?\s*(\S+?):?$", line):
            kernel = kernel_of(found[1])
        elif kernel is not None:
            yield architecture, kernel, line


@pytest.fixture(scope="module")
def instructions():
    """(architecture, kernel) -> the opcodes that it holds."""
    opcodes = defaultdict(set)
    for architecture, kernel, line in dump("--dump-sass"):
        if found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", line):
            opcodes[architecture, kernel].add(found[1])
    return {key: found for key, found in opcodes.items() if has_code(*key)}


def has_code(architecture, kernel):
    """Clusters came with sm_90; before it their kernel is empty, and never launched."""
    return architecture >= 90 or kernel[0] != "step_clusters"


def test_registers_and_no_spills():
    found = {}
    for architecture, kernel, line in dump("--dump-resource-usage"):
        if "REG:" in line:
            found[architecture, kernel] = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        assert {architecture for architecture, _ in found} == {80, 90, 100}
    assert {kernel for _, kernel in found} == KERNELS
    for key, uses in found.items():
        assert uses["REG"] <= REGISTERS and uses["STACK"] == uses["LOCAL"] == 0, (key, uses)


def test_wide_accesses(instructions):
    for key, opcodes in instructions.items():
        for wanted in ("LDG.E.128", "STG.E.128", "LDS.128", "STS.128"):
            assert any(x.startswith(wanted) for x in opcodes), (key, wanted)


def test_double_precision_only_where_it_is_asked_for(instructions):
    for (architecture, kernel), opcodes in instructions.items():
        doubles = {x for x in opcodes if re.match(r"D(ADD|MUL|FMA|SETP)|F2F.*F64|I2F.*F64|MUFU.*64", x)}
        assert bool(doubles) == (kernel[1] == "float64"), (architecture, kernel, doubles)


def test_nothing_but_integers_is_atomic(instructions):
    for key, opcodes in instructions.items():
        atomics = {x for x in opcodes if re.match(r"(ATOM|RED)", x)}
        assert not {x for x in atomics if ".F" in x}, (key, atomics)
