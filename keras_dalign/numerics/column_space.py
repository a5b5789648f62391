"""The distance of targets from the column space of a matrix, in float64.

For `J` (`rows x columns`) and targets `Y` (`rows x k`) the distance of `Y` from the
column space is the least `||Y - J beta||`. Each method finds some `beta` and measures
`||Y - J beta||` for it. The result is therefore an upper bound on the distance, up to
the rounding of the last product, however large the rounding errors of `beta` are. That
rounding grows with `beta`, so a `beta` is accepted only if it lowers the sum of error
and rounding. There are three methods:

- `by_factor` uses the triangular factor of the longer side. It resolves singular values
  down to `eps * sigma_max`.
- `by_gram` uses the eigenvalues of `J J^T`, which are squares of singular values. It
  resolves singular values down to about `sqrt(eps) * sigma_max`.
- `lsqr.by_iteration` uses LSQR, which needs products with `J` and `J^T` alone. It finds
  the best `beta` in the Krylov space of these products.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg

from keras_dalign.numerics.lsqr import by_iteration
from keras_dalign.numerics.projection import Projection, product_rounding
from keras_dalign.numerics.rounding import EPS

if TYPE_CHECKING:
    from keras_dalign.numerics import Array
    from keras_dalign.numerics.operators import Operator

# Steps of iterative refinement. Each adds as many digits as the first solution had.
_REFINEMENTS = 4
# Steps of LSQR in the directions that a Gram matrix does not resolve.
_GRAM_STEPS = 100
# A triangular factor is updated by blocks of this many times its side in rows.
_BLOCK_SIDES = 2
_MIN_BLOCK_ROWS = 256


def factor_cut(shape: tuple[int, int], eps: float = EPS) -> float:
    """The default cut-off of `by_factor`: the rounding error of a zero singular value.

    Args:
        shape: Shape of the matrix.
        eps: Machine precision of the computation of its entries.

    Returns:
        `max(*shape, 100) * eps`. The 100 is for small matrices, whose rounding error is
        larger than their size suggests.
    """
    return max(*shape, 100) * eps


def gram_cut(shape: tuple[int, int], eps: float = EPS) -> float:
    """The default, and least, cut-off of `by_gram`: what a Gram matrix resolves.

    Args:
        shape: Shape of the matrix, not of its Gram matrix.
        eps: Machine precision of the computation of its entries.

    Returns:
        The square root of `factor_cut`.
    """
    return math.sqrt(factor_cut(shape, eps))


def block_rows(shape: tuple[int, int]) -> int:
    """Number of rows of a tall matrix that `by_factor` reads at a time.

    Args:
        shape: Shape of the matrix.

    Returns:
        Twice the number of columns, and at least 256.
    """
    return max(_BLOCK_SIDES * shape[1], _MIN_BLOCK_ROWS)


def by_factor(
    operator: Operator, targets: Array, cut: float, eps: float = EPS
) -> Projection:
    """Projects by the triangular factor of the longer side.

    A tall matrix is read in blocks of rows and never stored; a wide one is formed once.
    With the shorter side `s`, the factor is `s x s`. The cost is about
    `3 rows columns s` flop plus `4 s^3`, or plus `25 s^3` if the factor is singular.

    Args:
        operator: `J`.
        targets: `Y`, shape `(rows, k)`.
        cut: Relative cut-off of the singular values.
        eps: Machine precision of the operator's products.

    Returns:
        The projection.
    """
    rows, columns = operator.shape
    if rows > columns:
        return _by_tall_factor(operator, targets, cut, eps)
    # A wide matrix is J = R^T Q^T. The reflectors of Q overwrite the matrix.
    (reflectors, scales), triangle = scipy.linalg.qr(
        operator.dense().T, mode="raw", overwrite_a=True, check_finite=False
    )
    inverse, values, rank = _pseudo_inverse(triangle, cut)

    def correct(error: Array) -> Array:
        padded = np.zeros((columns, error.shape[1]), order="F")
        padded[:rows] = inverse(error, transposed=True)
        return _rotated(reflectors, scales, padded)

    spectrum = _Spectrum(values, rank, cut)
    return _refined(operator, targets, None, correct, spectrum, eps)


def _by_tall_factor(
    operator: Operator, targets: Array, cut: float, eps: float
) -> Projection:
    columns = operator.shape[1]

    def blocks() -> Iterator[Array]:
        for here, block in operator.blocks(block_rows(operator.shape)):
            yield np.concatenate([block, targets[here]], axis=1)

    # The factor of [J, Y] contains Q^T Y, so Q itself is not needed.
    both = _triangle(blocks(), columns + targets.shape[1])
    inverse, values, rank = _pseudo_inverse(both[:columns, :columns], cut)
    first = inverse(both[:columns, columns:])

    def correct(error: Array) -> Array:
        return inverse(inverse(operator.rmatmat(error), transposed=True))

    spectrum = _Spectrum(values, rank, cut)
    return _refined(operator, targets, first, correct, spectrum, eps)


def by_gram(
    operator: Operator,
    targets: Array,
    cut: float,
    tolerance: float,
    lot: int,
    eps: float = EPS,
) -> Projection:
    """Projects by the eigenvectors of the Gram matrix `J J^T`.

    The error that remains lies in directions that the Gram matrix does not resolve. If
    it is above the tolerance, some steps of LSQR reduce it further.

    The cost is `rows^2 columns` multiply-adds, fewer if the operator has a cheaper
    `gram`, and about `9 rows^3` flop.

    Args:
        operator: `J`.
        targets: `Y`, shape `(rows, k)`.
        cut: Relative cut-off of the singular values, at least `gram_cut`.
        tolerance: An error of this size, relative to all targets, is small enough.
        lot: Rows formed at a time; see `Operator.gram`.
        eps: Machine precision of the operator's products.

    Returns:
        The projection.
    """
    eigenvalues, vectors = scipy.linalg.eigh(
        operator.gram(lot), overwrite_a=True, check_finite=False
    )
    values = np.sqrt(np.maximum(eigenvalues[::-1], 0.0))
    rank = int(np.count_nonzero(values > cut * values[0]))
    kept, squares = vectors[:, ::-1][:, :rank], np.square(values[:rank, None])

    def correct(error: Array) -> Array:
        return operator.rmatmat(kept @ ((kept.T @ error) / squares))

    spectrum = _Spectrum(values, rank, cut)
    found = _refined(operator, targets, None, correct, spectrum, eps)
    left, norm = float(np.linalg.norm(found.error)), float(np.linalg.norm(targets))
    least = factor_cut(operator.shape, eps)
    if (
        left <= tolerance * norm
        or np.linalg.norm(found.slope) <= least * found.sigma_max * left
    ):
        return found
    rest = by_iteration(
        operator,
        found.error,
        least,
        tolerance * norm / left,
        _GRAM_STEPS,
        held=_GRAM_STEPS,
        sigma_max=found.sigma_max,
        eps=eps,
    )
    return dataclasses.replace(
        found,
        error=rest.error,
        rounding=found.rounding + rest.rounding,
        slope=rest.slope,
        iterations=rest.iterations,
    )


def _triangle(blocks: Iterator[Array], columns: int) -> Array:
    """The square triangular factor of the rows of all blocks."""
    triangle = np.zeros((0, columns))
    for block in blocks:
        rows = np.concatenate([triangle, block])
        triangle = scipy.linalg.qr(
            rows, mode="r", overwrite_a=True, check_finite=False
        )[0][:columns]
    missing = columns - len(triangle)
    return np.concatenate([triangle, np.zeros((missing, columns))])


def _rotated(reflectors: Array, scales: Array, matrix: Array) -> Array:
    """`Q matrix`, from LAPACK's elementary reflectors of `Q`."""
    (apply,) = scipy.linalg.get_lapack_funcs(("ormqr",), (reflectors,))
    _, work, _ = apply("L", "N", reflectors, scales, matrix, -1)
    product, _, _ = apply("L", "N", reflectors, scales, matrix, int(work[0]), True)
    return np.asarray(product)


def _pseudo_inverse(
    triangle: Array, cut: float
) -> tuple[Callable[..., Array], Array, int]:
    """Products with the pseudo-inverse, the singular values, and the rank."""
    values = np.asarray(scipy.linalg.svdvals(triangle, check_finite=False))
    rank = int(np.count_nonzero(values > cut * values[0]))
    if rank == len(values):

        def solve(right: Array, *, transposed: bool = False) -> Array:
            return np.asarray(
                scipy.linalg.solve_triangular(
                    triangle, right, trans=int(transposed), check_finite=False
                )
            )

        return solve, values, rank
    left, _, right_vectors = scipy.linalg.svd(
        triangle, overwrite_a=True, check_finite=False
    )
    left, right_vectors = left[:, :rank], right_vectors[:rank]
    scale = values[:rank, None]

    def apply(right: Array, *, transposed: bool = False) -> Array:
        if transposed:
            return left @ ((right_vectors @ right) / scale)
        return right_vectors.T @ ((left.T @ right) / scale)

    return apply, values, rank


@dataclasses.dataclass(frozen=True)
class _Spectrum:
    """Singular values, largest first, and how many are above the cut-off."""

    values: Array
    rank: int
    cut: float


def _refined(
    operator: Operator,
    targets: Array,
    solution: Array | None,
    correct: Callable[[Array], Array],
    spectrum: _Spectrum,
    eps: float,
) -> Projection:
    """The projection, after iterative refinement for as long as it helps."""
    sigma_max = float(spectrum.values[0])
    best = np.zeros((operator.shape[1], targets.shape[1]))
    error, left, rounding = targets, float(np.linalg.norm(targets)), 0.0
    for _ in range(_REFINEMENTS):
        if solution is None:
            solution = best + correct(error)
        remaining = targets - operator.matmat(solution)
        added = product_rounding(solution, sigma_max, eps)
        before, after = left + rounding, float(np.linalg.norm(remaining)) + added
        if not after < before:
            break
        best, error, rounding = solution, remaining, added
        left, solution = float(np.linalg.norm(error)), None
        if after > 0.9 * before:
            break
    rank = spectrum.rank
    return Projection(
        error=error,
        rounding=rounding,
        slope=np.linalg.norm(operator.rmatmat(error), axis=0),
        rank=rank,
        sigma_max=sigma_max,
        sigma_min=float(spectrum.values[rank - 1]) if rank else 0.0,
        cut=spectrum.cut,
    )
