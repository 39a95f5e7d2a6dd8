"""Images to train and to test on, by name: what ``--data`` takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

FOLDS = 5  # for data without a test set: training takes one fold, the test takes the others


class DataError(Exception):
    """The images cannot be loaded; the message says why."""


class Dataset(NamedTuple):
    """Images [N, channels, size, size] as float32, and labels 0..classes-1 as int64."""

    x: np.ndarray
    y: np.ndarray
    classes: int
    tested: int = 0  # the size of the published test set, which comes last; 0 if there is none

    def split(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(indices to train on, indices to test on) of repetition ``seed``.

        Without a test set, repetitions 0 to 4 take the five folds of one shuffle, 5 to 9 those of another.
        """
        rows = np.arange(len(self.y))
        if self.tested:
            return rows[: -self.tested], rows[-self.tested :]
        shuffled = np.random.default_rng(seed // FOLDS).permutation(rows)
        in_fold = rows % FOLDS == seed % FOLDS
        return shuffled[in_fold], shuffled[~in_fold]


def digits(path: Path | None, size: int) -> Dataset:
    """1,797 scans of 8x8 (UCI's optical digits), which come with scikit-learn."""
    from sklearn.datasets import load_digits

    if path is not None:
        raise DataError("--path: the digits come with scikit-learn, expected none")
    found = load_digits()
    return Dataset((found.images[:, None] / 16).astype(np.float32), found.target.astype(np.int64), 10)


def _torchvision() -> Any:
    """torchvision's data sets and transforms."""
    try:
        import torchvision.datasets
        import torchvision.transforms
    except (ImportError, RuntimeError) as error:  # one for another torch does not find its operators
        advice = "pip install torchvision, from the index that torch came from"
        raise DataError(
            f"images other than the digits need a torchvision that matches torch {torch.__version__} "
            f"({advice}): {error}"
        ) from error
    return torchvision


def _published(name: str) -> Callable[[Path | None, int], Dataset]:
    """A loader of the torchvision data set ``name``; it reads it below the path or downloads it there."""

    def load(path: Path | None, size: int) -> Dataset:
        datasets = _torchvision().datasets
        parts = [getattr(datasets, name)(path, train=part, download=True) for part in (True, False)]
        images = [np.asarray(part.data) for part in parts]
        grey = images[0].ndim == 3
        x = [(a[:, None] if grey else a.transpose(0, 3, 1, 2)) / np.float32(255) for a in images]
        return _joined(x, [np.asarray(part.targets) for part in parts], len(parts[0].classes))

    return load


def folder(path: Path | None, size: int) -> Dataset:
    """A folder of images per class, each image's middle square; or train/ and test/ (or val/) of such."""
    datasets, transforms = _torchvision().datasets, _torchvision().transforms
    assert path is not None
    square = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    tests = [path / name for name in ("test", "val") if (path / "train").is_dir() and (path / name).is_dir()]
    places = [path / "train", tests[0]] if tests else [path]
    parts = [datasets.ImageFolder(place, transforms.Compose(square)) for place in places]
    classes = parts[0].classes
    if parts[-1].classes != classes:
        raise DataError(f"{places[-1]}: expected the classes {classes}, got {parts[-1].classes}")
    if len(classes) < 2 or len(parts[0]) < 2 * FOLDS:
        found = f"{len(parts[0])} in {len(classes)}"
        raise DataError(f"{places[0]}: expected {2 * FOLDS} images or more in 2 classes or more, got {found}")
    x = [np.stack([image.numpy() for image, _ in part]) for part in parts]
    y = [np.array(part.targets, np.int64) for part in parts]
    return _joined(x, y, len(classes)) if tests else Dataset(x[0], y[0], len(classes))


def _joined(x: list[np.ndarray], y: list[np.ndarray], classes: int) -> Dataset:
    """Both sets in one. Each channel is shifted and scaled by the training set's mean and deviation."""
    mean, deviation = (f(x[0], axis=(0, 2, 3), keepdims=True) for f in (np.mean, np.std))
    joined = (np.concatenate(x) - mean) / np.maximum(deviation, 1e-6)
    return Dataset(joined.astype(np.float32), np.concatenate(y).astype(np.int64), classes, len(y[1]))


LOADERS: dict[str, Callable[[Path | None, int], Dataset]] = {
    "digits": digits,
    "mnist": _published("MNIST"),
    "cifar10": _published("CIFAR10"),
    "cifar100": _published("CIFAR100"),
    "folder": folder,
}


def load(data: str, path: Path | None = None, size: int = 32) -> Dataset:
    """The data set that ``--data`` names. The images of a folder are scaled to ``size`` x ``size``.

    Raises:
        DataError: the data is missing or malformed, cannot be downloaded, or torchvision does not work.
    """
    if path is None and data != "digits":
        raise DataError(f"--data {data} needs --path, the folder that holds it")
    try:
        return LOADERS[data](path, size)
    except (OSError, RuntimeError, ImportError) as error:
        raise DataError(f"--data {data}: {error}") from error
