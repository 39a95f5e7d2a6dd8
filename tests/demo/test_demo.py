"""The demo: its data, one run, the table and the claims it draws, and the command from end to end."""

import copy
import csv
import gzip
import hashlib
import json
import math
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from cges_kernels.demo import cli, figures
from cges_kernels.demo.claims import claims, margin, verdict
from cges_kernels.demo.data import FOLDS, Images, load_digits, load_mnist, split
from cges_kernels.demo.results import Estimate, summarise, table
from cges_kernels.demo.speed import measure
from cges_kernels.demo.training import MEASURES, METHODS, Job, LeNet, Run, Settings, compacted, train_all

TINY = ["--epochs", "1", "--seeds", "2", "--lambdas", "2", "--workers", "1"]
FILES = {
    *(f"{name}.{kind}" for name in figures.FIGURES for kind in ("png", "csv")),
    *("summary.txt", "runs.csv", "speed.csv"),
}


pytestmark = pytest.mark.xdist_group("demo")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(folder, printed text) of one tiny run."""
    out = tmp_path_factory.mktemp("demo") / "new" / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "measure", partial(measure, rounds=1))
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
    assert [(row["method"], float(row["lambda"])) for row in rows] == [
        (key, lam) for key, method in METHODS.items() for lam in method.lambdas(2)
    ]
    for row in rows:
        for name in set(MEASURES) - {"classes_per_feature"}:
            assert 0 <= float(row[name]) <= 100
            assert float(row[f"{name}_se"]) >= 0
        assert 0 <= float(row["classes_per_feature"]) <= 10
        assert float(row["flops_compacted"]) > 0
    assert all(float(row["nonzero"]) == 100 for row in rows if row["method"] == "l2")
    for method in METHODS.values():
        assert method.label in text
    assert len(read(out / "runs.csv")) == 2 * len(rows)


def test_csv_beside_the_figures(demo):
    out, _ = demo
    assert len(read(out / "last_layer.csv")) == len(METHODS) * 10 * 100
    assert len(read(out / "first_layer.csv")) == len(METHODS) * 20 * 25
    for row in read(out / "modes.csv"):
        for mode in ("sequential", "exact"):
            assert float(row[f"{mode}_measured"]) == pytest.approx(float(row[f"{mode}_expected"]), abs=1.5)
    for row in read(out / "speed.csv"):
        assert min(float(row[name]) for name in ("torch_fused_ms", "proximal_ms", "reference_ms")) > 0


@pytest.mark.full("training alone and in two processes gives the same runs")
def test_same_runs_whatever_the_workers(demo):
    out, _ = demo
    jobs = [Job("cges", METHODS["cges"].lambdas(2)[1], seed) for seed in (0, 1)]
    images, settings = load_digits(), Settings(epochs=1)
    threads = torch.get_num_threads()
    alone = list(train_all(jobs, images, settings, workers=1))
    assert torch.get_num_threads() == threads
    together = sorted(train_all(jobs, images, settings, workers=2), key=lambda run: run.seed)
    assert alone == together
    for a, b in zip(alone, together):
        np.testing.assert_array_equal(a.first, b.first)
        np.testing.assert_array_equal(a.last, b.last)
    recorded = [row for row in read(out / "runs.csv") if row["method"] == "cges"][1::2]
    for run, row in zip(alone, recorded):
        assert float(row["accuracy"]) == pytest.approx(run.accuracy, rel=1e-5)


def test_failure_leaves_the_old_files(tmp_path, monkeypatch):
    (tmp_path / "runs.csv").write_text("good")
    monkeypatch.setattr(cli, "measure", lambda size, device, optimizer: [])
    monkeypatch.setitem(figures.FIGURES, "last_layer", lambda runs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main([*TINY, "--seeds", "1", "--lambdas", "1", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]
    assert (tmp_path / "runs.csv").read_text() == "good"


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--data", "--device", "--seeds", "--out", "--epochs"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--colour"], "unrecognized arguments: --colour"),
        (["--data", "cifar"], "invalid choice: 'cifar'"),
        (["--device", "teapot"], "argument --device: expected one of this machine, got 'teapot'"),
        (["--device", "meta"], "argument --device: expected one of this machine, got 'meta'"),
        (["--device", "cuda:99"], "argument --device: expected one of this machine, got 'cuda:99'"),
        (["--seeds", "0"], "argument --seeds: expected a whole number of at least 1, got '0'"),
        (["--out", __file__], "argument --out: expected a folder to write to"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_extra(monkeypatch, capsys):
    monkeypatch.setitem(cli.EXTRAS, "no_such_module", "no-such-package")
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 1
    assert "needs no-such-package: pip install cges_kernels[demo]" in capsys.readouterr().err


def test_digits_and_folds():
    images = load_digits()
    assert images.x.shape == (1797, 1, 8, 8) and images.x.dtype == np.float32
    assert images.x.min() == 0 and images.x.max() == 1
    assert set(images.y) == set(range(10))
    folds = [split(images.y, seed) for seed in range(FOLDS)]
    assert sorted(np.concatenate([train for train, _ in folds])) == list(range(1797))
    for train, test in folds:
        assert abs(len(train) - 1797 / 5) < 1
        assert sorted([*train, *test]) == list(range(1797))
    assert not np.array_equal(split(images.y, 0)[0], split(images.y, FOLDS)[0])


def openml_folder(folder, pixels, labels):
    """What scikit-learn keeps of mnist_784 after downloading it, for a few images."""
    names = [f"pixel{i + 1}" for i in range(pixels.shape[1])]
    lines = ["@RELATION mnist_784", *(f"@ATTRIBUTE {name} real" for name in names)]
    lines += ["@ATTRIBUTE class {0,1,2,3,4,5,6,7,8,9}", "@DATA"]
    lines += [",".join(map(str, [*row, label])) for row, label in zip(pixels, labels)]
    arff = "\n".join(lines).encode()
    features = [{"name": name, "data_type": "numeric", "is_target": "false"} for name in names]
    features += [{"name": "class", "data_type": "nominal", "is_target": "true"}]
    features = [
        {"index": str(i), "is_ignore": "false", "is_row_identifier": "false", "number_of_missing_values": "0"}
        | feature
        for i, feature in enumerate(features)
    ]
    api = "api/v1/json/data"
    url = "https://api.openml.org/data/v1/download/52667/mnist_784.arff"
    described = {"id": "554", "name": "mnist_784", "version": "1", "format": "ARFF", "status": "active"}
    described |= {
        "description": "Handwritten digits.",
        "file_id": "52667",
        "url": url,
        "md5_checksum": hashlib.md5(arff).hexdigest(),
    }
    found = {"did": 554, "name": "mnist_784", "version": 1, "status": "active", "format": "ARFF"}
    qualities = [{"name": "NumberOfInstances", "value": str(float(len(labels)))}]
    answers = {
        f"{api}/list/data_name/mnist_784/limit/2/data_version/1": {"data": {"dataset": [found]}},
        f"{api}/554": {"data_set_description": described},
        f"{api}/features/554": {"data_features": {"feature": features}},
        f"{api}/qualities/554": {"data_qualities": {"quality": qualities}},
    }
    files = {path: json.dumps(answer).encode() for path, answer in answers.items()}
    files["data/v1/download/52667/mnist_784.arff"] = arff
    for path, content in files.items():
        place = folder / "openml" / "openml.org" / f"{path}.gz"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(gzip.compress(content))


def no_network(*args, **kwargs):
    raise ConnectionRefusedError("no network in tests")


def test_mnist_from_openml_files(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (12, 784)), np.arange(12) % 10
    openml_folder(tmp_path, pixels, labels)
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    monkeypatch.setattr("sklearn.datasets._openml.urlopen", no_network)
    images = load_mnist()
    assert images.x.shape == (12, 1, 28, 28) and images.x.dtype == np.float32
    np.testing.assert_allclose(images.x.reshape(12, 784), pixels / 255, rtol=1e-6)
    np.testing.assert_array_equal(images.y, labels)
    assert images.y.dtype == np.int64
    (run,) = train_all([Job("l1", 0.01, 0)], images, Settings(epochs=1, batch=2), workers=1)
    assert 0 <= run.accuracy <= 100


def test_mnist_without_a_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sklearn.datasets.fetch_openml", no_network)
    with pytest.raises(SystemExit) as stop:
        cli.main(["--data", "mnist", "--out", str(tmp_path)])
    assert stop.value.code == 1
    message = "--data mnist: expected mnist_784 from openml.org, got: no network in tests"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("size", [8, 28])
def test_compacted_computes_the_same(size):
    torch.manual_seed(0)
    model = LeNet(size).double().eval()
    layers = [model.conv1, model.conv2, model.fc1, model.fc2]
    with torch.no_grad():
        for layer in layers[:-1]:
            layer.weight[torch.rand(len(layer.weight)) < 0.4] = 0  # dead units: they still have a bias
        model.conv2.weight[:, ::4] = 0  # channels that nothing reads
        model.fc1.weight.view(100, 40, -1)[:, :20] = 0
        model.fc2.weight[:, ::3] = 0
    before = copy.deepcopy(model.state_dict())
    small = compacted(model)
    x = torch.rand(5, 1, size, size, dtype=torch.float64)
    torch.testing.assert_close(small(x), model(x))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    left = [torch.count_nonzero(layer.weight).item() for layer in (small.conv1, small.conv2, small.fc1)]
    for n, layer in zip(left, layers):
        assert n < torch.count_nonzero(layer.weight)
    for below, above in zip([small.conv1, small.conv2, small.fc1], [small.conv2, small.fc1, small.fc2]):
        alive = (below.weight != 0).flatten(1).any(1)
        read = (above.weight.view(len(above.weight), len(alive), -1) != 0).any(2).any(0)
        assert torch.equal(alive, read)


def run_of(method, lam, seed, cost, accuracy, last_nonzero=50.0, classes=5.0):
    weights = np.zeros((1, 1, 1, 1))
    numbers = (accuracy, cost, cost, cost, 0.0, 0.0, last_nonzero, classes)
    return Run(method, lam, seed, *numbers, weights, weights)


def invented(gain, noise=0.1):
    """Accuracy falls by one point as the cost halves; CGES has ``gain`` points more than all others."""
    runs = []
    for method in METHODS:
        for seed in range(3):
            for i, lam in enumerate(METHODS[method].lambdas(5)):
                cost = 100.0 if method == "l2" else 100 / 2**i
                accuracy = 95 + math.log2(cost / 100) + gain * (method == "cges") * (1 + noise * (seed - 1))
                runs.append(run_of(method, lam, seed, cost, accuracy))
    return runs


def test_margin_at_equal_cost():
    found = margin(invented(2.0), "cges", "l1", "nonzero")
    assert found.levels == (90, 80, 70, 60, 50, 40, 30, 20, 15, 10, 7)  # the curves end at 6.25%
    assert found.estimate.mean == pytest.approx(2)
    assert found.estimate.error == pytest.approx(0.2 / math.sqrt(3))
    assert found.lowest == pytest.approx(2) and found.highest == pytest.approx(2)
    assert margin(invented(2.0), "cges", "l2", "nonzero") is None  # l2 is at 100% only


@pytest.mark.parametrize("gain, judged", [(2.0, "holds"), (-2.0, "does not hold"), (0.0, "undecided")])
def test_claims_follow_the_numbers(gain, judged):
    lines = [x for x in claims(invented(gain)).splitlines() if "CGES against" in x and "points" in x]
    assert len(lines) == 12
    assert all(line.endswith(f": {judged}") for line in lines)
    assert all(f" {gain:+.1f} ±" in line for line in lines)


def test_verdict_needs_two_standard_errors():
    assert verdict(Estimate(1.0, 0.4)) == "holds"
    assert verdict(Estimate(1.0, 0.6)) == "undecided"
    assert verdict(Estimate(-1.0, 0.4)) == "does not hold"
    assert verdict(Estimate.of([1.0])).startswith("undecided (one repetition")


def test_table_means_and_errors():
    runs = [run_of("es", 0.1, seed, 50.0, accuracy) for seed, accuracy in enumerate([90.0, 92.0, 94.0])]
    (row,) = summarise(runs)
    assert row.values["accuracy"] == pytest.approx((92.0, 2 / math.sqrt(3)))
    assert "92.0 ±1.2" in table([row])


def test_networks_fit_both_sizes():
    for size in (8, 28):
        assert LeNet(size)(torch.zeros(2, 1, size, size)).shape == (2, 10)
    assert Images(np.zeros((1, 1, 28, 28)), np.zeros(1)).size == 28


def test_the_demo_with_adamw(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "measure", partial(measure, rounds=1))
        assert cli.main([*TINY, "--seeds", "1", "--optimizer", "adamw", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "summary.txt").read_text(encoding="utf-8")
    assert "LeNet on digits with ProxAdamW" in text and "torch AdamW, fused" in text
    strongest = {row["method"]: float(row["lambda"]) for row in read(tmp_path / "accuracy.csv")}
    assert strongest == {key: method.lambdas(2, 8)[1] for key, method in METHODS.items()}
