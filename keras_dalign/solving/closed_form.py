"""The minimum of the squared error in closed form."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg

from keras_dalign.numerics.rounding import EPS

if TYPE_CHECKING:
    from keras_dalign.numerics import Array
    from keras_dalign.solving.problem import ConvexProblem, Evaluation


class ClosedForm:
    """Least squares by a factorisation of each `n x n` Gram matrix.

    Outputs that share their gates share the matrix. A singular matrix is replaced by
    its eigendecomposition. Its pseudo-inverse gives the solution closest to the start.

    Args:
        problem: The problem, with squared error.
        l2: Weight of the L2 term.

    Attributes:
        dropped: The largest number of eigenvalues of one Gram matrix that count as
            zero; 0 if no matrix is singular.
        cutoff: Eigenvalues count as zero up to this fraction of the largest one.
    """

    def __init__(self, problem: ConvexProblem, l2: float) -> None:
        self.problem = problem
        self.l2 = l2
        curvature = problem.loss.max_curvature(problem.units)
        rho = problem.weights * curvature / problem.normalizer
        self._counted = np.flatnonzero(rho)
        self._scale = np.sqrt(rho[self._counted])
        self._factors = [
            _Factor(self._weighted_gram(group), l2)
            for group in range(problem.gates.groups)
        ]
        self.dropped = max(factor.dropped for factor in self._factors)
        self.cutoff = _cutoff(len(self._counted))

    def step_from(self, at: Evaluation) -> Array:
        """The nearest minimum, up to rounding.

        Args:
            at: The starting point.

        Returns:
            Parameters `(size,)`.
        """
        # Let rho be the weights of the squared residuals e of one output, and
        # S = sqrt(rho). The step is Phi^T S a - shift with (S K S + l2) a = S e: the
        # dual of ridge regression, n x n whatever the number of parameters.
        problem = self.problem
        shift = at.theta - problem.center if self.l2 else None
        residuals = problem.targets - at.logits
        if shift is not None:
            residuals = residuals + problem.product(shift)
        right = self._scale[:, None] * residuals[self._counted]
        cotangents = np.zeros_like(residuals)
        groups = len(self._factors)
        for group, factor in enumerate(self._factors):
            solved = factor.solve(right[:, group::groups])
            cotangents[self._counted, group::groups] = self._scale[:, None] * solved
        step = problem.transposed_product(cotangents)
        if shift is not None:
            step -= shift
        return at.theta + step

    def _weighted_gram(self, group: int) -> Array:
        gram = self.problem.gram(group)
        if len(self._counted) < self.problem.n:
            gram = gram[np.ix_(self._counted, self._counted)]
        gram *= self._scale[:, None]
        gram *= self._scale
        return gram


def _cutoff(n: int) -> float:
    """Rounding error of a zero eigenvalue, as a fraction of the largest one."""
    return n * EPS


class _Factor:
    """Solves with `gram + l2`, or with its pseudo-inverse if it is singular.

    Args:
        gram: Symmetric, positive semi-definite, `(n, n)`; it is overwritten.
        l2: At least 0.

    Attributes:
        dropped: Number of eigenvalues that the pseudo-inverse leaves out.
    """

    def __init__(self, gram: Array, l2: float) -> None:
        diagonal = np.einsum("ii->i", gram)
        diagonal += l2
        self.dropped = 0
        self._cholesky = None
        try:
            factor = scipy.linalg.cho_factor(gram, lower=True, check_finite=False)
        except np.linalg.LinAlgError:
            pass
        else:
            pivots = np.diagonal(factor[0])
            # A smaller pivot is rounding, and a quotient by it is noise.
            if pivots.min() > math.sqrt(len(gram) * EPS) * pivots.max():
                self._cholesky = factor
                return
        values, vectors = scipy.linalg.eigh(gram, check_finite=False)
        kept = values > _cutoff(len(gram)) * values[-1]
        self.dropped = int(np.sum(~kept))
        self._vectors, self._values = vectors[:, kept], values[kept, None]

    def solve(self, right: Array) -> Array:
        """The solution for right-hand sides `(n, k)`."""
        if self._cholesky is not None:
            return scipy.linalg.cho_solve(self._cholesky, right, check_finite=False)
        return self._vectors @ ((self._vectors.T @ right) / self._values)
