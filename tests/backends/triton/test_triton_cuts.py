"""How the Triton executor cuts tensors, when it can serve, and tests that need a real GPU."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.programs import ROOT, run_python
from helpers.right import MODES, check_step, fresh
from helpers.steps import assert_same_bits, parameters
from helpers.triton_launches import BACKEND, PENALTY, executor, needs_triton, steps_of, tiles
from torch import nn

from cges_kernels import ProxSGD, available_backends, prox, prox_
from cges_kernels.backends import registry
from cges_kernels.core.groups import Layout

pytestmark = needs_triton

# How tensors are cut

# (layout, dtype, kind of tile, elements of an access where memory is aligned)
ALIGNED = [
    (Layout(1, 64, 48, 1), torch.float32, tiles.COLUMNS, 4),
    (Layout(1, 64, 50, 1), torch.float32, tiles.COLUMNS, 1),
    (Layout(1, 64, 50, 1), torch.float64, tiles.COLUMNS, 2),
    (Layout(1, 64, 48, 1), torch.bfloat16, tiles.COLUMNS, 8),
    (Layout(1, 64, 44, 1), torch.float16, tiles.COLUMNS, 1),
    (Layout(3, 5, 16, 1), torch.float32, tiles.COLUMNS, 4),
    (Layout(1, 1, 10, 72), torch.float32, tiles.ROWS, 4),
    (Layout(1, 1, 10, 70), torch.float32, tiles.ROWS, 1),
    (Layout(3, 5, 12, 1), torch.float32, tiles.GENERAL, 1),
    (Layout(1, 16, 16, 16), torch.float32, tiles.GENERAL, 1),
]


@pytest.mark.parametrize(("layout", "dtype", "kind", "vec"), ALIGNED, ids=str)
def test_accesses_are_16_bytes_where_every_row_begins_on_16(layout, dtype, kind, vec):
    """Wide accesses are chosen just where memory is aligned and each row's length allows it."""
    for aligned in (True, False):
        variant = tiles.cut(layout, True, dtype, aligned).variant
        assert (variant.kind, variant.vec) == (kind.value, vec if aligned else 1)


# (layout, whether offsets need 64 bits), on both sides of the limit for each kind of tile.
WIDE = [
    (Layout(1, 1 << 40, 64, 1), False),  # chunks are addressed from where they begin
    (Layout(1, 5, 1 << 27, 1), False),
    (Layout(1, 8, 1 << 28, 1), True),
    (Layout(1, 1, 1 << 40, 64), False),
    (Layout(1, 1, 1 << 10, 1 << 30), False),
    (Layout(1, 1, 2, 1 << 31), True),
    # general tiles are addressed by division, from the tensor's first element
    (Layout(1, 1 << 10, 1 << 10, (1 << 11) - 1), False),
    (Layout(1, 1 << 10, 1 << 10, 1 << 11), True),
]


@pytest.mark.parametrize(("layout", "wide"), WIDE, ids=str)
def test_offsets_beyond_32_bits_are_wide(monkeypatch, layout, wide):
    """64-bit offsets are used just where the furthest element needs them."""
    monkeypatch.setattr(
        tiles, "np", SimpleNamespace(arange=lambda *args: np.zeros(1))
    )  # one panel stands for 2**40 of them
    _, _, red, keep, _, got = tiles.cut(layout, True, torch.float32, True).variant
    furthest = layout.group_size * layout.num_groups - 1
    if layout.R1 == 1:
        furthest = min(furthest, (keep - 1) * layout.R2 + red - 1)
    elif layout.R2 == 1:
        furthest = min(furthest, (red - 1) * layout.K2 + keep - 1)
    assert got == wide and (got or furthest < 2**31)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("group_by", ["feature", "filter", "channel"])
def test_wide_offsets_give_the_same_bits(monkeypatch, group_by):
    """Kernels with 64-bit offsets compute the same as those with 32-bit offsets."""
    shapes = [(70, 12), (5, 7, 11), (6, 40)]
    expected = steps_of(parameters(shapes, torch.float32), group_by=group_by, **PENALTY)

    def wide(*args):
        cut = tiles.cut(*args)
        return cut._replace(variant=cut.variant._replace(wide=True))

    monkeypatch.setattr(executor, "cut", wide)
    assert_same_bits(expected, steps_of(parameters(shapes, torch.float32), group_by=group_by, **PENALTY))


# When it can serve

TOO_OLD = [("3.5.1", r"triton >= 3\.6 is needed, found 3\.5\.1"), ("2.3", r"triton >= 3\.6 .* found 2\.3")]


def refused(match):
    """Triton is unavailable, other calls work, and asking for it is an error that says why."""
    params = [nn.Parameter(torch.ones(4, 3, device="cpu"))]
    assert BACKEND not in available_backends()
    ProxSGD(params)
    prox(params[0].detach(), l1=0.1)
    for call in (
        lambda: ProxSGD(params, backend=BACKEND),
        lambda: prox(params[0].detach(), l1=0.1, backend=BACKEND),
        lambda: prox_([], l1=0.1, backend=BACKEND),
    ):
        with pytest.raises(RuntimeError, match=rf"backend='triton' cannot serve: .*{match}"):
            call()


def test_refused_without_triton(monkeypatch):
    """The error says to install Triton."""
    monkeypatch.setattr(registry, "util", SimpleNamespace(find_spec=lambda name: None))
    refused(r"triton >= 3\.6 is needed and not installed; pip install triton")


@pytest.mark.parametrize(("version", "match"), TOO_OLD)
def test_refused_where_triton_is_too_old(monkeypatch, version, match):
    """The error names the version that is needed and the one that was found."""
    monkeypatch.setattr(registry.metadata, "version", lambda name: version)
    refused(match)


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0", "4.0+rocm"])
def test_versions_that_serve(monkeypatch, version):
    """Versions are compared as numbers: 3.10 is newer than 3.6."""
    monkeypatch.setattr(registry.metadata, "version", lambda name: version)
    assert BACKEND in available_backends()


def test_refused_without_a_gpu(monkeypatch):
    """Without a GPU the error names the interpreter."""
    monkeypatch.setattr(registry, "triton_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    refused("no GPU that Triton compiles for is here; TRITON_INTERPRET=1")


def test_tensors_elsewhere_are_refused(monkeypatch):
    """Tensors on the CPU are an error where Triton compiles for a GPU, and nothing is written."""
    monkeypatch.setattr(registry, "triton_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    w = torch.ones(4, 3, device="cpu")
    for call in (
        lambda: ProxSGD([nn.Parameter(w)], backend=BACKEND),
        lambda: prox(w, l1=0.1, backend=BACKEND),
        lambda: prox_([w], l1=0.1, backend=BACKEND),
    ):
        with pytest.raises(RuntimeError, match="triton: it serves tensors on cuda or xpu, got one on cpu"):
            call()
    assert torch.equal(w, torch.ones(4, 3, device="cpu"))


def test_all_else_works_without_triton():
    """In a process that cannot import Triton everything else works."""
    run_python(
        "import sys, torch\n"
        "sys.modules['triton'] = None\n"
        "import cges_kernels as k\n"
        "assert 'triton' not in k.available_backends()\n"
        "p = torch.nn.Parameter(torch.ones(3, 2))\n"
        "k.ProxSGD([p], group_lasso=0.1)\n"
        "assert k.prox(p.detach(), l1=0.5).sum() == 3\n"
        "try:\n"
        "    k.ProxSGD([p], backend='triton')\n"
        "except RuntimeError as error:\n"
        "    assert 'triton >= 3.6 is needed' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('no error')\n",
        cwd=ROOT,
    )


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("prox_mode", MODES)
def test_with_cpu_as_default_device(prox_mode):
    """Tables and scratch memory are made on the tensors' device, not on torch's default device."""
    with torch.device("cpu"):
        for shape in ((64, 48), (17000, 19)):
            check_step(
                BACKEND,
                *(fresh(shape) for _ in range(3)),
                lr=0.5,
                momentum=0.9,
                prox_mode=prox_mode,
                **PENALTY,
            )


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 2**30), (2**20 + 1, 2048), (1, 2**31 + 8)], ids=str)
def test_more_than_2_31_elements(shape):
    """Tensors of more than 2^31 elements are right, in random columns."""
    w = torch.randn(shape, dtype=torch.bfloat16)
    columns = torch.randint(shape[1], (50,))
    before = w[:, columns].clone()
    prox_([w], group_lasso=0.5, l1=0.1, backend=BACKEND)
    expected = prox(before, group_lasso=0.5, l1=0.1, backend="reference")
    torch.testing.assert_close(w[:, columns], expected, rtol=2**-7, atol=0)
