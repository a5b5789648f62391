"""A fixed random layer `g(x) = sigma(V^T x + b)`, and `h = S^(-1/2) g`, made white."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipelines.studies.representations.target import sphere

SOFTPLUS, STEP = "softplus", "step"
# Directions whose second moment is so much smaller than the largest are left out.
_CUT = 1e-10
# Unlabelled inputs for each unit of the layer.
_INPUTS = 20


def width(d: int, ratio: float) -> int:
    """Units of the layer: so many for each polynomial of degree 2 and below.

    Args:
        d: Dimension of the inputs.
        ratio: How many.

    Returns:
        `ratio` times `(d + 2) (d + 1) / 2`, rounded down.
    """
    return int(ratio * (d + 2) * (d + 1) / 2)


def units(
    rng: np.random.Generator, d: int, D: int, kind: str = SOFTPLUS
) -> Callable[[np.ndarray], np.ndarray]:
    """A random layer.

    Args:
        rng: Draws `V ~ N(0, I / d)` and `b ~ N(0, 1)`.
        d: Dimension of the inputs.
        D: Number of units.
        kind: `sigma`: `"softplus"` or `"step"` (1 where its argument is at least 0).

    Returns:
        `g`, from `(n, d)` to `(n, D)`.
    """
    V, b = rng.standard_normal((d, D)) / np.sqrt(d), rng.standard_normal(D)
    if kind == STEP:
        return lambda x: (x @ V + b >= 0).astype(np.float64)
    return lambda x: np.logaddexp(0.0, x @ V + b)


def white(
    rng: np.random.Generator, d: int, layer: Callable[[np.ndarray], np.ndarray], D: int
) -> Callable[[np.ndarray], np.ndarray]:
    """The representation of a layer: its second moment over unlabelled inputs is `I`.

    Args:
        rng: Draws the unlabelled inputs, 20 for each unit.
        d: Dimension of the inputs.
        layer: `g`.
        D: Number of its units.

    Returns:
        `h`, from `(n, d)` to `(n, k)`, `k <= D`.
    """
    g = layer(sphere(rng, _INPUTS * D, d))
    moments, directions = np.linalg.eigh(g.T @ g / len(g))
    kept = moments > _CUT * moments[-1]
    whitening = directions[:, kept] / np.sqrt(moments[kept])
    return lambda x: layer(x) @ whitening
