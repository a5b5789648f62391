"""Coordinates in which a problem with an L2 term is well conditioned."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg

from keras_dalign.numerics.threads import one_blas_thread

if TYPE_CHECKING:
    from keras_dalign.numerics.gram import Array
    from keras_dalign.solving.problem import ConvexProblem

# No larger matrix is factorised: this one takes 128 MiB in float64.
_MOST_COLUMNS = 4096
_ROUNDING = 1e-5


class Preconditioner:
    """Coordinates `z = L^T q` with `L L^T = c Phi^T S Phi + l2`.

    `c` bounds the curvature of the loss in the logits, and `S` are the samples' shares,
    so that the Hessian is at most `c Phi^T S Phi + l2` for every output (Boehning
    1992). Outputs that share their gates share the matrix. The bias stays as it is.

    Args:
        problem: The problem.
        l2: Weight of the L2 term, positive.
    """

    def __init__(self, problem: ConvexProblem, l2: float) -> None:
        self._shape = problem.d, problem.units, problem.width
        matrix = problem.second_moment * problem.loss.max_curvature(problem.units)
        # The second term covers the rounding of sums in float32.
        rounding = _ROUNDING * float(np.trace(matrix)) / len(matrix)
        matrix[np.diag_indices_from(matrix)] += l2 + rounding
        with one_blas_thread():
            self._factor: Array = scipy.linalg.cholesky(
                matrix, lower=True, overwrite_a=True, check_finite=False
            )

    @staticmethod
    def pays_after(problem: ConvexProblem, l2: float) -> float:
        """After how many iterations the factorisation has cost less than they did.

        The matrix takes `n (d m)^2` flop, and an iteration `4 n d m C`. Who starts
        without it and changes then never pays more than twice what is best.

        Returns:
            Their number; infinity where the outputs share no matrix, or it is too
            large, or there is no L2 term.
        """
        columns = problem.d * problem.width
        if (
            not l2
            or problem.gates.groups > 1
            or problem.replicas.processes > 1
            or columns > _MOST_COLUMNS
        ):
            return math.inf
        return columns / (4 * problem.units)

    def coordinates(self, theta: Array) -> Array:
        """The coordinates of parameters `(size,)`."""
        q, bias = self._split(theta)
        return self._joined(self._factor.T @ q, bias)

    def parameters(self, z: Array) -> Array:
        """The parameters `(size,)` at coordinates."""
        q, bias = self._split(z)
        return self._joined(self._solve(q, "T"), bias)

    def gradient(self, gradient: Array) -> Array:
        """The gradient in the coordinates, for that in the parameters."""
        q, bias = self._split(gradient)
        return self._joined(self._solve(q, "N"), bias)

    def _solve(self, q: Array, trans: str) -> Array:
        solved: Array = scipy.linalg.solve_triangular(
            self._factor, q, lower=True, trans=trans, check_finite=False
        )
        return solved

    def _split(self, theta: Array) -> tuple[Array, Array]:
        """One column for each output, `(d m, C)`, and the bias."""
        d, units, width = self._shape
        q = theta[:-units].reshape(d, units, width)
        return q.transpose(0, 2, 1).reshape(d * width, units), theta[-units:]

    def _joined(self, q: Array, bias: Array) -> Array:
        d, units, width = self._shape
        q = q.reshape(d, width, units).transpose(0, 2, 1)
        return np.concatenate([q.ravel(), bias])
