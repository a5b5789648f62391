"""A target of one direction: a polynomial of degree 4, with or without its degree 2."""

from __future__ import annotations

import numpy as np

PURE, PLAIN = "degree 4 alone", "z^4 as it is"
TARGETS = (PURE, PLAIN)


def moment(d: int, k: int) -> float:
    """`E z^k` of a coordinate, uniformly on the sphere of radius `sqrt(d)`.

    Args:
        d: Dimension.
        k: Degree, at least 0.

    Returns:
        0 for odd `k`; else by `E z^(k+2) = E z^k (k + 1) d / (d + k)`.
    """
    if k % 2:
        return 0.0
    found = 1.0
    for below in range(0, k, 2):
        found *= (below + 1) * d / (d + below)
    return found


def sphere(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Uniform inputs on the sphere of radius `sqrt(d)`, shape `(n, d)`."""
    x = rng.standard_normal((n, d))
    return x * (np.sqrt(d) / np.linalg.norm(x, axis=1, keepdims=True))


def values(z: np.ndarray, d: int, kind: str) -> np.ndarray:
    """The target, with mean 0 and variance 1.

    Args:
        z: `beta . x` for a unit vector `beta`, shape `(n,)`.
        d: Dimension of `x`.
        kind: One of `TARGETS`. `z^4 - 6 d / (d + 4) z^2` is, but for a constant, the
            zonal harmonic of degree 4: uncorrelated with all polynomials of degree 3.

    Returns:
        Shape `(n,)`.
    """
    c = 6 * d / (d + 4) if kind == PURE else 0.0
    mean = moment(d, 4) - c * moment(d, 2)
    square = moment(d, 8) - 2 * c * moment(d, 6) + c**2 * moment(d, 4)
    return (z**4 - c * z**2 - mean) / np.sqrt(square - mean**2)
