"""What the compiler made of the CUDA kernels, read from the extension and rows_paths.cu without a GPU."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
from cuda_emulator.build import CSRC

from cges_kernels.backends.extension import BUILT

DTYPES = {"f": "float32", "d": "float64", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}
NAMES = ("step_rows", "step_tiles", "step_chunks")
RULES = ("Sgd", "Adamw")
KERNELS = {(name, dtype, rule) for name in NAMES for dtype in DTYPES.values() for rule in RULES}
KERNELS |= {("correct_steps", dtype, "Adamw") for dtype in DTYPES.values()}
# The most registers of a thread. Blocks have 256 threads, and a multiprocessor has 65,536 registers. Kernels
# for rows leave room for three blocks on a multiprocessor, or four if they are plain and of 16 bits. Those of
# float64, and other kernels, leave room for two. A block for tiles has 512 threads and a multiprocessor to
# itself.
REGISTERS = 128
REGISTERS_OF_ROWS = {"float32": (80, 80), "float64": (128, 128), "bfloat16": (80, 64), "float16": (80, 64)}
# The most instructions that one more element adds to a path of the kernels for rows, in 32 and 16 bits. The
# goal for 16 bits is 32.
INSTRUCTIONS = {"plain": (32, 30), "general": (49, 53)}
# The most bytes that a thread may keep in the stack. AdamW's tiles need some: in 16 bits a thread has eight
# columns of four tensors.
STACK = {
    ("step_tiles", "bfloat16", "Adamw"): 96,
    ("step_tiles", "float16", "Adamw"): 96,
    ("step_tiles", "float64", "Adamw"): 48,
    **{("correct_steps", dtype, "Adamw"): 8 for dtype in DTYPES.values()},
}
INSTRUCTIONS_OF_TILES = {
    "plain": (32, 30),
    "general": (51, 50),
}  # of one turn of the loop, which is for two tiles; some of these instructions are skipped

pytestmark = [
    pytest.mark.skipif(  # not BUILT["cuda"], which may be the emulator
        "cpu" not in BUILT or not BUILT["cpu"].cuda, reason="the extension is built without the CUDA executor"
    ),
    pytest.mark.xdist_group("cuda_compile"),
]


def kernel_of(mangled):
    """A kernel's name, dtype, update rule, and the flags that it is compiled for: few arguments, plain."""
    of_dtype = r"(step_[a-z]+|correct_steps|path)I(f|d|13__nv_bfloat16|6__half)"
    found = re.search(of_dtype + r"(?:NS0_\d([A-Z]\w+?)E)?((?:Lb\dE)+)E", mangled)
    return found[1], DTYPES[found[2]], found[3], tuple(map(int, re.findall(r"Lb(\d)E", found[4])))


def cuobjdump():
    """The path of cuobjdump, which Triton's package has too."""
    tool = shutil.which("cuobjdump")
    if tool is None and (found := importlib.util.find_spec("triton")):
        tool = Path(found.origin).parent / "backends/nvidia/bin/cuobjdump"
    if tool is None:
        pytest.skip("cuobjdump is neither on the PATH nor in Triton's package")
    return tool


def dump(option, path=None):
    """What cuobjdump prints of each kernel, as (architecture, kernel, line)."""
    command = [cuobjdump(), option, path or BUILT["cpu"].__file__]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    architecture = kernel = None
    for line in said.splitlines():
        if found := re.match(r"arch = sm_(\d+)", line):
            architecture = int(found[1])
        elif found := re.match(r"\s*Function\s*:?\s*(\S+?):?$", line):
            kernel = kernel_of(found[1])
        elif kernel is not None:
            yield architecture, kernel, line


def assembly(path=None):
    """{(architecture, kernel): its instructions in order, as (address, opcode, rest of the line)}."""
    found = defaultdict(list)
    for architecture, kernel, line in dump("--dump-sass", path):
        pattern = r"\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)(.*)"
        if here := re.match(pattern, line):
            found[architecture, kernel].append((int(here[1], 16), here[2], here[3]))
    return found


def opcodes(path=None):
    """{(architecture, kernel): its opcodes in order}."""
    return {key: [opcode for _, opcode, _ in found] for key, found in assembly(path).items()}


def loops(instructions):
    """The opcodes of each loop of a kernel: from the target of a backward branch to that branch."""
    for end, (address, opcode, rest) in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) <= address:
            yield [opcode for at, opcode, _ in instructions[: end + 1] if at >= int(target[1], 16)]


@pytest.fixture(scope="module")
def instructions():
    """{(architecture, kernel): the set of its opcodes}."""
    return {key: set(found) for key, found in opcodes().items()}


def test_registers_and_no_spills():
    """Every kernel is there for every architecture, within its registers and without spills."""
    found = {}
    for architecture, kernel, line in dump("--dump-resource-usage"):
        if "REG:" in line:
            found[architecture, kernel] = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        assert {architecture for architecture, _ in found} == {80, 90, 100}
    assert {kernel[:3] for _, kernel in found} == KERNELS
    for (architecture, (name, dtype, rule, more)), uses in found.items():
        most = registers_of_rows(dtype, rule, more[-1]) if name == "step_rows" else REGISTERS
        stack = STACK.get((name, dtype, rule), 0)
        assert uses["REG"] <= most and uses["STACK"] <= stack and uses["LOCAL"] == 0, (
            architecture,
            name,
            dtype,
            rule,
            more,
            uses,
        )


def registers_of_rows(dtype, rule, plain):
    """The most registers of a thread of a kernel for rows."""
    if rule == "Adamw" and dtype != "float64":
        return 80 if plain else 128
    return REGISTERS_OF_ROWS[dtype][plain]


def test_wide_accesses(instructions):
    """Every kernel has loads and stores of 16 bytes; tiles are loaded by asynchronous copies.

    All kernels but those for rows keep z in shared memory, which they access by 16 bytes as well.
    """
    for (architecture, kernel), found in instructions.items():
        if kernel[0] == "correct_steps":
            continue
        read = r"LDGSTS\.E.*\.128" if kernel[0] == "step_tiles" else r"LDG\.E.*\.128"
        patterns = [read, r"STG\.E.*\.128"]
        patterns += [] if kernel[0] == "step_rows" else [r"LDS\.128", r"STS\.128"]
        for wanted in patterns:
            assert any(re.match(wanted, x) for x in found), (architecture, kernel, wanted)
        if kernel[:3] not in STACK:
            assert not {x for x in found if re.match(r"(LDL|STL)", x)}, (architecture, kernel)


def test_double_precision_only_where_it_is_asked_for(instructions):
    """Kernels of other dtypes than float64 have no instruction in double precision."""
    for (architecture, kernel), found in instructions.items():
        doubles = {x for x in found if re.match(r"D(ADD|MUL|FMA|SETP)|F2F.*F64|I2F.*F64|MUFU.*64", x)}
        wanted = (
            kernel[1] == "float64" or kernel[0] == "correct_steps"
        )  # it computes powers in double precision, as torch's fused AdamW does
        assert bool(doubles) == wanted, (architecture, kernel, doubles)


def test_nothing_but_integers_is_atomic(instructions):
    """Atomic additions of floats would make results depend on the order of blocks."""
    for key, found in instructions.items():
        atomics = {x for x in found if re.match(r"(ATOM|RED)", x)}
        assert not {x for x in atomics if ".F" in x}, (key, atomics)


@pytest.mark.full(
    "an element takes no more instructions than it has to, counted in SASS; that takes half a minute"
)
@pytest.mark.parametrize("path", ["plain", "general"])
def test_instructions_that_an_element_adds(tmp_path, path):
    """An element adds no more instructions to a row than INSTRUCTIONS says.

    The difference between threads of 32 and of 16 elements leaves out what a thread does once.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the PATH")
    counts = []
    for elements in (16, 32):
        cubin = tmp_path / f"{elements}.cubin"
        command = [
            nvcc,
            "-O3",
            "-std=c++20",
            "-arch=sm_90",
            "-cubin",
            f"-I{CSRC}",
            f"-DPLAIN={int(path == 'plain')}",
        ]
        command += [f"-DCGES_ROW_ELEMENTS={elements}", "-o", cubin, Path(__file__).parent / "rows_paths.cu"]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        found = {kernel[1]: sum(x != "NOP" for x in all_) for (_, kernel), all_ in opcodes(cubin).items()}
        counts.append(found)
    for dtype, most in zip(("float32", "bfloat16"), INSTRUCTIONS[path]):
        added = (counts[1][dtype] - counts[0][dtype]) / 16
        assert 10 < added <= most, (dtype, added)


@pytest.mark.full(
    "an element takes no more instructions than it has to, counted in SASS; that takes half a minute"
)
@pytest.mark.parametrize("path", ["plain", "general"])
def test_instructions_that_an_element_takes_in_a_tile(path):
    """An element takes no more instructions in a tile than INSTRUCTIONS_OF_TILES says.

    Counted are the loops that write one tile back and load the next, and whose accesses are all of 16 bytes.
    """
    for (architecture, (name, dtype, rule, more)), found in assembly().items():
        if name != "step_tiles" or rule != "Sgd" or architecture != 90 or more[-1] != (path == "plain"):
            continue
        if dtype not in ("float32", "bfloat16"):
            continue
        elements = {"float32": 4, "bfloat16": 8}[dtype]
        wide = [len(x) for x in loops(found) if sum(y.startswith("LDGSTS") for y in x) == 3]
        assert len(wide) == 2  # one loop for plain steps, one for others
        most = INSTRUCTIONS_OF_TILES[path][dtype == "bfloat16"]
        assert 10 * elements < min(wide) and max(wide) <= most * elements, (dtype, more, wide)
