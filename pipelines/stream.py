"""Batches of training samples, shuffled and augmented anew every epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np


class Stream(keras.utils.PyDataset):
    """Batches that depend on the seed and the epoch alone.

    They are the same on every backend, and for a run that is resumed at an epoch.

    Args:
        x: Images, float32, shape `(n, height, width, channels)`.
        y: Labels, shape `(n,)`.
        batch_size: Samples per batch; the last one may have fewer.
        seed: Seed of shuffles and augmentation.
        augment: The augmentation, or None: `crop`, pixels of zero padding on each side
            before a random crop to the size of the images, and `flip`, whether each
            image is mirrored with probability 1/2.

    Attributes:
        epoch: The epoch, from 0, whose batches are given; `FollowEpoch` sets it.
    """

    def __init__(
        self,
        x: np.ndarray,
        y: np.ndarray,
        batch_size: int,
        seed: int,
        augment: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.x, self.y = x, y
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.epoch = 0
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return math.ceil(len(self.x) / self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A batch of images and their labels."""
        epoch = self.epoch
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._order = (epoch, rng.permutation(len(self.x)))
        chosen = self._order[1][index * self.batch_size :][: self.batch_size]
        x = self.x[chosen]
        if self.augment is not None:
            rng = np.random.default_rng([self.seed, epoch, 1 + index])
            x = augmented(x, rng, **self.augment)
        return x, self.y[chosen]


def augmented(
    images: np.ndarray, rng: np.random.Generator, *, crop: int = 0, flip: bool = False
) -> np.ndarray:
    """Crops and mirrors each image at random.

    Args:
        images: Shape `(n, height, width, channels)`.
        rng: Generator of the random crops.
        crop: Pixels of zero padding on each side, from which the images' size is cut.
        flip: Whether to mirror left and right, with probability 1/2.

    Returns:
        The new images, of the same shape.
    """
    n, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (crop, crop), (crop, crop), (0, 0)))
    top, left = rng.integers(0, 2 * crop + 1, (2, n))
    rows = top[:, None] + np.arange(height)
    columns = left[:, None] + np.arange(width)
    if flip:
        mirrored = rng.random(n) < 0.5
        columns[mirrored] = columns[mirrored, ::-1]
    return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


class FollowEpoch(keras.callbacks.Callback):
    """Gives a stream the number of the epoch."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Keras's hook."""
        self.stream.epoch = epoch
