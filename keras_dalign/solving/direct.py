"""The minimum of the squared error in closed form."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg

from keras_dalign.solving.newton import SLOPE_LEFT, Newton
from keras_dalign.solving.walk import EPS

if TYPE_CHECKING:
    from keras_dalign.numerics.gram import Array
    from keras_dalign.solving.walk import Walk

# Eigenvalues of a singular Gram matrix that are used, as a part of the largest.
_REAL_EIGENVALUES = 1e-11


class Direct:
    """One Cholesky factorisation of the `n x n` Gram matrix per output.

    Args:
        walk: What it moves.
    """

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self.newton: Newton | None = None

    def __call__(self) -> bool:
        """Takes a step; returns whether the value went down."""
        # A second step takes what rounding left of the first. Where a Gram matrix is
        # singular, that is more than a factorisation can give.
        if self.newton is not None:
            return self.newton()
        direction, regular = self._direction()
        if not regular:
            self.newton = Newton(self.walk)
        logits = self.walk.product(direction)
        return self.walk.move(direction, logits, SLOPE_LEFT)

    def _direction(self) -> tuple[Array, bool]:
        """The step to the nearest minimum, and whether all matrices were regular."""
        # With weights rho of the squared residuals e of one output, the step is
        # Phi^T S a - shift where (S K S + l2) a = S e and S = sqrt(rho): the dual of
        # ridge regression, n x n whatever the number of parameters.
        walk = self.walk
        problem, l2 = walk.problem, walk.l2
        rho = problem.weights * (problem.loss.max_curvature(problem.units))
        rho = rho / problem.normalizer
        counted = np.flatnonzero(rho)
        scale = np.sqrt(rho[counted])
        shift = walk.theta - problem.center if l2 else None
        residuals = problem.targets - walk.logits
        if shift is not None:
            residuals += walk.product(shift)
        cotangents = np.zeros_like(residuals)
        all_regular = True
        for output in range(problem.units):
            gram = problem.gram(output)
            if len(counted) < problem.n:
                gram = gram[np.ix_(counted, counted)]
            gram *= scale[:, None]
            gram *= scale
            right = scale * residuals[counted, output]
            solved, regular = _solve_gram(gram, right, l2)
            all_regular &= regular
            cotangents[counted, output] = scale * solved
        direction = problem.transposed_product(cotangents)
        if shift is not None:
            direction -= shift
        return direction, all_regular


def _solve_gram(gram: Array, right: Array, l2: float) -> tuple[Array, bool]:
    """`(gram + l2)^-1 right`, and whether that exists; else of least squares and norm.

    Args:
        gram: Symmetric, positive semi-definite, `(n, n)`; is changed.
        right: Shape `(n,)`.
        l2: At least 0.

    Returns:
        Shape `(n,)`, and whether the matrix is regular in float64.
    """
    diagonal = np.einsum("ii->i", gram)
    diagonal += l2
    try:
        factor = scipy.linalg.cho_factor(gram, lower=True, check_finite=False)
    except np.linalg.LinAlgError:
        pass
    else:
        pivots = np.diagonal(factor[0])
        # Below this a pivot is rounding, and what is divided by it is noise.
        if pivots.min() > math.sqrt(len(gram) * EPS) * pivots.max():
            return scipy.linalg.cho_solve(factor, right, check_finite=False), True
    values, vectors = scipy.linalg.eigh(gram, check_finite=False)
    # Of smaller eigenvalues hardly a digit is right.
    real = values > _REAL_EIGENVALUES * values[-1]
    vectors = vectors[:, real]
    return vectors @ ((vectors.T @ right) / values[real]), False
