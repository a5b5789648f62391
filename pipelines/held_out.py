"""Training samples that are held out of training, to measure its result on."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipelines.datasets import Dataset


def held_out(data: Dataset, share: float, seed: int) -> Dataset:
    """The training samples alone, split by class into training and held-out ones.

    Args:
        data: The data; their test samples are left out.
        share: The share to hold out, in (0, 1).
        seed: Seed of the split.

    Returns:
        Data whose test samples are the held-out ones.

    Raises:
        ValueError: If the training samples are too few for such a share.
    """
    rng = np.random.default_rng(seed)
    held = np.zeros(len(data.y_train), bool)
    for label in range(data.n_classes):
        members = rng.permutation(np.flatnonzero(data.y_train == label))
        held[members[: round(share * len(members))]] = True
    if not held.any() or held.all():
        raise ValueError(
            "A part of the training samples of each class is held out, and this would "
            f"be {'all' if held.all() else 'none'} of them. Received: a share of "
            f"{share} of {len(held)} samples in {data.n_classes} classes. Change the "
            "share, or train on more samples."
        )
    return dataclasses.replace(
        data,
        x_train=data.x_train[~held],
        y_train=data.y_train[~held],
        x_test=data.x_train[held],
        y_test=data.y_train[held],
    )
