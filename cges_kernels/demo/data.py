"""Images to train on: scikit-learn's digits, which come with it, or MNIST for those with a network."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

FOLDS = 5  # one is trained on, the others are tested on


class Images(NamedTuple):
    """Grey images [N, 1, size, size] in [0, 1], float32, and their labels 0..9, int64."""

    x: np.ndarray
    y: np.ndarray

    @property
    def size(self) -> int:
        return self.x.shape[-1]


def load_digits() -> Images:
    """1,797 scans of 8x8 (UCI's optical digits), shipped with scikit-learn."""
    from sklearn import datasets

    digits = datasets.load_digits()
    return Images((digits.images[:, None] / 16).astype(np.float32), digits.target.astype(np.int64))


def load_mnist() -> Images:
    """70,000 scans of 28x28 from openml.org, kept in scikit-learn's data folder once downloaded."""
    from sklearn import datasets

    try:
        mnist = datasets.fetch_openml("mnist_784", version=1, as_frame=False, parser="liac-arff")
    except OSError as error:
        raise ConnectionError(f"expected mnist_784 from openml.org, got: {error}") from error
    x = np.asarray(mnist.data, dtype=np.float32).reshape(-1, 1, 28, 28) / 255
    return Images(x, np.asarray(mnist.target).astype(np.int64))


LOADERS = {"digits": load_digits, "mnist": load_mnist}


def split(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices to train on, indices to test on) of repetition ``seed``: one fifth and the rest.

    Five repetitions in a row are the five folds of one shuffle.
    """
    shuffled = np.random.default_rng(seed // FOLDS).permutation(len(labels))
    in_fold = np.arange(len(labels)) % FOLDS == seed % FOLDS
    return shuffled[in_fold], shuffled[~in_fold]
