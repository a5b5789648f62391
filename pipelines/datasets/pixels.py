"""A data set as it is kept: uint8, split, with what its pixels are multiplied by."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipelines.datasets.dataset import Dataset

if TYPE_CHECKING:
    from pipelines.datasets.samples import Samples


@dataclass(frozen=True)
class Pixels:
    """Training and test samples in uint8.

    Attributes:
        train: Training samples.
        test: Test samples.
        pixel_scale: What pixels are multiplied by to lie in [0, 1].
        synthetic: Whether the data are made up. Reports refuse those.
    """

    train: Samples
    test: Samples
    pixel_scale: float
    synthetic: bool = False

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.train.classes)

    def arrays(self) -> dict[str, np.ndarray]:
        """The four arrays by name."""
        return {
            "x_train": self.train.x,
            "y_train": self.train.y,
            "x_test": self.test.x,
            "y_test": self.test.y,
        }

    def fingerprint(self) -> str:
        """SHA-256 of the arrays in their order: types, shapes, contents, and scale."""
        digest = hashlib.sha256(f"pixel_scale {self.pixel_scale!r}".encode())
        for name, array in self.arrays().items():
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def dataset(self) -> Dataset:
        """The data in float32, for training.

        Returns:
            Images in [0, 1], and the labels as they are.
        """
        return Dataset(
            _scaled(self.train.x, self.pixel_scale),
            self.train.y,
            _scaled(self.test.x, self.pixel_scale),
            self.test.y,
            synthetic=self.synthetic,
        )


def _scaled(x: np.ndarray, scale: float) -> np.ndarray:
    """`scale * x` in float32, without an array of another type on the way."""
    return np.multiply(x, np.float32(scale), dtype="float32")
