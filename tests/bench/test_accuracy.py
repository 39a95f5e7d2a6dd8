"""bench.accuracy: loaders on files of the real formats, every experiment in small, errors, and the page."""

import csv
import gzip
import pickle
import re
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from bench.accuracy import cli, data, figures, networks, page, results
from bench.accuracy.arms import FIG3, on_layers
from bench.accuracy.experiments import EXPERIMENTS, Job, jobs_of, work
from bench.accuracy.training import Repetition, Settings, without_scaled
from cges_kernels import ProxSGD, compact
from cges_kernels.demo.training import METHODS

TINY = ["--epochs", "1", "--seeds", "2", "--lambdas", "1", "--jobs", "1"]
FILES = ("-runs.csv", ".csv", ".png", ".svg")

pytestmark = pytest.mark.xdist_group("accuracy")


def small_dataset(n=60, size=8, channels=1, classes=3):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, channels, size, size)).astype(np.float32)
    return data.Dataset(x, np.arange(n) % classes, classes, tested=n // 3)


def idx(path, array, magic=None):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = (magic or header) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def mnist_folder(folder, suffix=".gz"):
    rng = np.random.default_rng(0)
    for part, n in (("train", 30), ("t10k", 12)):
        idx(folder / f"{part}-images-idx3-ubyte{suffix}", rng.integers(0, 256, (n, 28, 28)))
        idx(folder / f"{part}-labels-idx1-ubyte{suffix}", np.arange(n) % 10)
    return folder


def cifar_folder(folder, names, key, classes):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in names:
        pixels = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
        content = {b"data": pixels, key: [int(i) for i in rng.integers(0, classes, 10)], b"batch_label": b"x"}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return folder


def cifar10_folder(folder):
    return cifar_folder(folder, [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], b"labels", 10)


def picture_folder(folder, classes=("cat", "dog"), n=6):
    from PIL import Image

    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (20 + i, 30), (40 * i, 9, 200)).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_mnist_from_idx_files(tmp_path, suffix):
    found = data.load("mnist", mnist_folder(tmp_path, suffix), 32)
    assert found.x.shape == (42, 1, 28, 28) and found.x.dtype == np.float32 and found.y.dtype == np.int64
    assert (found.tested, found.classes) == (12, 10)
    np.testing.assert_array_equal(found.y[:12], [*range(10), 0, 1])
    assert abs(found.x[:30].mean()) < 1e-3 and abs(found.x[:30].std() - 1) < 1e-3
    train, test = found.split(3)
    np.testing.assert_array_equal(np.concatenate([train, test]), np.arange(42))
    assert len(test) == 12


def test_cifar(tmp_path):
    inside = cifar10_folder(tmp_path / "cifar-10-batches-py")
    for folder in (inside, tmp_path):  # the folder itself, or the one that the archive was unpacked in
        ten = data.load("cifar10", folder, 32)
        assert ten.x.shape == (60, 3, 32, 32) and (ten.tested, ten.classes) == (10, 10)
    raw = pickle.loads((inside / "data_batch_1").read_bytes())[b"data"][0].reshape(3, 32, 32) / 255
    a, b = ten.x[0, 2].flatten(), raw[2].flatten()  # the blue plane, up to scale and shift
    np.testing.assert_allclose((a - a.mean()) / a.std(), (b - b.mean()) / b.std(), atol=1e-4)
    cifar_folder(tmp_path, ["train", "test"], b"fine_labels", 100)
    hundred = data.load("cifar100", tmp_path, 32)
    assert hundred.x.shape == (20, 3, 32, 32) and hundred.classes == 100


def test_image_folder(tmp_path):
    found = data.load("folder", picture_folder(tmp_path / "flat"), 16)
    assert found.x.shape == (12, 3, 16, 16) and found.tested == 0 and found.classes == 2
    np.testing.assert_array_equal(found.y, [0] * 6 + [1] * 6)
    for part in ("train", "val"):
        picture_folder(tmp_path / "split" / part)
    found = data.load("folder", tmp_path / "split", 16)
    assert found.x.shape == (24, 3, 16, 16) and found.tested == 12


class Evil:
    def __reduce__(self):
        return (print, ("code of a pickle ran",))


def test_bad_folders(tmp_path, capsys):
    """Each error names what is wrong."""

    def message(name, folder):
        with pytest.raises(data.DataError) as error:
            data.load(name, folder, 32)
        return str(error.value)

    for name in ("cifar10", "cifar100", "folder"):
        assert f"--data {name} needs --path" in message(name, None)
    for name in ("mnist", "cifar10", "cifar100", "folder"):
        assert f"{tmp_path / 'none'}: expected a folder" in message(name, tmp_path / "none")
    assert "train-images-idx3-ubyte.gz" in message("mnist", tmp_path)
    assert "data_batch_1" in message("cifar10", tmp_path)
    images = mnist_folder(tmp_path) / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:-40])
    assert f"{images}: cannot be read" in message("mnist", tmp_path)
    idx(images, np.zeros((30, 28, 28)), magic=b"PK\x03\x04" + bytes(12))
    assert f"{images}: expected an idx file" in message("mnist", tmp_path)
    idx(images, np.zeros((29, 28, 28)))
    assert "as many labels as images, got 30 and 29" in message("mnist", tmp_path)
    folder = cifar10_folder(tmp_path / "c")
    for content in (
        pickle.dumps(Evil()),
        b"not a pickle",
        pickle.dumps({b"data": np.zeros((2, 5), np.uint8)}),
    ):
        (folder / "data_batch_3").write_bytes(content)
        assert f"{folder / 'data_batch_3'}: expected CIFAR's python pickle" in message("cifar10", folder)
    assert capsys.readouterr().out == ""  # nothing in the pickle ran
    pictures = picture_folder(tmp_path / "p")
    (pictures / "cat" / "0.png").write_bytes(b"\x89PNG broken")
    assert f"{pictures / 'cat' / '0.png'}: cannot be read as an image" in message("folder", pictures)
    (tmp_path / "q" / "cat").mkdir(parents=True)
    assert "at least two, got 1" in message("folder", tmp_path / "q")
    (tmp_path / "q" / "dog").mkdir()
    assert f"{tmp_path / 'q' / 'cat'}: expected images" in message("folder", tmp_path / "q")


def test_the_thesis_networks():
    assert networks.parameters("mnist", 28, 1, 10) == 3_274_634
    assert networks.parameters("wrn-16-10", 32, 3, 10) == 17_116_634
    model = networks.WideResNet(3, 7, widen=1)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 7)
    assert (
        len(networks.scaled(model)) == 6
        and networks.scaled(networks.build("lenet", torch.zeros(1, 8, 8), 3)) == []
    )
    assert cli.SETTINGS["mnist"].epochs * 60000 // cli.SETTINGS["mnist"].batch == 30000


def test_lambdas_keep_their_effect_without_momentum():
    assert Settings(momentum=0.9).coefficient(0.5) == pytest.approx(0.5)
    assert Settings(momentum=0.0, strength=2).coefficient(0.5) == pytest.approx(0.1)


def test_layers_keep_their_mu():
    model = networks.build("lenet", torch.zeros(1, 8, 8), 10)
    both, conv = (
        ProxSGD(make(model, 0.1), lr=0.1)
        for make in (FIG3["cges"].param_groups, on_layers(lambda w: w.dim() > 2))
    )
    of = {name: g for opt in (both,) for g in opt.param_groups for name in g["param_names"]}
    for group in conv.param_groups:
        for name in group["param_names"]:
            for key in ("group_lasso", "exclusive_lasso"):
                assert group[key] == (of[name][key] if "conv" in name else 0)


@pytest.mark.parametrize("net", ["lenet_bn", "wrn"])
def test_slimming_counts_what_compact_removes(net):
    torch.manual_seed(0)
    model = (
        networks.build("lenet_bn", torch.zeros(1, 8, 8), 3)
        if net == "lenet_bn"
        else networks.WideResNet(1, 3, 1, 1)
    )
    for _, norm in networks.scaled(model):
        norm.bias.data.fill_(-0.5)  # behind relu nothing, so that padding does not matter
        norm.weight.data[::2] = 0
    x = torch.randn(3, 1, 8, 8)
    before = [p.clone() for p in model.parameters()]
    slim = without_scaled(model.eval())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    torch.testing.assert_close(slim(x), model(x))
    small = compact(slim, x)
    assert small.parameters[1] < small.parameters[0]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment(name, tmp_path):
    settings = Settings(epochs=1, batch=16)
    experiment = EXPERIMENTS[name]
    rows = [
        row for job in jobs_of(name, settings, 2, 1) for row in work(job, small_dataset(), settings, tmp_path)
    ]
    rows = [{"data": "random", "net": "lenet", "epochs": 1, **row} for row in rows]
    assert {row["arm"] for row in rows} == set(experiment.order)
    assert all(0 <= row[key] <= 100 for row in rows for key in results.MEASURES if key in row)
    cli.write(name, rows, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}{part}" for part in FILES}
    read = results.read_runs(tmp_path / f"{name}-runs.csv")
    assert [row["arm"] for row in read] == [row["arm"] for row in rows]
    with (tmp_path / f"{name}.csv").open() as file:
        summary = list(csv.DictReader(file))
    first = [row["accuracy"] for row in rows if all(row[k] == rows[0][k] for k in results.KEYS if k in row)]
    assert float(summary[0]["accuracy"]) == pytest.approx(np.mean(first), rel=1e-4)
    assert float(summary[0]["accuracy_ci"]) == pytest.approx(
        12.7062 * np.std(first, ddof=1) / 2**0.5, rel=1e-3
    )
    said = page.section(name, tmp_path)
    assert "2 seeds" in said and said.count("|") > 10
    if name == "fig4c":  # equal numbers, equal bytes
        assert figures.draw(name, read) == figures.draw(name, read)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Settings(), {"cges_norm", "slimming"}),
        (Settings(net="lenet_bn"), {"slimming"}),
        (Settings(net="wrn-16-10", pretrain_epochs=1), {"slimming"}),
        (Settings(pretrain_epochs=1), set()),
        (Settings(net="mnist"), set()),
    ],
)
def test_slimming_needs_batch_norm(settings, expected):
    assert {job.arm for job in jobs_of("fig3", settings, 1, 1)} - set(METHODS) == expected


def test_one_seed_decides_nothing():
    assert results.Interval.of([3.0]).verdict == "undecided"
    assert results.Interval.of([3.0, 3.1, 3.2]).verdict == "holds"
    assert results.Interval.of([-3.0, -3.1, -3.2]).verdict == "does not hold"
    assert results.Interval.of([-3.0, 3.0]).verdict == "undecided"


def test_fine_tuning_starts_from_the_same_network(tmp_path):
    settings = replace(Settings(epochs=1, batch=16), pretrain_epochs=1)
    work(Job("l2", "", 0.0, 1), small_dataset(), settings, tmp_path)
    repetition = Repetition(small_dataset(), settings, tmp_path, 1)
    (kept,) = tmp_path.iterdir()
    state = torch.load(kept, weights_only=True)
    for key, value in repetition.network().state_dict().items():
        assert torch.equal(value, state[key])
    when = kept.stat().st_mtime_ns
    repetition.pretrain()
    assert kept.stat().st_mtime_ns == when


def test_the_command(tmp_path, capsys):
    assert cli.main(["fig4c", *TINY, "--out", str(tmp_path / "new" / "out")]) == 0
    assert "fig4c.csv" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == {f"fig4c{part}" for part in FILES}


def test_failure_leaves_the_old_files(tmp_path, monkeypatch):
    (tmp_path / "fig4c.csv").write_text("good")
    monkeypatch.setattr(figures, "draw", lambda name, rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["fig4c", *TINY, "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["fig4c.csv"]
    assert (tmp_path / "fig4c.csv").read_text() == "good"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fig9"], "invalid choice: 'fig9'"),
        (["fig3", "--strength", "-1"], "expected a number above 0, got '-1'"),
        (["fig3", "--seeds", "0"], "at least 1, got '0'"),
        (["fig3", "--path", "x"], "come with scikit-learn"),
        (["fig3", "--data", "cifar10", "--path", "no/such", "--out", "OUT"], "no/such: expected a folder"),
        (["fig3", "--out", "FILE"], "--out: expected a folder to write to"),
    ],
)
def test_bad_arguments(arguments, expected, tmp_path, capsys):
    (tmp_path / "FILE").touch()
    arguments = [str(tmp_path / a) if a in ("OUT", "FILE") else a for a in arguments]
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code != 0
    assert expected in capsys.readouterr().err


def test_the_page_is_that_of_the_results():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.with_measured(text) == text, "run `python -m bench.accuracy page`"
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert [link for link in links if not (page.PAGE.parent / link).exists()] == []
