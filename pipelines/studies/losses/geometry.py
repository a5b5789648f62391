"""Distances of features and output layer from neural collapse.

For features `H` (`n x p`) of `K` classes with class means `m_k`, their mean `m`, `S_W`
the mean of `(h - m_k)(h - m_k)^T` over the samples and `S_B` that of
`(m_k - m)(m_k - m)^T` over the classes:

    NC1 = tr(S_W S_B^+) / K,
    NC2 = |A A^T / |A A^T| - E|,
    NC3 = |A M / |A M| - E|,  E = (I - 1 1^T / K) / sqrt(K - 1),

with `A` the output kernel (`K x p`) minus its mean row, `M` the columns `m_k - m` and
Frobenius norms (Zhou et al., NeurIPS 2022). All are 0 where features and output layer
are one simplex equiangular tight frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Eigenvalues of `S_B` up to this part of the largest count as zero: it has rank K - 1.
CUTOFF = 1e-6


@dataclass(frozen=True)
class Geometry:
    """Distances from neural collapse, each at least 0.

    Attributes:
        nc1: Spread within the classes, over that between them.
        nc2: Distance of the output layer from a simplex.
        nc3: Distance of the output layer from the class means.
    """

    nc1: float
    nc2: float
    nc3: float

    @classmethod
    def of(
        cls, features: npt.ArrayLike, labels: npt.ArrayLike, kernel: npt.ArrayLike
    ) -> Geometry:
        """Measures them.

        Args:
            features: `(n, p)`.
            labels: Classes `0 ... K - 1`, shape `(n,)`.
            kernel: Of the output layer, as in Keras, `(p, K)`.

        Returns:
            The distances.

        Raises:
            ValueError: If there are fewer than two classes, a class has no samples, or
                all class means are equal up to rounding.
        """
        h, y = np.asarray(features, dtype=np.float64), np.asarray(labels)
        weights = np.asarray(kernel, dtype=np.float64)
        classes = weights.shape[1]
        counts = np.bincount(y, minlength=classes)
        if classes < 2 or len(counts) != classes or not counts.all():
            raise ValueError(
                "Neural collapse is of two classes or more, each with samples. "
                f"Received: {classes} outputs, samples per class {counts.tolist()}"
            )
        means = np.zeros((classes, h.shape[1]))
        np.add.at(means, y, h)
        means /= counts[:, None]
        within = h - means[y]
        between = means - means.mean(axis=0)
        # S_B = B^T B / K for `between` B = U diag(s) V^T, so that its pseudo-inverse is
        # K V diag(1 / s^2) V^T: what the samples make of it needs no p x p matrix.
        _, values, vectors = np.linalg.svd(between, full_matrices=False)
        rounding = len(h) * np.finfo(np.float64).eps * np.abs(means).max()
        if values[0] <= rounding:
            raise ValueError(
                "The class means are equal, so that the covariance between the classes "
                f"is 0. Received: a largest singular value of {values[0]:.2g}, with a "
                f"cut-off for rounding of {rounding:.2g}"
            )
        real = np.square(values) > CUTOFF * np.square(values[0])
        spread = within @ vectors[real].T / values[real]
        nc1 = float(np.square(spread).sum()) / len(h)
        rows = (weights - weights.mean(axis=1, keepdims=True)).T
        return cls(nc1, _off(rows @ rows.T), _off(rows @ between.T))


def _off(matrix: Array) -> float:
    """Distance of a matrix, scaled to norm 1, from the centred identity."""
    classes = len(matrix)
    simplex = (np.eye(classes) - 1 / classes) / math.sqrt(classes - 1)
    norm = float(np.linalg.norm(matrix))
    # A kernel of zeros has no direction: as far off as the zero matrix.
    scaled = matrix / norm if norm else matrix
    return float(np.linalg.norm(scaled - simplex))
