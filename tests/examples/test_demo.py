"""The demo: the command from end to end in small, and the text that it prints."""

import csv
import re

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from examples.common.methods import LABELS, METHODS
from examples.common.results import Results
from examples.demo import cli
from examples.demo.report import claims, nearest

TINY = ["--epochs", "1", "--seeds", "2", "--lambdas", "2", "--workers", "1"]
FIGURES = ("accuracy", "first_layer", "last_layer", "modes")
FILES = {*(f"{name}.{kind}" for name in FIGURES for kind in ("png", "csv")), "summary.txt", "runs.csv"}

pytestmark = pytest.mark.xdist_group("demo")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(folder, printed text) of one tiny run."""
    out = tmp_path_factory.mktemp("demo") / "new" / "out"
    assert cli.main([*TINY, "--out", str(out)]) == 0
    return out, (out / "summary.txt").read_text(encoding="utf-8")


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_file_is_there(demo):
    out, _ = demo
    assert {path.name for path in out.iterdir()} == FILES
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_table_is_complete_and_in_range(demo):
    out, text = demo
    rows = read(out / "accuracy.csv")
    assert [(row["arm"], float(row["lambda"])) for row in rows] == [
        (key, lam) for key, method in METHODS.items() for lam in method.lambdas(2)
    ]
    measures = [key.removesuffix("_ci") for key in rows[0] if key.endswith("_ci")]
    assert len(measures) == 9
    for row in rows:
        assert all(0 <= float(row[key]) <= 100 and float(row[f"{key}_ci"]) >= 0 for key in measures)
        assert float(row["classes_per_feature"]) <= 10
        assert float(row["flops_compacted"]) > 0
    assert all(float(row["nonzero"]) == 100 for row in rows if row["arm"] == "l2")
    assert all(label in text for label in LABELS.values())
    assert len(read(out / "runs.csv")) == 2 * len(rows)


def test_from_dense_to_small(demo):
    """The text has the report of a network, the result of compact on it, and the accuracy of both."""
    _, text = demo
    parts = ["From dense to small: the network of CGES", "dead groups", "total", "parameters", "latency, ms"]
    parts.append(r"Test accuracy: (\S+)% of the sparse network, (\S+)% of the small one")
    sparse, small = re.search(".*".join(parts), text, re.DOTALL).groups()
    assert sparse == small


def test_csv_beside_the_figures(demo):
    out, _ = demo
    assert len(read(out / "last_layer.csv")) == len(METHODS) * 10 * 100
    assert len(read(out / "first_layer.csv")) == len(METHODS) * 20 * 25
    for row in read(out / "modes.csv"):
        for mode in ("sequential", "exact"):
            assert float(row[f"{mode}_measured"]) == pytest.approx(float(row[f"{mode}_expected"]), abs=1.5)


def results(gain):
    """Two lambdas of each method. CGES is more accurate by ``gain``; in CGES and ES fewer classes compete."""
    rows = []
    for arm, method in METHODS.items():
        for seed in range(3):
            for lam, cost in zip(method.lambdas(2), (100.0, 10.0)):
                more = gain * (1 + 0.1 * seed)
                costs = ("nonzero", "flops_nonzero", "weights_compacted", "flops_compacted", "last_nonzero")
                row = {"arm": arm, "lambda": lam, "seed": seed, **dict.fromkeys(costs, cost)}
                row["accuracy"] = 90 + more * (arm == "cges")
                row["classes_per_feature"] = 5 - more * (arm in ("es", "cges"))
                rows.append(row)
    return Results(rows, LABELS)


@pytest.mark.parametrize("gain, judged", [(2.0, "holds"), (-2.0, "does not hold"), (0.0, "undecided")])
def test_claims_follow_the_numbers(gain, judged):
    lines = claims(results(gain)).splitlines()
    margins = [line for line in lines if "(90% to 10%)" in line]
    assert len(margins) == 4 * 4 + 2 * 2
    (over_dense,) = (line for line in lines if line.startswith("CGES") and "of the weights" in line)
    assert all(line.endswith(f": {judged}") for line in (*margins, over_dense))
    assert all(f"{1.1 * gain:+.2f} ±" in line for line in (*margins, over_dense))


def test_the_networks_that_are_shown():
    """The networks of repetition 0 nearest to 30% of the weights, in ratio: 10% is nearer than 100%."""
    rows = results(1.0).rows
    models = [torch.nn.Identity() for _ in rows]
    shown = nearest(Results(rows, LABELS), models)
    assert list(shown) == list(METHODS)
    for arm, (row, model) in shown.items():
        assert (row["arm"], row["seed"], row["nonzero"]) == (arm, 0, 10)
        assert model is models[next(i for i, x in enumerate(rows) if x is row)]


def test_the_demo_with_adamw(tmp_path):
    assert cli.main([*TINY, "--seeds", "1", "--optimizer", "adamw", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "summary.txt").read_text(encoding="utf-8")
    assert text.startswith("adamw: digits, network lenet, 1 epochs, 1 seeds, every λ times 8\n")
    assert "1 of 5 repetitions" in text and "nan" not in text
