"""Data sets: how each is loaded, and what all of them must be.

The loader of another data set is a function from `DataParams` to a `Dataset`,
registered in `LOADERS`. The six data sets of the benchmark (MNIST, CIFAR-10,
CIFAR-100, KMNIST, SVHN and Semeion, from tensorflow-datasets or a folder of files)
belong here; import what a loader needs inside of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.files import read_arrays, read_json

if TYPE_CHECKING:
    from pipelines.layout import Layout
    from pipelines.params import DataParams

PARTS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Dataset:
    """Images and labels, split into training and test samples.

    Attributes:
        x_train: Training images, float32 in [0, 1], shape
            `(n_train, height, width, channels)`.
        y_train: Their labels, int64 from 0, shape `(n_train,)`.
        x_test: Test images, `(n_test, height, width, channels)`.
        y_test: Their labels, `(n_test,)`.
        synthetic: Whether the data are made up. Reports refuse those.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    synthetic: bool = False

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return int(self.y_train.max()) + 1

    def arrays(self) -> dict[str, np.ndarray]:
        """The four arrays by name."""
        return {name: getattr(self, name) for name in PARTS}

    def fingerprint(self) -> str:
        """SHA-256 of the arrays: their types, shapes and contents."""
        digest = hashlib.sha256()
        for name, array in self.arrays().items():
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def load_digits(params: DataParams) -> Dataset:
    """scikit-learn's digits: 1,797 images of 8x8 pixels, shipped in its wheel.

    The split is random, stratified by class.

    Returns:
        Images `(1200, 8, 8, 1)` and `(597, 8, 8, 1)` with the sizes of params.yaml.
    """
    from sklearn.datasets import load_digits as load  # noqa: PLC0415
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    pixels, labels = load(return_X_y=True)
    x = (pixels.reshape(-1, 8, 8, 1) / 16).astype("float32")
    x_train, x_test, y_train, y_test = train_test_split(
        x,
        labels.astype("int64"),
        train_size=params.n_train,
        test_size=params.n_test,
        random_state=params.split_seed,
        stratify=labels,
    )
    return Dataset(x_train, y_train, x_test, y_test)


LOADERS: dict[str, Callable[[DataParams], Dataset]] = {"digits": load_digits}


def check(data: Dataset, params: DataParams) -> None:
    """Checks counts, shapes, values and class balance.

    Args:
        data: The data.
        params: What they must be.

    Raises:
        ValueError: If something is not as it must be.
    """
    for part, n in (("train", params.n_train), ("test", params.n_test)):
        x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
        if len(x) != n or y.shape != (n,):
            raise ValueError(
                f"Expected {n} {part} samples with a label each. Received: x of shape "
                f"{x.shape}, y of shape {y.shape}"
            )
        if x.ndim != 4 or x.shape[1:] != data.x_train.shape[1:]:
            raise ValueError(
                "Images must have shape (n, height, width, channels), the same for "
                f"training and test. Received: {part} images of shape {x.shape}"
            )
        # The comparison is false for NaN, too.
        if x.dtype != np.float32 or not (x.min() >= 0 and x.max() <= 1):
            raise ValueError(
                "Images must be float32 in [0, 1]. Received: "
                f"{part} images of type {x.dtype} in [{x.min()}, {x.max()}]"
            )
        if not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
            raise ValueError(
                "Labels must be integers from 0. Received: "
                f"{part} labels of type {y.dtype}, the least {y.min()}"
            )
    shares = np.array(
        [
            np.bincount(y, minlength=data.n_classes) / len(y)
            for y in (data.y_train, data.y_test)
            if y.max() < data.n_classes
        ]
    )
    if (
        len(shares) < 2
        or not shares.all()
        or np.abs(np.diff(shares, axis=0)).max() > 0.05
    ):
        raise ValueError(
            "Every class must be in training and test data, with shares that differ by "
            "0.05 at most. Received: training labels "
            f"{np.bincount(data.y_train).tolist()}, test labels "
            f"{np.bincount(data.y_test).tolist()}, by class"
        )


def describe(data: Dataset) -> dict[str, Any]:
    """Counts, shapes, class balance and hash, to be written beside the arrays."""
    return {
        "n_train": len(data.x_train),
        "n_test": len(data.x_test),
        "shape": list(data.x_train.shape[1:]),
        "n_classes": data.n_classes,
        "train_classes": np.bincount(data.y_train).tolist(),
        "test_classes": np.bincount(data.y_test).tolist(),
        "synthetic": data.synthetic,
        "sha256": data.fingerprint(),
    }


def read(layout: Layout, name: str) -> tuple[Dataset, Mapping[str, Any]]:
    """Reads a prepared data set and its description.

    Returns:
        The data, and what `describe` wrote of them.

    Raises:
        ValueError: If the arrays are not those that were described.
    """
    description = read_json(layout.description(name), "sha256", "synthetic")
    arrays = dict(zip(PARTS, read_arrays(layout.arrays(name), *PARTS), strict=True))
    data = Dataset(**arrays, synthetic=bool(description["synthetic"]))
    if data.fingerprint() != description["sha256"]:
        raise ValueError(
            f"{layout.arrays(name)} does not belong to its description. Received: "
            f"sha256 {data.fingerprint()} where {description['sha256']} was "
            "prepared. Run `prepare` again."
        )
    return data, description
