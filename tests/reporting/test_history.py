"""SparsityHistory: its rows, resumed runs, files that are never half written, and TensorBoard."""

import csv
import sys

import pytest
import torch
from torch import nn

from cges_kernels import SparsityHistory, sparsity_report


def model_with(nonzero):
    """A 2x5 layer whose first row begins with ``nonzero`` ones, the rest 0, and a layer of 4 ones."""
    model = nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.zero_()[0, :nonzero] = 1
        model[1].weight.fill_(1)
    return model


def read(path):
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_row_per_step_and_layer(tmp_path):
    """Each step has a row for each layer and one for the total, with the values worked out by hand."""
    history = SparsityHistory(tmp_path / "history.csv")
    history.add(0, sparsity_report(model_with(5)), loss=2.5)
    history.add(10, sparsity_report(model_with(2), torch.ones(3, 5)), loss=1.25)
    rows = read(tmp_path / "history.csv")
    assert [(row["step"], row["layer"]) for row in rows] == [
        (step, layer) for step in ("0", "10") for layer in ("0.weight", "1.weight", "total")
    ]
    assert [row["nonzero"] for row in rows] == ["5", "4", "9", "2", "4", "6"]
    assert [row["percent_nonzero"] for row in rows[3:]] == ["20", "100", "42.8571"]
    assert [row["dead_groups"] for row in rows[::3]] == ["0", "3"]
    assert [row["dead_outputs"] for row in rows[::3]] == ["1", "1"]
    assert [row["flops"] for row in rows] == ["", "", "", "60", "24", "84"]
    assert [row["loss"] for row in rows] == ["", "", "2.5", "", "", "1.25"]


def test_a_resumed_run_leaves_no_gap_and_no_double(tmp_path):
    """Adding a step again drops it and all later steps, so that the file shows one run."""
    path = tmp_path / "history.csv"
    first = SparsityHistory(path)
    for step in (0, 1, 2, 3):
        first.add(step, sparsity_report(model_with(5 - step)), loss=0.5 + step)
    resumed = SparsityHistory(path)
    resumed.add(2, sparsity_report(model_with(1)), loss=9.0)
    totals = [row for row in read(path) if row["layer"] == "total"]
    assert [(row["step"], row["nonzero"], row["loss"]) for row in totals] == [
        *(("0", "9", "0.5"), ("1", "8", "1.5"), ("2", "5", "9"))
    ]
    SparsityHistory(path).add(0, sparsity_report(model_with(3)))
    assert [row["step"] for row in read(path)] == ["0"] * 3


def test_a_file_of_something_else_is_left_alone(tmp_path):
    """A CSV file that is no history is an error and is not overwritten."""
    path = tmp_path / "accounts.csv"
    path.write_text("name,sum\nme,12\n")
    with pytest.raises(
        ValueError, match=r"accounts\.csv: expected a sparsity history, with columns step and"
    ):
        SparsityHistory(path)
    assert path.read_text() == "name,sum\nme,12\n"


def test_what_is_no_step_no_report_or_takes_a_column_is_refused(tmp_path):
    """Nothing is written then, and the file can still be read; a tensor is written as its number."""
    history, report = SparsityHistory(tmp_path / "s.csv"), sparsity_report(nn.Linear(3, 2))
    history.add(1, report, loss=torch.tensor(0.5))
    for step, what, values, words in [
        *((x, report, {}, "step: expected an int, got") for x in ("2", None, 1.5, True, torch.tensor(2))),
        (2, str(report), {}, "report: expected a SparsityReport, got str"),
        *((2, report, {key: 0}, "values: expected other names .* got") for key in ("layer", "nonzero")),
    ]:
        with pytest.raises((TypeError, ValueError), match=words):
            history.add(step, what, **values)
    assert SparsityHistory(tmp_path / "s.csv").rows[-1]["loss"] == "0.5" and len(history.rows) == 2


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """When the disk is full the old file stays whole and no temporary file is left."""
    path = tmp_path / "history.csv"
    history = SparsityHistory(path)
    history.add(0, sparsity_report(model_with(5)))
    old = path.read_bytes()

    def fail(file, text, encoding):
        file.write_bytes(text[:10].encode())
        raise OSError("disk full")

    monkeypatch.setattr(type(path), "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        history.add(1, sparsity_report(model_with(4)))
    assert path.read_bytes() == old and [x.name for x in tmp_path.iterdir()] == ["history.csv"]


class Recorder:
    """Stands in for a TensorBoard writer and remembers what it is given."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag, step] = value

    def flush(self):
        self.flushed = True


def test_scalars():
    """A given writer gets each layer's numbers and the extra ones under the step, and is flushed."""
    writer = Recorder()
    history = SparsityHistory(tensorboard=writer)
    history.add(7, sparsity_report(model_with(2)), loss=0.5)
    assert writer.scalars["percent_nonzero/0.weight", 7] == 20
    assert writer.scalars["dead_groups/total", 7] == 3
    assert writer.scalars["loss", 7] == 0.5 and writer.flushed
    assert not any("flops" in tag for tag, _ in writer.scalars)


def test_tensorboard_reads_them(tmp_path):
    """TensorBoard itself reads the numbers from a folder that the history wrote."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = SparsityHistory(tensorboard=tmp_path)
    for step in (1, 2):
        history.add(step, sparsity_report(model_with(step)))
    history.writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("percent_nonzero/0.weight")] == [(1, 10), (2, 20)]


def test_without_tensorboard(monkeypatch):
    """Asking for TensorBoard where it is missing is an ImportError that says what to install."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="tensorboard='runs' needs it installed: pip install tensorboard"):
        SparsityHistory(tensorboard="runs")
