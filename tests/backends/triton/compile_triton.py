"""Compiles every Triton kernel without a GPU, and prints as JSON what the compiler made of each.

test_triton_compile.py runs this script in a process of its own. The other tests choose Triton's interpreter,
and nothing can be compiled in a process that has.
"""

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from lion import LION  # a third rule, for which the tests compile the kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cges_kernels.backends.triton.executor import STORED
from cges_kernels.backends.triton.split import split_groups
from cges_kernels.backends.triton.tables import GENERAL, Variant
from cges_kernels.backends.triton.tiles import TILES, VECTOR_BYTES, launch_options, tile_for
from cges_kernels.backends.triton.updates import RULES
from cges_kernels.backends.triton.whole import whole_groups
from cges_kernels.core import rules
from cges_kernels.core.shrinkage import compute_dtype

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
LONGER_THAN_ANY_TILE = 1 << 40
WORKERS = 2
STATES = {**{name: len(rule.states) for name, rule in rules.RULES.items()}, "lion": 1}
RULES["lion"] = LION

# (compute capability, dtype, whether accesses are of 16 bytes, whether in exact mode and with freezing).
# MATRIX, the default, holds every tile and every GPU and takes two minutes on two cores; --all compiles
# everything.
EVERYTHING = [
    (cc, dtype, vector, full)
    for cc in (80, 90, 100)
    for dtype in ("float32", "bfloat16", "float64", "float16")
    for vector in (1, 0)
    for full in (0, 1)
]
MATRIX = [
    *((90, dtype, 1, full) for dtype in ("float32", "bfloat16") for full in (0, 1)),
    (90, "float32", 0, 0),
    (90, "float64", 1, 0),
    *((cc, "float32", 1, 0) for cc in (80, 100)),
    *((100, "bfloat16", 1, full) for full in (0, 1)),
]


def variants(dtype, vector):
    """(kernel, variant) of every launch. Without ``vector``, general tiles divide 64-bit numbers."""
    found = set()
    for kind, tiles in TILES.items():
        general = kind == GENERAL.value  # general tiles have single accesses in any case
        vec = VECTOR_BYTES // dtype.itemsize if vector and not general else 1
        wide = general and not vector
        for size in (*(t.longest for t in tiles if t.longest), LONGER_THAN_ANY_TILE):
            longest, red, keep = tile_for(kind, size, dtype, vec)
            name = "whole_groups" if size <= longest else "split_groups"
            if name == "whole_groups" or longest == 0:  # tensors without groups are never split
                found.add((name, Variant(kind, max(longest // red, 1), red, keep, vec, wide)))
    return sorted(found)


def compiled(job):
    """Compiles one kernel for one variant as a launch would, and describes its machine code."""
    cc, dtype_name, full, name, variant, rule = job
    dtype = getattr(torch, dtype_name)
    compute = compute_dtype(dtype)
    kernel = {"whole_groups": whole_groups, "split_groups": split_groups}[name]
    constants = {
        "VARIANTS": (tuple(variant),),
        "STORED": STORED[dtype],
        "COMPUTE": STORED[compute],
        "EPS": torch.finfo(compute).eps,
        "EXACT": bool(full),
        "FREEZE": bool(full),
        "LOAD": RULES[rule].load,
        "UPDATE": RULES[rule].update,
        "STATES": STATES[rule],
    }
    number = "*fp64" if compute == torch.float64 else "*fp32"
    pointers = {"items": "*i64", "tensors": "*i64", "shapes": "*i64", "hyper": number, "scratch": number}
    pointers.update(counters="*i32", grad_scale="*fp32", found_inf="*fp32")
    types = {**pointers, "per_window": "i32", "tickets": "i32", **dict.fromkeys(constants, "constexpr")}
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: types[n] for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in pointers},
    )
    target = GPUTarget("cuda", cc, 32)
    options = launch_options([variant], dtype, bool(full), nvidia=True)
    del options["VARIANTS"]
    binary = triton.compile(source, target=target, options=options).asm["cubin"]
    return {
        "cc": cc,
        "dtype": dtype_name,
        "full": bool(full),
        "kernel": name,
        "rule": rule,
        **variant._asdict(),
        **machine_code(binary),
    }


def machine_code(binary):
    """Registers, spills, wide accesses and instructions in double precision."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()

        def dump(option):
            done = subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True)
            return done.stdout

        sass = dump("-sass")
        registers = int(re.search(r"REG:(\d+)", dump("--dump-resource-usage"))[1])

    def count(pattern):
        return len(re.findall(pattern, sass))

    return {
        "registers": registers,
        "spills": count(r"\b(?:STL|LDL)\b"),
        "vector_loads": count(r"LDG\.E\.128"),
        "vector_stores": count(r"STG\.E\.128"),
        "fp64": count(r"\bD(?:ADD|MUL|FMA|SETP)\b"),
    }


def main():
    """Compiles the chosen jobs and prints what came of them."""
    jobs = [
        (cc, dtype, full, name, variant, "sgd")
        for cc, dtype, vector, full in (EVERYTHING if "--all" in sys.argv else MATRIX)
        for name, variant in variants(getattr(torch, dtype), vector)
    ]
    some = [job for job in jobs if job[:2] in ((90, "float32"), (90, "bfloat16"))]
    # Only some for the other rules, because each takes a second.
    jobs += [(*job[:-1], "adamw") for job in some[::6]] + [(*job[:-1], "lion") for job in some[::12]]
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        json.dump(list(pool.map(compiled, jobs, chunksize=4)), sys.stdout)


if __name__ == "__main__":
    main()
