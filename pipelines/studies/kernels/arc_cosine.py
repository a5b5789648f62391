"""Limit kernels of ReLU networks: arc-cosine kernels and their recursion over layers.

Youngmin Cho and Lawrence Saul (NeurIPS 2009) for the arc-cosine kernels, Jacot, Gabriel
and Hongler (NeurIPS 2018) for the tangent kernel.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def degree_0(cosine: Array) -> Array:
    """`2 E[1{w.x > 0} 1{w.z > 0}]` for a standard normal `w`, given `cos(x, z)`."""
    return (np.pi - np.arccos(np.clip(cosine, -1.0, 1.0))) / np.pi


def degree_1(cosine: Array) -> Array:
    """`2 E[relu(w.x) relu(w.z)] / (|x| |z|)` for a standard normal `w`."""
    cosine = np.clip(cosine, -1.0, 1.0)
    sine = np.sqrt(1.0 - cosine**2)
    return (sine + cosine * (np.pi - np.arccos(cosine))) / np.pi


def tangent_kernel(x: Array, z: Array, depth: int) -> Array:
    """The tangent kernel of an infinitely wide ReLU network without biases.

    Its hidden kernels are `sqrt(2 / fan-in) w` and its output kernel
    `sqrt(1 / fan-in) w`, with standard normal `w`, which the derivatives are in. The
    fan-in of the first layer counts as 1: for an ordinary one divide by `d`.

    Args:
        x: Inputs, shape `(n, d)`, none zero.
        z: Others, shape `(k, d)`.
        depth: Number of hidden layers.

    Returns:
        Shape `(n, k)`.
    """
    scale = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(z, axis=1)
    covariance = tangent = x @ z.T / scale
    for _ in range(depth):
        slopes = degree_0(covariance)
        covariance = degree_1(covariance)
        tangent = covariance + tangent * slopes
    return scale * tangent


def distance(found: Array, kernel: Array) -> float:
    """The relative distance from a kernel in the Frobenius norm."""
    return float(np.linalg.norm(found - kernel) / np.linalg.norm(kernel))
