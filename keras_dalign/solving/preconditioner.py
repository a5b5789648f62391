"""A change of variables after which L-BFGS needs fewer iterations.

The Hessian of the regularised problem is a mean over the samples,

    sum_i s_i H_i (x) a_i a_i^T (x) v_i v_i^T + l2 I,

with shares `s_i`, the Hessian `H_i` of a sample's loss in its logits `(C, C)`, the
gates times output weights `a_i` `(m,)`, and the features `v_i` `(d,)`. The mean of the
Kronecker products is replaced by the Kronecker product of the means (as in K-FAC,
Martens & Grosse 2015),

    H (x) A (x) S + l2 I,

whose eigenvectors are those of three small matrices. In the variables `u` with
`theta = begin + P u`, `P` its inverse square root, curvatures are near 1. Means are
over some thousand samples: only the speed depends on them.

If outputs have gates of their own, there is no common `A`. Then `P` treats each gated
unit alone.

For many features and few samples the eigenvectors take longer than an easy problem. The
solver then starts without them, for as many iterations as they would cost.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import scipy.linalg

if TYPE_CHECKING:
    from keras_dalign.numerics import Array
    from keras_dalign.solving.problem import ConvexProblem, Evaluation

# Samples that the means are taken over: so many, or this multiple of the features.
_SAMPLES, _SAMPLES_PER_FEATURE = 8192, 4
# Eigenvectors that take no longer than so many gradients are computed at once.
_WORTH_GRADIENTS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Preconditioner:
    """The linear map `P`, in the dtype of its arrays.

    Attributes:
        features: Eigenvectors of `S`, shape `(d, d)`.
        outputs: Eigenvectors of `H`, shape `(C, C)`.
        units: Eigenvectors of `A`, shape `(m, m)`.
        scales: Inverse square roots of the curvatures along them, `(d, C, m)`.
        bias_scales: The same for the bias, `(C,)`.
    """

    features: np.ndarray
    outputs: np.ndarray
    units: np.ndarray
    scales: np.ndarray
    bias_scales: np.ndarray

    @classmethod
    def at(
        cls,
        problem: ConvexProblem,
        begin: Evaluation,
        l2: float,
        dtype: npt.DTypeLike = np.float64,
    ) -> Preconditioner | None:
        """The preconditioner for the curvatures at a point.

        Args:
            problem: The problem.
            begin: The point.
            l2: Weight of the L2 term.
            dtype: The dtype of the products that compute the gradients.

        Returns:
            The preconditioner. None without an L2 term, where the minimum that is
            reached would depend on it, and where the loss has no curvature.
        """
        if not l2:
            return None
        rows = _sample(problem)
        shares = problem.weights[rows]
        shares *= problem.weights.sum() / (problem.normalizer * shares.sum())
        diagonal, vector = problem.loss.curvature(
            begin.logits[rows], problem.targets[rows]
        )
        diagonal *= shares[:, None]
        hessian = np.diag(diagonal.sum(axis=0))
        traces = diagonal.sum(axis=1)
        if vector is not None:
            hessian -= (vector * shares[:, None]).T @ vector
            traces -= shares * np.einsum("ic,ic->i", vector, vector)
        total = float(traces.sum())
        if not total > 0:
            return None
        traces /= total
        v = problem.rows.block(rows, np.float32)
        sizes, features = _eigen((v * traces.astype(np.float32)[:, None]).T @ v)
        of_outputs, outputs = _eigen(hessian)
        gates = problem.gates.of_rows(rows, v).astype(np.float64)
        if problem.gates.groups == 1:
            of_units, units = _eigen((gates[:, 0] * traces[:, None]).T @ gates[:, 0])
            curvatures = of_outputs[:, None] * of_units
        else:
            outputs, units = np.eye(problem.units), np.eye(problem.width)
            curvatures = np.einsum("ic,icm->cm", diagonal, gates**2)
        scales = 1.0 / np.sqrt(sizes[:, None, None] * curvatures + l2)
        bias_scales = 1.0 / np.sqrt(of_outputs + l2)
        arrays = (features, outputs, units, scales, bias_scales)
        return cls(*(array.astype(dtype, copy=False) for array in arrays))

    def theta(self, u: Array) -> Array:
        """`P u`, shape `(size,)`."""
        units = len(self.outputs)
        u = u.astype(self.scales.dtype, copy=False)
        q = self.scales * u[:-units].reshape(self.scales.shape)
        q = self.features @ (self.outputs @ (q @ self.units.T)).reshape(len(q), -1)
        bias = self.outputs @ (self.bias_scales * u[-units:])
        return np.concatenate([q.ravel(), bias]).astype(np.float64, copy=False)

    def gradient(self, gradient: Array) -> Array:
        """The gradient in `u` for one in `theta`: `P^T gradient`, shape `(size,)`."""
        units = len(self.outputs)
        gradient = gradient.astype(self.scales.dtype, copy=False)
        q = self.features.T @ gradient[:-units].reshape(len(self.features), -1)
        q = self.outputs.T @ (q.reshape(self.scales.shape) @ self.units)
        bias = self.bias_scales * (self.outputs.T @ gradient[-units:])
        found = np.concatenate([(self.scales * q).ravel(), bias])
        return found.astype(np.float64, copy=False)


def iterations_before(problem: ConvexProblem) -> int:
    """Iterations without a preconditioner that cost as much as it does; 0 if few."""
    rows = len(_sample(problem))
    # In floating-point operations; symmetric eigenvectors take about 10 d^3.
    eigenvectors = problem.d**2 * (10 * problem.d + 2 * rows)
    gradient = 4 * problem.n * problem.size
    cost = eigenvectors // gradient
    return cost if cost > _WORTH_GRADIENTS else 0


def _sample(problem: ConvexProblem) -> np.ndarray:
    """Indices of the samples that the means are taken over."""
    counted = np.flatnonzero(problem.weights)
    wanted = max(_SAMPLES, _SAMPLES_PER_FEATURE * problem.d)
    return counted[:: max(len(counted) // wanted, 1)]


def _eigen(matrix: np.ndarray) -> tuple[Array, Array]:
    """Eigenvalues, at least 0, and eigenvectors of a symmetric matrix."""
    values, vectors = scipy.linalg.eigh(matrix.astype(np.float64), driver="evd")
    return np.maximum(values, 0.0), vectors
