"""The images that the examples train on, from files of the real formats, and the errors for bad files."""

import pickle
import struct
import sys

import numpy as np
import pytest
import torch
from helpers.vision import torchvision

pytest.importorskip("sklearn")

from examples.common import data, networks


def idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def mnist_folder(folder):
    rng = np.random.default_rng(0)
    for part, n in (("train", 30), ("t10k", 12)):
        idx(folder / "MNIST" / "raw" / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28)))
        idx(folder / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte", np.arange(n) % 10)
    return folder


def cifar_folder(folder, names, key, classes):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in names:
        pixels = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
        content = {"data": pixels, key: [int(i) for i in rng.integers(0, classes, 10)]}
        (folder / name).write_bytes(pickle.dumps(content))
    meta = {"label_names": [*"abcdefghij"], "fine_label_names": [str(i) for i in range(100)]}
    for name in ("batches.meta", "meta"):
        (folder / name).write_bytes(pickle.dumps(meta))


def picture_folder(folder, classes=("cat", "dog"), n=6):
    from PIL import Image

    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (20 + i, 30), (40 * i, 9, 200)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def vision(monkeypatch):
    """torchvision, which takes any file for the published one and downloads nothing."""
    datasets = (torchvision() or pytest.skip("needs torchvision")).datasets

    def no_network(*args, **kwargs):
        raise RuntimeError("no network in tests")

    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, *args: True)
    for module in (datasets.mnist, datasets.cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", no_network)


def test_digits_and_folds():
    found = data.load("digits")
    assert found.x.shape == (1797, 1, 8, 8) and found.x.dtype == np.float32 and found.y.dtype == np.int64
    assert found.x.min() == 0 and found.x.max() == 1
    assert set(found.y) == set(range(10)) and (found.classes, found.tested) == (10, 0)
    folds = [found.split(seed) for seed in range(data.FOLDS)]
    assert sorted(np.concatenate([train for train, _ in folds])) == list(range(1797))
    for train, test in folds:
        assert abs(len(train) - 1797 / 5) < 1
        assert sorted([*train, *test]) == list(range(1797))
    assert not np.array_equal(found.split(0)[0], found.split(data.FOLDS)[0])


def test_mnist(tmp_path, vision):
    found = data.load("mnist", mnist_folder(tmp_path))
    assert found.x.shape == (42, 1, 28, 28) and found.x.dtype == np.float32 and found.y.dtype == np.int64
    assert (found.tested, found.classes) == (12, 10)
    np.testing.assert_array_equal(found.y[:12], [*range(10), 0, 1])
    assert abs(found.x[:30].mean()) < 1e-3 and abs(found.x[:30].std() - 1) < 1e-3
    train, test = found.split(3)
    np.testing.assert_array_equal(np.concatenate([train, test]), np.arange(42))
    assert len(test) == 12


def test_cifar(tmp_path, vision):
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    cifar_folder(tmp_path / "cifar-10-batches-py", names, "labels", 10)
    ten = data.load("cifar10", tmp_path)
    assert ten.x.shape == (60, 3, 32, 32) and (ten.tested, ten.classes) == (10, 10)
    first = pickle.loads((tmp_path / "cifar-10-batches-py" / "data_batch_1").read_bytes())
    raw = first["data"][0].reshape(3, 32, 32) / 255
    a, b = ten.x[0, 2].flatten(), raw[2].flatten()  # the blue plane, up to scale and shift
    np.testing.assert_allclose((a - a.mean()) / a.std(), (b - b.mean()) / b.std(), atol=1e-4)
    cifar_folder(tmp_path / "cifar-100-python", ["train", "test"], "fine_labels", 100)
    hundred = data.load("cifar100", tmp_path)
    assert hundred.x.shape == (20, 3, 32, 32) and hundred.classes == 100


def test_image_folder(tmp_path, vision):
    found = data.load("folder", picture_folder(tmp_path / "flat"), 16)
    assert found.x.shape == (12, 3, 16, 16) and found.tested == 0 and found.classes == 2
    assert 0 <= found.x.min() and found.x.max() <= 1
    np.testing.assert_array_equal(found.y, [0] * 6 + [1] * 6)
    for part in ("train", "val"):
        picture_folder(tmp_path / "split" / part)
    found = data.load("folder", tmp_path / "split", 16)
    assert found.x.shape == (24, 3, 16, 16) and found.tested == 12


def test_bad_folders(tmp_path, vision, monkeypatch):
    """Each error names what is wrong."""

    def message(name, folder):
        with pytest.raises(data.DataError) as error:
            data.load(name, folder)
        return str(error.value)

    assert "--path: the digits come with scikit-learn" in message("digits", tmp_path)
    for name in ("mnist", "cifar10", "cifar100", "folder"):
        assert f"--data {name} needs --path" in message(name, None)
    assert "no network in tests" in message("mnist", tmp_path)
    assert f"'{tmp_path / 'none'}'" in message("folder", tmp_path / "none")
    pictures = picture_folder(tmp_path / "p")
    (pictures / "cat" / "0.png").write_bytes(b"\x89PNG broken")
    assert f"{pictures / 'cat' / '0.png'}" in message("folder", pictures)
    (tmp_path / "q" / "cat").mkdir(parents=True)
    assert "cat" in message("folder", tmp_path / "q")
    picture_folder(tmp_path / "one", classes=("cat",), n=12)
    assert "expected 10 images or more in 2 classes or more, got 12 in 1" in message(
        "folder", tmp_path / "one"
    )
    picture_folder(tmp_path / "few", n=3)
    assert "got 6 in 2" in message("folder", tmp_path / "few")
    for part, classes in (("train", ("cat", "dog")), ("test", ("cat", "fox"))):
        picture_folder(tmp_path / "other" / part, classes)
    assert "expected the classes ['cat', 'dog'], got ['cat', 'fox']" in message("folder", tmp_path / "other")
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    for name in ("mnist", "folder"):
        assert f"need a torchvision that matches torch {torch.__version__} (pip" in message(name, tmp_path)


def test_networks():
    def parameters(name, *shape):
        with torch.device("meta"):
            return sum(p.numel() for p in networks.NETS[name](*shape).parameters())

    assert parameters("mnist", 28, 1, 10) == 3_274_634
    assert parameters("wrn-16-10", 32, 3, 10) == 17_116_634
    for size in (8, 28):
        assert networks.LeNet(size)(torch.zeros(2, 1, size, size)).shape == (2, 10)
    model = networks.WideResNet(3, 7, widen=1)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 7)
    assert len(networks.scaled(model)) == 6
    assert networks.scaled(networks.build("lenet", torch.zeros(1, 8, 8), 3)) == []
