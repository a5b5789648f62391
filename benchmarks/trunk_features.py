"""Features of a trained ResNet-8, for benchmarks of solvers."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

import keras_dalign as kd
from benchmarks import common
from keras_dalign.head.features import FeaturePass
from keras_dalign.solving.feature_rows import FeatureRows, Normalisation

DATA = common.DATA / "cifar10.npz"
CACHE = Path(tempfile.gettempdir())
EPOCHS = 2
CLASSES = 10
POOLED, GRID = "pooled", "grid"
_EPSILON = 1e-6


@dataclass(frozen=True, eq=False)
class Features:
    """Features as the trunk gives them, and labels.

    Attributes:
        name: The data set and network.
        pooled: `(n, 64)`, float32: the features of the base model's output layer.
        grid: `(n, 1024)`, float32: the last feature map in a 4x4 grid, as `align` takes
            it by default.
        labels: `(n,)`.
    """

    name: str
    pooled: np.ndarray
    grid: np.ndarray
    labels: np.ndarray

    def rows(self, kind: str, n: int) -> FeatureRows:
        """The first `n` rows of a kind, normalised as a head normalises them.

        Args:
            kind: `POOLED` or `GRID`.
            n: Number of rows.

        Returns:
            Rows of 65 or 1,025 features, the constant included.
        """
        raw = (self.pooled if kind == POOLED else self.grid)[:n]
        mean = raw.mean(axis=0, dtype=np.float64)
        variance = raw.var(axis=0, dtype=np.float64)
        return FeatureRows(raw, Normalisation(mean, 1.0 / np.sqrt(variance + _EPSILON)))


def read(data: Path, n: int, cache: Path = CACHE) -> Features:
    """Features of the first `n` training images; synthetic ones without a data file.

    Args:
        data: CIFAR-10 or MNIST as .npz.
        n: Number of samples.
        cache: Folder where the features of a trained network are kept.

    Returns:
        The features.
    """
    if not data.is_file():
        print(f"There is no file {data}: synthetic features are used.")
        return synthetic(n)
    file = cache / f"keras_dalign-features-{data.stem}-resnet8-{EPOCHS}.npz"
    if file.exists():
        with np.load(file) as arrays:
            pooled, grid, labels = (arrays[k] for k in ("pooled", "grid", "labels"))
    else:
        with np.load(data) as arrays:
            x, labels = arrays["x_train"], arrays["y_train"].astype("int64").ravel()
        pooled, grid = _trained(x, labels)
        np.savez(file, pooled=pooled, grid=grid, labels=labels)
    return Features(
        f"{data.stem}, ResNet-8 after {EPOCHS} epochs",
        pooled[:n],
        grid[:n],
        labels[:n],
    )


def synthetic(n: int, seed: int = 0) -> Features:
    """Rectified Gaussian features around class means, with a tenth of labels random."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)

    def drawn(p: int) -> np.ndarray:
        means = rng.standard_normal((CLASSES, p))
        # Variances fall as those of a trained network's features.
        sizes = 3.0 * np.arange(1, p + 1) ** -0.5
        mixing = np.linalg.qr(rng.standard_normal((p, p)))[0]
        raw = rng.standard_normal((n, p)) * sizes @ mixing
        return np.maximum(raw + 0.3 * means[labels], 0.0).astype(np.float32)

    pooled, grid = drawn(64), drawn(1024)
    noisy = rng.random(n) < 0.1
    labels = np.where(noisy, rng.integers(0, CLASSES, n), labels)
    return Features("synthetic", pooled, grid, labels)


def _trained(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features `(n, 64)` and `(n, 1024)` of a network trained on the images."""
    if x.ndim == 3:
        x = x[..., None]
    images = (x / 255).astype("float32")
    keras.utils.set_random_seed(0)
    base = kd.models.resnet(8, images.shape[1:], CLASSES)
    base.compile(
        keras.optimizers.Adam(common.LEARNING_RATE),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    base.fit(images, labels, batch_size=common.BATCH_SIZE, epochs=EPOCHS, verbose=0)
    kd.reestimate_batch_norm(base, images)
    model = kd.align(base, n_samples=len(images), features="auto", seed=0)
    pooled, grid = FeaturePass(model, keep=True).run(images).feature_set().z
    return pooled, grid.reshape(len(grid), -1)
