"""What every prepared data set must be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipelines.datasets.pixels import Pixels
    from pipelines.params import DataParams


def check(data: Pixels, params: DataParams) -> None:
    """Checks counts, shapes, values and class balance.

    Args:
        data: The data.
        params: What they must be.

    Raises:
        ValueError: If something is not as it must be.
    """
    for part, n in (("train", params.n_train), ("test", params.n_test)):
        x, y = getattr(data, part).x, getattr(data, part).y
        if len(x) != n or y.shape != (n,):
            raise ValueError(
                f"Expected {n} {part} samples with a label each. Received: x of shape "
                f"{x.shape}, y of shape {y.shape}"
            )
        if x.ndim != 4 or x.shape[1:] != data.train.x.shape[1:]:
            raise ValueError(
                "Images must have shape (n, height, width, channels), the same for "
                f"training and test. Received: {part} images of shape {x.shape}"
            )
        if x.dtype != np.uint8 or round(x.max() * data.pixel_scale, 9) > 1:
            raise ValueError(
                f"Images must be uint8, and in [0, 1] times {data.pixel_scale:.4g}. "
                f"Received: {part} images of type {x.dtype} up to {x.max()}"
            )
        if y.dtype != np.int64 or y.min() < 0:
            raise ValueError(
                "Labels must be integers from 0, in int64. Received: "
                f"{part} labels of type {y.dtype}, the least {y.min()}"
            )
    _check_balance(data)


def _check_balance(data: Pixels) -> None:
    classes = (data.train.classes, data.test.classes)
    if len(classes[0]) == len(classes[1]) and all(map(all, classes)):
        train, test = (np.array(each) / sum(each) for each in classes)
        if np.abs(train - test).max() <= 0.05:
            return
    raise ValueError(
        "Every class must be in training and test data, with shares that differ by "
        f"0.05 at most. Received: training labels {classes[0]}, test labels "
        f"{classes[1]}, by class"
    )
