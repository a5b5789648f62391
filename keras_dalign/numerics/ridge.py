"""Ridge regression in its dual form, for many penalties from one decomposition.

Let `K = J J^T = U diag(s) U^T` be a Gram matrix and `D` right-hand sides. With the
coefficients `alpha = (K + mu)^-1 D`, the parameters `delta = J^T alpha` minimise
`||J delta - D||^2 + mu ||delta||^2`, and `J delta = K alpha`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg

if TYPE_CHECKING:
    from keras_dalign.numerics import Array


@dataclasses.dataclass(frozen=True, eq=False)
class GramFactor:
    """Eigenvectors and eigenvalues of a Gram matrix.

    Attributes:
        vectors: `U`, orthonormal columns, shape `(n, k)`.
        values: `s`, at least 0, ascending or descending, shape `(k,)`.
    """

    vectors: Array
    values: Array

    @classmethod
    def of_gram(cls, gram: Array) -> GramFactor:
        """Factor of a symmetric positive semi-definite matrix `(n, n)`."""
        values, vectors = scipy.linalg.eigh(gram, check_finite=False)
        return cls(vectors, np.maximum(values, 0.0))

    @classmethod
    def of_features(cls, features: Array) -> GramFactor:
        """Factor of the Gram matrix of features `(n, p)`, without forming it."""
        vectors, values, _ = scipy.linalg.svd(
            features, full_matrices=False, check_finite=False
        )
        return cls(vectors, values**2)

    @property
    def largest(self) -> float:
        """The largest eigenvalue, 0 if there is none."""
        return float(np.max(self.values, initial=0.0))

    def rank(self) -> int:
        """Number of eigenvalues above `n * eps` times the largest, in float64."""
        cutoff = len(self.vectors) * np.finfo(np.float64).eps * self.largest
        return int(np.count_nonzero(self.values > cutoff))

    def solve(self, rhs: Array, penalty: float) -> tuple[Array, Array]:
        """Ridge regression in the range of `K`.

        Args:
            rhs: Right-hand sides `D`, shape `(n, m)`.
            penalty: `mu`, positive.

        Returns:
            `alpha` and `K alpha`, each of shape `(n, m)`.
        """
        coefficients = (self.vectors.T @ rhs) / (self.values + penalty)[:, None]
        fitted = self.vectors @ (self.values[:, None] * coefficients)
        return self.vectors @ coefficients, fitted
