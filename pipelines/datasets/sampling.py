"""Seeded draws that keep the shares of the classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipelines.datasets.samples import Samples


def split(
    samples: Samples, n_train: int, n_test: int, seed: int
) -> tuple[Samples, Samples]:
    """Two disjoint random parts, stratified by class.

    Args:
        samples: What to split.
        n_train: Number of training samples.
        n_test: Number of test samples. If both are fewer than there are, the rest is
            left out.
        seed: Seed of the draw.

    Returns:
        Training samples and test samples.

    Raises:
        ValueError: If there are too few samples.
    """
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    classes = len(samples.classes)
    if min(n_train, n_test) < classes or n_train + n_test > len(samples):
        raise ValueError(
            f"A split needs at least one sample of each of {classes} classes on either "
            f"side, and there are {len(samples)} samples. Received: n_train={n_train}, "
            f"n_test={n_test}. Change them under `prepare` in params.yaml."
        )
    train, test = train_test_split(
        np.arange(len(samples)),
        train_size=n_train,
        test_size=n_test,
        random_state=seed,
        stratify=samples.y,
    )
    return samples.take(train), samples.take(test)


def draw(samples: Samples, n: int, seed: int) -> Samples:
    """A random part, stratified by class.

    Args:
        samples: What to draw from.
        n: How many to draw.
        seed: Seed of the draw.

    Returns:
        The part, of `n` samples in the order of `samples`. The number of each class is
        its share of `n`, rounded so that they add up.

    Raises:
        ValueError: If there are too few samples.
    """
    available = np.array(samples.classes)
    if not len(available) <= n <= len(samples):
        raise ValueError(
            f"Between {len(available)} samples (one for each class) and "
            f"{len(samples)} (all there are) can be drawn. Received: {n}. Change it "
            "under `prepare` in params.yaml, or use a more complete copy of the data."
        )
    shares = n * available / len(samples)
    wanted = np.floor(shares).astype("int64")
    # What is missing goes to the largest remainders; among equal ones to lower labels.
    most_missed = np.argsort(wanted - shares, kind="stable")
    wanted[most_missed[: n - wanted.sum()]] += 1
    rng = np.random.default_rng(seed)
    chosen = [
        rng.permutation(np.flatnonzero(samples.y == label))[:count]
        for label, count in enumerate(wanted)
    ]
    return samples.take(np.sort(np.concatenate(chosen)))
