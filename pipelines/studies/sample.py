"""What the studies share: real images, labels of every kind, and networks for them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from sklearn.datasets import load_digits

import keras_dalign as kd

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
    model.fit(x, y, epochs=epochs, batch_size=len(x), callbacks=callbacks, verbose=0)


def training_loss(model: keras.Model, x: np.ndarray, y: np.ndarray) -> float:
    """The loss over all samples in inference mode, summed in float64."""
    return float(kd.certify(model, x, y, loss=loss()).loss)
