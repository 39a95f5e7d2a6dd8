"""Images to train and to test on: digits, MNIST and CIFAR as they are published, and folders of images."""

from __future__ import annotations

import gzip
import pickle
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cges_kernels.demo.data import load_digits, load_mnist, split

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class DataError(Exception):
    """A folder or file that is missing or not what it should be; the message names it."""


class Dataset(NamedTuple):
    """Images [N, channels, size, size] as float32 and labels 0..classes-1 as int64."""

    x: np.ndarray
    y: np.ndarray
    classes: int
    tested: int = 0  # how many at the end are the published test set; 0: one fold trains, the others test

    def split(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(indices to train on, indices to test on) of repetition ``seed``."""
        if not self.tested:
            return split(self.y, seed)
        rows = np.arange(len(self.y))
        return rows[: -self.tested], rows[-self.tested :]


def _joined(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], classes: int
) -> Dataset:
    """Both sets, in units of the training set's standard deviation from its mean, channel by channel."""
    x = np.concatenate([train[0], test[0]]).astype(np.float32)
    of_train = x[: len(train[0])]
    x -= of_train.mean((0, 2, 3), keepdims=True)
    x /= np.maximum(of_train.std((0, 2, 3), keepdims=True), 1e-6)
    return Dataset(x, np.concatenate([train[1], test[1]]).astype(np.int64), classes, len(test[1]))


def _folder(path: Path | None, data: str, holding: str) -> Path:
    if path is None:
        raise DataError(f"--data {data} needs --path, a folder with {holding}")
    if not path.is_dir():
        raise DataError(f"{path}: expected a folder with {holding}, got {_kind(path)}")
    return path


def _kind(path: Path) -> str:
    return "a file" if path.exists() else "nothing there"


def _found(folder: Path, names: Sequence[str]) -> Path:
    """The first of the names that is a file in the folder."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder}: expected a file {' or '.join(names)}, got none")


def _bytes(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def read_idx(path: Path, dims: int) -> np.ndarray:
    """An idx file of unsigned bytes (MNIST's format), gzipped or not, with ``dims`` dimensions."""
    content, start = _bytes(path), 4 + 4 * dims
    if len(content) < start or content[:4] != bytes([0, 0, 8, dims]):
        raise DataError(
            f"{path}: expected an idx file of unsigned bytes in {dims} dimensions, "
            f"got {len(content)} bytes that begin with {content[:4].hex()}"
        )
    shape = struct.unpack(f">{dims}I", content[4:start])
    if len(content) - start != int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"{path}: expected the bytes of {shape} elements, got {len(content) - start}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def mnist(path: Path | None, size: int) -> Dataset:
    """The four idx files, or openml.org's copy without a path; 60,000 train and 10,000 test."""
    del size
    if path is None:
        images = load_mnist()
        return _joined((images.x[:-10000], images.y[:-10000]), (images.x[-10000:], images.y[-10000:]), 10)
    folder = _folder(path, "mnist", "the four idx files")
    parts = []
    for part in ("train", "t10k"):
        names = [f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"]
        images, labels = (_found(folder, (f"{name}.gz", name)) for name in names)
        x, y = read_idx(images, 3)[:, None] / np.float32(255), read_idx(labels, 1)
        _check(folder, x, y, 10)
        parts.append((x, y))
    return _joined(*parts, 10)


def _check(where: Path, x: np.ndarray, y: np.ndarray, classes: int) -> None:
    if len(x) != len(y) or not len(x):
        raise DataError(f"{where}: expected as many labels as images, got {len(y)} and {len(x)}")
    if x.shape[-1] != x.shape[-2] or x.shape[-1] < 8:
        raise DataError(f"{where}: expected square images of 8x8 or more, got {x.shape[-2:]}")
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise DataError(f"{where}: expected labels 0 to {classes - 1}, got {int(y.min())} to {int(y.max())}")


class _ArraysOnly(pickle.Unpickler):
    """Loads CIFAR's pickles and nothing that could run code: arrays of numbers, and built-in containers."""

    ALLOWED = frozenset(
        (module, name)
        for name in ("_reconstruct", "ndarray", "dtype")
        for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
    ) | {("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")
        return super().find_class(module, name)


def read_cifar(path: Path, key: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images in [0, 1] and labels of one of CIFAR's python pickles; ``key`` is that of the labels."""
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
        x, y = np.asarray(content[b"data"]), np.asarray(content[key], dtype=np.int64)
    except Exception as error:  # a broken pickle raises nearly anything
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{path}: expected CIFAR's python pickle with {key.decode()}, got {reason}"
        ) from error
    if x.dtype != np.uint8 or x.ndim != 2 or x.shape[1] != 3072 or y.ndim != 1:
        raise DataError(f"{path}: expected data of [N, 3072] bytes, got {x.dtype} {list(x.shape)}")
    return x.reshape(-1, 3, 32, 32) / np.float32(255), y


def _cifar(
    path: Path | None, classes: int, train: Sequence[str], test: str, key: bytes, name: str
) -> Dataset:
    folder = _folder(path, f"cifar{classes}", f"{train[0]} and {test}, or the folder {name}")
    if (folder / name).is_dir():
        folder = folder / name
    parts = []
    for files in (train, [test]):
        read = [read_cifar(_found(folder, [file]), key) for file in files]
        x, y = (np.concatenate(column) for column in zip(*read))
        _check(folder, x, y, classes)
        parts.append((x, y))
    return _joined(*parts, classes)


def cifar10(path: Path | None, size: int) -> Dataset:
    """The six python pickles."""
    del size
    train = [f"data_batch_{i}" for i in range(1, 6)]
    return _cifar(path, 10, train, "test_batch", b"labels", "cifar-10-batches-py")


def cifar100(path: Path | None, size: int) -> Dataset:
    """The two python pickles, with the hundred fine labels."""
    del size
    return _cifar(path, 100, ["train"], "test", b"fine_labels", "cifar-100-python")


def _picture(path: Path, size: int) -> np.ndarray:
    """The middle square as [3, size, size] in [0, 1]."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            square = ImageOps.fit(image.convert("RGB"), (size, size))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image: {error}") from error
    return np.asarray(square, np.float32).transpose(2, 0, 1) / 255


def _pictures(folder: Path, classes: Sequence[str], size: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels = [], []
    for label, name in enumerate(classes):
        paths = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in PICTURES)
        if not paths:
            raise DataError(f"{folder / name}: expected images ({', '.join(PICTURES)}), got none")
        images += [_picture(path, size) for path in paths]
        labels += [label] * len(paths)
    return np.stack(images), np.array(labels)


def _subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def image_folder(path: Path | None, size: int) -> Dataset:
    """A folder per class, each image cut to its middle square; or train/ and test/ (or val/) of such."""
    folder = _folder(path, "folder", "a folder of images per class, or train/ and test/ of such folders")
    inside = _subfolders(folder)
    test = next((name for name in ("test", "val") if name in inside), None)
    train = folder / "train" if test and "train" in inside else folder
    classes = _subfolders(train)
    if len(classes) < 2:
        raise DataError(f"{train}: expected a folder of images per class, at least two, got {len(classes)}")
    x, y = _pictures(train, classes, size)
    _check(train, x, y, len(classes))
    if train != folder:
        return _joined((x, y), _pictures(folder / str(test), classes, size), len(classes))
    if len(y) < 10:
        raise DataError(f"{folder}: expected at least 10 images, got {len(y)}")
    return Dataset(x, y, len(classes))


def digits(path: Path | None, size: int) -> Dataset:
    """1,797 scans of 8x8, shipped with scikit-learn: one fold of five trains, the others test."""
    del path, size
    return Dataset(*load_digits(), classes=10)


LOADERS = {"digits": digits, "mnist": mnist, "cifar10": cifar10, "cifar100": cifar100, "folder": image_folder}


def load(data: str, path: Path | None, size: int) -> Dataset:
    """The data of ``--data``; ``size`` is the side that a folder's images are brought to.

    Raises:
        DataError: the folder is missing or malformed, or openml.org cannot be reached.
    """
    try:
        return LOADERS[data](path, size)
    except ConnectionError as error:
        raise DataError(f"--data {data} without --path: {error}") from error
