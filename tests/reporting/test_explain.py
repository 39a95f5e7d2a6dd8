"""The public function explain: a table of what each parameter's penalty amounts to."""

import re

import pytest
import torch
from helpers.right import fresh
from torch import nn

from cges_kernels import ProxSGD, explain


def parsed(table):
    """The printed table as a list of {header: cell}."""
    header, *rows = [re.split(r"\s{2,}", line.strip()) for line in str(table).splitlines()]
    assert all(len(row) == len(header) for row in rows)
    return [dict(zip(header, row)) for row in rows]


def test_explain_shows_what_each_spec_amounts_to():
    """Layout, groups, coefficients and b*n of each parameter are those worked out by hand."""
    fc = {
        "params": [nn.Parameter(fresh((64, 48))), nn.Parameter(fresh((64,)))],
        "group_lasso": 1e-3,
        "exclusive_lasso": 0.25,
        "l1": 1e-5,
    }
    conv = {
        "params": [nn.Parameter(fresh((16, 8, 3, 3)).to(memory_format=torch.channels_last))],
        "exclusive_lasso": 0.5,
        "group_by": "channel",
        "lr": 0.01,
        "prox_mode": "exact",
    }
    heads = {"params": [nn.Parameter(fresh((2048, 1)))], "group_by": (1, 2), "view": (1024, 2, 1)}
    first, bias, second, third = parsed(explain(ProxSGD([fc, conv, heads], lr=0.05)))
    assert first == {
        "parameter": "param_groups[0][0]",
        "shape": "64x48",
        "group_by": "feature",
        "layout": "(1, 64, 48, 1)",
        "groups": "48",
        "group size": "64",
        "group_lasso": "0.001",
        "exclusive_lasso": "0.25",
        "l1": "1e-05",
        "lr": "0.05",
        "mode": "sequential",
        "b*n": "0.8",
    }
    no_groups = ("layout", "groups", "group size", "group_lasso", "exclusive_lasso", "b*n")
    assert bias == {
        **first,
        "parameter": "param_groups[0][1]",
        "shape": "64",
        **dict.fromkeys(no_groups, "-"),
    }
    assert (second["layout"], second["groups"], second["group size"]) == ("(1, 144, 8, 1)", "8", "144")
    assert (second["mode"], second["lr"], second["b*n"]) == ("exact", "0.01", "0.72")
    assert (third["group_by"], third["groups"], third["group size"]) == ("(1, 2) of 1024x2x1", "1,024", "2")


def test_explain_names_parameters_and_follows_a_changed_lr():
    """Rows carry the parameters' names, and b*n is computed from the present learning rate."""
    model = nn.Sequential(nn.Linear(8, 4), nn.Conv1d(4, 2, 3))
    optimizer = ProxSGD(model.named_parameters(), lr=torch.tensor(0.5), exclusive_lasso=0.1)
    table = parsed(explain(optimizer))
    assert [row["parameter"] for row in table] == [name for name, _ in model.named_parameters()]
    assert [row["b*n"] for row in table] == ["0.2", "-", "0.1", "-"]
    optimizer.param_groups[0]["lr"] = 0.05
    assert [row["b*n"] for row in parsed(explain(optimizer))] == ["0.02", "-", "0.01", "-"]


def test_explain_lines_its_columns_up():
    """All lines have the same length; a 0-d parameter is shown as "scalar"."""
    lines = str(explain(ProxSGD([nn.Parameter(fresh((6, 5))), nn.Parameter(fresh(()))], lr=0.1))).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert "scalar" in lines[2]


def test_explain_refuses_another_optimizer():
    """An optimizer of torch is a TypeError that says what was expected."""
    with pytest.raises(TypeError, match="expected a ProxSGD, got SGD"):
        explain(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    with pytest.raises(TypeError, match="expected a ProxSGD, got int"):
        explain(3)
