"""Another update rule in the Triton kernels: Lion, by lion.py alone."""

from itertools import product
from pathlib import Path

import pytest
import torch
from helpers import right
from helpers.lion import LION, ProxLion
from helpers.right import MODES, check_step, coefficients, inputs
from helpers.triton_launches import BACKEND, SPLIT, WHOLE, needs_triton

from cges_kernels.backends.extension import BUILT
from cges_kernels.core.rules import RULES

lion = pytest.importorskip("backends.triton.lion")
updates = pytest.importorskip("cges_kernels.backends.triton.updates")
pytestmark = needs_triton


@pytest.fixture
def third_rule(monkeypatch):
    """Makes Lion a rule of the Triton executor, with the step plan in Python, which knows it by its Rule."""
    monkeypatch.setitem(RULES, LION.name, LION)
    monkeypatch.setitem(updates.RULES, LION.name, lion.LION)
    monkeypatch.setitem(right.OPTIMIZERS, LION, ProxLion)
    monkeypatch.delitem(BUILT, "cpu", raising=False)


@pytest.mark.usefixtures("third_rule", "small_tiles")
def test_a_step_of_lion_is_right(launches):
    """First and later steps, of whole and of split groups, are right in both modes."""
    assert len(Path(lion.__file__).read_text().splitlines()) < 40
    for dtype in (torch.float32, torch.float16):
        for (shape, kernel), prox_mode in product({(20, 6): WHOLE, (70, 6): SPLIT}.items(), MODES):
            w, grad, exp_avg = inputs(shape, dtype)
            options = dict(lr=0.5, prox_mode=prox_mode, weight_decay=0.2, **coefficients(w, "feature"))
            launches.clear()
            first, *_ = check_step(BACKEND, w, grad, None, rule=LION, **options)
            check_step(BACKEND, w, grad, exp_avg, rule=LION, maximize=True, **options)
            assert [x.name for x in launches] == [kernel] * 2
            assert 0 < (first == 0).sum() < first.numel()
