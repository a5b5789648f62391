"""What the studies share: real images, labels of every kind, and networks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from sklearn.datasets import load_digits

import keras_dalign as kd

# Number of scikit-learn's digits.
DIGITS = 1797
LABELS = ("true", "half random", "random")

Row = dict[str, Any]


def digits(
    n: int, labels: str = "true", seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Some of scikit-learn's digits.

    Args:
        n: Number of images.
        labels: `"true"`, `"half random"` (half of them drawn anew) or `"random"`.
        seed: Seed of the choice of images and of the random labels.

    Returns:
        Images `(n, 64)` in [0, 1], float32, and labels `(n,)`, int64.
    """
    rng = np.random.default_rng(seed)
    x, y = load_digits(return_X_y=True)
    order = rng.permutation(len(x))[:n]
    x, y = (x[order] / 16).astype("float32"), y[order].astype("int64")
    share = {"true": 0.0, "half random": 0.5, "random": 1.0}[labels]
    drawn = rng.random(n) < share
    y[drawn] = rng.integers(10, size=int(drawn.sum()))
    return x, y


def pooled_digits(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Digits with 2 x 2 pixels averaged, centred over the sample, each of norm 1.

    Args:
        n: Number of images.
        seed: Seed of the choice of images.

    Returns:
        Images `(n, 16)`, float64, and labels `(n,)`, int64.
    """
    x, y = digits(n, seed=seed)
    pooled = x.astype("float64").reshape(n, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(n, 16)
    pooled -= pooled.mean(axis=0)
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True), y


def network(width: int, depth: int, seed: int) -> keras.Model:
    """A ReLU network with `depth` hidden layers of `width` units and 10 logits."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    hidden = [keras.layers.Dense(width, activation="relu") for _ in range(depth)]
    return keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10)])


def loss() -> keras.losses.Loss:
    """Softmax cross-entropy of the logits."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def aligned(model: keras.Model, x: np.ndarray, y: np.ndarray) -> Row:
    """How well all trainable parameters of a model are aligned with the labels."""
    report = kd.check_alignment(model, x, y, parameters="all", loss=loss())
    return {
        "residual": report.residual,
        "rank": report.rank,
        "n_rows": report.n_rows,
        "n_parameters": report.n_parameters,
    }


def full_batch(
    model: keras.Model,
    x: np.ndarray,
    y: np.ndarray,
    *,
    optimizer: Any,
    epochs: int,
    callbacks: Any = None,
) -> None:
    """Trains with all samples in every step."""
    model.compile(optimizer=optimizer, loss=loss())
    options = {
        "epochs": epochs,
        "callbacks": callbacks,
        "shuffle": False,
        "verbose": 0,
    }
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf  # noqa: PLC0415

        # Keras's pipeline for arrays takes ten times as long to start as a step.
        model.fit(tf.data.Dataset.from_tensors((x, y)), **options)
    else:
        model.fit(x, y, batch_size=len(x), **options)


def training_loss(model: keras.Model, x: np.ndarray, y: np.ndarray) -> float:
    """The loss over all samples in inference mode, summed in float64."""
    return float(kd.certify(model, x, y, loss=loss()).loss)


def effective_rank(features: np.ndarray) -> float:
    """The exponential of the entropy of the normalised squared singular values.

    Args:
        features: Shape `(n, p)`; they are centred first.

    Returns:
        Between 1 and the rank.
    """
    centred = features.astype("float64") - features.mean(axis=0, dtype="float64")
    squares = np.linalg.svd(centred, compute_uv=False) ** 2
    shares = squares[squares > 0] / squares.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The least-squares slope of `log y` over `log x`, both positive."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def by_seed(
    rows: Sequence[Row],
    key: str,
    reduce: Callable[[list[float]], float],
    which: Callable[[Row], bool],
) -> list[float]:
    """One number for each seed.

    Args:
        rows: The rows of a study.
        key: The key of the numbers.
        reduce: Makes one number of those of a seed, such as `max`.
        which: Which rows count.

    Returns:
        The numbers, in the order of the seeds.
    """
    seeds = sorted({row["seed"] for row in rows if which(row)})
    return [
        float(reduce([row[key] for row in rows if which(row) and row["seed"] == seed]))
        for seed in seeds
    ]
