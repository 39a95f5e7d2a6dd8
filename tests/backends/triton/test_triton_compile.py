"""What the compiler makes of the Triton kernels, without a GPU: spills, registers, accesses."""

import json
import os
import subprocess
import sys

import pytest
from helpers.programs import ROOT

pytestmark = [
    pytest.mark.full("every kernel compiles well for every architecture, which takes minutes"),
    pytest.mark.xdist_group("triton_compile"),
]


@pytest.fixture(scope="module")
def everything():
    """A dict for each compiled kernel, from a process in which kernels are not interpreted."""
    script = ROOT / "tests" / "backends" / "triton" / "compile_triton.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def kernels(everything):
    """The compiled kernels of SGD."""
    return [k for k in everything if k["rule"] == "sgd"]


def test_other_rules_compile_too(everything):
    """Kernels read a tensor for each state and two more, and write one more than states.

    AdamW forms only the step size in double precision; Lion, a rule of the tests, nothing.
    """
    for rule, states, fp64 in (("adamw", 2, range(1, 5)), ("lion", 1, range(1))):
        found = [k for k in everything if k["rule"] == rule]
        assert {k["kernel"] for k in found} == {"whole_groups", "split_groups"}
        assert {k["dtype"] for k in found} == {"float32", "bfloat16"}
        for k in found:
            assert k["fp64"] in fp64, k
            if k["vec"] > 1:
                elements = k["parts"] * k["red"] * k["keep"] / 256 / k["vec"]
                assert k["vector_loads"] >= (2 + states) * elements, k
                assert k["vector_stores"] == (1 + states) * elements, k


def test_every_launch_choice_was_compiled(kernels):
    """Each kind of tile, width of accesses and number of parts is among the compiled kernels."""
    for cc in (80, 90, 100):
        of_cc = [k for k in kernels if k["cc"] == cc]
        assert {k["kernel"] for k in of_cc} == {"whole_groups", "split_groups"}
        assert {k["kind"] for k in of_cc} == {0, 1, 2, 3} and 4 in {k["vec"] for k in of_cc}
        assert {k["parts"] for k in of_cc if k["kernel"] == "whole_groups"} == {1, 2, 4}


def test_no_spills(kernels):
    """No kernel keeps registers in memory, except one.

    The float32 tile of 1,024 for combined groups fills the registers of compute capability 90, and may spill
    a little.
    """
    for k in kernels:
        fills_registers = (k["cc"], k["kind"], k["parts"], k["vec"], k["red"]) == (90, 2, 1, 1, 1024)
        assert k["spills"] <= (4 if fills_registers and k["dtype"] == "float32" else 0), k


def test_registers_are_within_budget(kernels):
    """Everyday kernels have at most 128 registers.

    Then two programs of 8 warps share a multiprocessor's 65,536 registers.
    """
    for k in kernels:
        small = k["parts"] <= 2 and not k["full"] and not k["wide"] and k["dtype"] != "float64"
        assert k["registers"] <= (128 if small else 255), k
        if k["dtype"] == "float32" and k["parts"] == 1 and not k["wide"]:
            assert k["registers"] <= (128 if k["vec"] > 1 else 176), k


def test_aligned_accesses_are_16_bytes(kernels):
    """There are as many wide loads and stores as the tensors need.

    Three tensors are read (w, gradient and buffer) and two are written (w and buffer).
    """
    aligned = [k for k in kernels if k["vec"] > 1]
    assert aligned
    for k in aligned:
        elements = k["parts"] * k["red"] * k["keep"] / 256 / k["vec"]  # a thread's accesses to one tensor
        assert k["vector_loads"] >= 3 * elements and k["vector_stores"] == 2 * elements, k


def test_no_double_arithmetic_in_single_precision(kernels):
    """Only kernels of float64 have instructions in double precision."""
    assert all(k["fp64"] == 0 for k in kernels if k["dtype"] != "float64")
    assert all(k["fp64"] > 0 for k in kernels if k["dtype"] == "float64")
