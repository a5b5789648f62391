"""Projection by LSQR (Paige & Saunders 1982), with reorthogonalised vectors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg
import scipy.sparse.linalg

from keras_dalign.numerics.projection import Projection, product_rounding
from keras_dalign.numerics.rounding import EPS

if TYPE_CHECKING:
    from keras_dalign.numerics import Array
    from keras_dalign.numerics.operators import Products

# LSQR is restarted from its solution if its own error estimates stopped it too early.
_STARTS = 5


def by_iteration(
    operator: Products,
    targets: Array,
    cut: float,
    tolerance: float,
    max_iterations: int,
    held: int,
    progress: Callable[[int], None] | None = None,
    sigma_max: float = 0.0,
    eps: float = EPS,
) -> Projection:
    """Projects by LSQR, one target after the other.

    A step takes one product with `J` and one with its transpose. The vectors of the
    first `held` steps are stored, and later vectors are made orthogonal to them.
    Otherwise rounding brings back directions that were already found, and steps are
    wasted.

    It ends in one of three cases: the error is below the tolerance; or `||J^T error||`
    is so small that directions with singular values above the cut-off cannot lower the
    error by more than half a percent; or the steps are used up, and `converged` is
    False.

    The largest singular value is estimated by that of the bidiagonal matrix of LSQR,
    at no further cost. It is at most that of `J`, and close to it after few steps.

    Args:
        operator: `J`.
        targets: `Y`, shape `(rows, k)`.
        cut: Relative cut-off of the singular values.
        tolerance: An error of this size, relative to all targets, is small enough.
        max_iterations: Steps for each target.
        held: Number of steps whose vectors are stored, at most; 0 is plain LSQR.
        progress: Called with the number of steps so far, once a step.
        sigma_max: A lower bound on the largest singular value, 0 if there is none.
        eps: Machine precision of the operator's products.

    Returns:
        The projection, without a rank.
    """
    products = _Reorthogonalised(operator, held, progress, sigma_max)
    goal = tolerance * float(np.linalg.norm(targets)) / math.sqrt(targets.shape[1])
    runs = [
        _lsqr(products, target, cut, goal, max_iterations, eps) for target in targets.T
    ]
    return Projection(
        error=np.stack([run.error for run in runs], axis=1),
        rounding=math.hypot(*(run.rounding for run in runs)),
        slope=np.array([run.slope for run in runs]),
        rank=None,
        sigma_max=products.sigma_max,
        sigma_min=None,
        cut=cut,
        iterations=sum(run.steps for run in runs),
        converged=all(run.converged for run in runs),
    )


@dataclasses.dataclass(frozen=True)
class _Run:
    """The result of LSQR for one target; see `Projection`."""

    error: Array
    rounding: float
    slope: float
    steps: int
    converged: bool


def _lsqr(
    products: _Reorthogonalised,
    target: Array,
    cut: float,
    goal: float,
    max_iterations: int,
    eps: float,
) -> _Run:
    solution = np.zeros(products.shape[1])
    error, left, rounding = target, float(np.linalg.norm(target)), 0.0
    slope = products.begin(error)
    steps = 0
    # At a tenth of the cut-off, sqrt(1 - 0.1^2) of the error cannot be removed.
    relative = 0.1 * cut

    def converged() -> bool:
        return left + rounding <= goal or slope <= 0.1 * cut * products.sigma_max * left

    for _ in range(_STARTS):
        if converged() or steps >= max_iterations:
            break
        found = scipy.sparse.linalg.lsqr(
            products,
            error,
            atol=relative,
            btol=0.5 * goal / left,
            conlim=0,
            iter_lim=max_iterations - steps,
        )
        products.end_of_run()
        steps += int(found[2])
        better = solution + found[0]
        remaining = target - products.operator.matvec(better)
        added = product_rounding(better, products.sigma_max, eps)
        before, after = left + rounding, float(np.linalg.norm(remaining)) + added
        # Near the least distance, the slope still falls when the distance does not.
        if after > before * (1 + 1e-9):
            break
        flatter = products.begin(remaining)
        if after >= before and flatter >= slope:
            break
        solution, error, rounding, slope = better, remaining, added, flatter
        left = float(np.linalg.norm(error))
        relative = max(0.01 * relative, 10 * eps)
    return _Run(error, rounding, slope, steps, converged())


class _Reorthogonalised(scipy.sparse.linalg.LinearOperator):
    """Products for LSQR with reorthogonalisation, which also record its coefficients.

    LSQR computes `J^T u_1, J v_1, J^T u_2, ...` with the unit vectors
    `u_k+1 = (J v_k - alpha_k u_k) / beta_k+1` and
    `v_k+1 = (J^T u_k+1 - beta_k+1 v_k) / alpha_k+1`. In exact arithmetic these are
    orthogonal. Their components along earlier vectors are rounding, and are removed.
    (Removing them on one side alone is cheaper, and wrong for singular values as small
    as those that matter here.) The `alpha` and `beta` are the bidiagonal matrix.
    """

    def __init__(
        self,
        operator: Products,
        held: int,
        progress: Callable[[int], None] | None,
        sigma_max: float,
    ) -> None:
        super().__init__(np.float64, operator.shape)
        self.operator = operator
        self.sigma_max = sigma_max
        self._progress = progress
        self._steps = 0
        held = min(held, *operator.shape)
        self._left, self._right = (np.empty((held, size)) for size in operator.shape)
        self._start()

    def _start(self) -> None:
        # alpha_1, beta_2, alpha_2, beta_3, ...
        self._entries: list[float] = []
        # The unit vectors of the last two calls, and the result of the last call.
        self._vectors: list[Array] = []
        self._product: Array | None = None
        self._n_calls = 0
        self._first: Array | None = None

    def begin(self, error: Array) -> float:
        """Prepares a run with this right-hand side; returns `||J^T error||`."""
        first = self.operator.rmatvec(error)
        norm = float(np.linalg.norm(error))
        # Reused as LSQR's first product.
        self._first = first / norm if norm else first
        return float(np.linalg.norm(first))

    def _matvec(self, vector: Array) -> Array:
        self._steps += 1
        if self._progress is not None:
            self._progress(self._steps)
        return self._next(vector.ravel(), self.operator.matvec)

    def _rmatvec(self, vector: Array) -> Array:
        return self._next(vector.ravel(), self.operator.rmatvec)

    def _next(self, vector: Array, multiply: Callable[[Array], Array]) -> Array:
        if self._product is not None:
            # This vector is the last product minus its component along the vector
            # before, divided by its length. The entry is that length.
            entry = float(vector @ self._product)
            if len(self._vectors) > 1:
                entry -= self._entries[-1] * float(vector @ self._vectors[0])
            self._entries.append(entry)
        # The calls so far: u_1, v_1, u_2, ...; v_k is the k-th of its side, as is u_k.
        k, is_right = divmod(self._n_calls, 2)
        mine, other = self._left, self._right
        if is_right:
            mine, other = other, mine
        if k < len(mine):
            mine[k] = vector
        if self._first is not None:
            product, self._first = self._first, None
        else:
            product = multiply(vector)
        if self._vectors:
            along = self._entries[-1] * self._vectors[-1]
            earlier = other[: k + is_right]
            rest = product - along
            # Twice is enough, even if the remainder is tiny.
            for _ in range(2):
                rest -= (earlier @ rest) @ earlier
            product = along + rest
        self._n_calls += 1
        self._vectors = [*self._vectors[-1:], vector]
        self._product = product
        return product

    def end_of_run(self) -> None:
        """Updates `sigma_max` by the run's bidiagonal matrix."""
        entries = self._entries
        self._start()
        if not entries:
            return
        # [[0, B], [B^T, 0]] with rows in the order u_1, v_1, u_2, ... is tridiagonal.
        # Its eigenvalues are the singular values and their negatives.
        last = len(entries)
        (value,) = scipy.linalg.eigvalsh_tridiagonal(
            np.zeros(last + 1), entries, select="i", select_range=(last, last)
        )
        self.sigma_max = max(self.sigma_max, float(value))
