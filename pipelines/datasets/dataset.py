"""A data set as models are trained on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
