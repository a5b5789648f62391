"""The map from features `u` to `v = [sqrt(p) * u / ||u||, 1]`, after standardisation.

`scale_to_length` and `standardize` run on the backend. `normalize_exactly` does both in
NumPy float64; rank checks use it, and tests compare the others with it.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops


def standardize(
    features: Any, layer: keras.layers.BatchNormalization, dtype: str
) -> Any:
    """Standardises features by the moving statistics of a layer.

    Batch normalisation computes `x / s - mean / s`, which cancels where a feature
    varies little around a large mean. Here the mean is subtracted first.

    Args:
        features: Tensor `(batch, p)`.
        layer: The layer that holds mean, variance and epsilon.
        dtype: Dtype to compute in.

    Returns:
        Tensor `(batch, p)` of this dtype.
    """
    centred = ops.cast(features, dtype) - ops.cast(layer.moving_mean, dtype)
    return centred * ops.rsqrt(ops.cast(layer.moving_variance, dtype) + layer.epsilon)


def scale_to_length(u: Any) -> Any:
    """Scales every row to the length `sqrt(p)` and appends the constant 1.

    A row of zeros, a sample whose features are all at their mean, becomes
    `[0, ..., 0, 1]`.

    Args:
        u: Tensor `(batch, p)`.

    Returns:
        Tensor `(batch, p + 1)`.
    """
    square = ops.sum(ops.square(u), axis=-1, keepdims=True)
    u = u * (math.sqrt(u.shape[-1]) * ops.rsqrt(ops.maximum(square, 1e-12)))
    return ops.concatenate([u, ops.ones_like(u[:, :1])], axis=-1)


def normalize_exactly(
    features: np.ndarray, mean: np.ndarray, variance: np.ndarray, epsilon: float
) -> np.ndarray:
    """Standardises, scales and appends the constant in float64.

    Args:
        features: Array `(n, ...)`, flattened to `(n, p)`.
        mean: Array `(p,)`.
        variance: Array `(p,)`.
        epsilon: Added to the variance.

    Returns:
        Array `(n, p + 1)`, float64.
    """
    u = np.asarray(features, dtype="float64").reshape(len(features), -1)
    u = (u - mean) / np.sqrt(variance + epsilon)
    square = np.sum(u**2, axis=1, keepdims=True)
    u *= np.sqrt(u.shape[1] / np.maximum(square, 1e-12))
    return np.concatenate([u, np.ones((len(u), 1))], axis=1)
