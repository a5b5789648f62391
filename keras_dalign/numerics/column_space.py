"""How much of some targets lies outside the column space of a matrix, in float64.

For `J` (`rows x columns`) and targets `Y` (`rows x k`) the distance of `Y` from the
column space is the least `||Y - J beta||`. Every route here finds some `beta` and
measures `||Y - J beta||` with it, so what it returns is attained: an upper bound on the
distance, whatever rounding did on the way, up to that of the last product. This grows
with `beta`, so a `beta` is taken only if it gains more than it costs. The routes differ
in what else they know:

- `by_factor`: the triangular factor of the longer side, and its singular values.
  Nothing is squared: singular values are seen down to rounding, `eps * sigma_max`.
- `by_gram`: the eigenvalues of `J J^T`. They are squares, so singular values below some
  `sqrt(eps) * sigma_max` are not seen.
- `lsqr.by_iteration`: LSQR. It takes products with `J` alone, and of
  all `beta` in the space that its products span it finds the one nearest to `Y`.
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

# Corrections by the residual: each gains as many digits as the first solution had.
_REFINEMENTS = 4
# Steps of LSQR in the directions that a Gram matrix does not show.
_GRAM_STEPS = 100
# A triangular factor takes up rows in blocks of this many times its side.
_BLOCK_SIDES = 2
_MIN_BLOCK_ROWS = 256


def factor_cut(shape: tuple[int, int], eps: float = EPS) -> float:
    """The default cut-off of `by_factor`: what rounding may make of a zero.

    Args:
        shape: Of the matrix.
        eps: Machine precision of what made its entries.

    Returns:
        `max(*shape, 100) * eps`: a small matrix leaves more than its size would allow.
    """
    return max(*shape, 100) * eps


def gram_cut(shape: tuple[int, int], eps: float = EPS) -> float:
    """The default, and least, cut-off of `by_gram`: what a Gram matrix shows.

    Args:
        shape: Of the matrix, not of its Gram matrix.
        eps: Machine precision of what made its entries.

    Returns:
        The square root of `factor_cut`.
    """
    return math.sqrt(factor_cut(shape, eps))


def block_rows(shape: tuple[int, int]) -> int:
    """Rows that `by_factor` takes of a tall matrix at a time.

    Args:
        shape: Of the matrix.

    Returns:
        Twice the number of columns, or 256.
    """
    return max(_BLOCK_SIDES * shape[1], _MIN_BLOCK_ROWS)


def by_factor(
    operator: Operator, targets: Array, cut: float, eps: float = EPS
) -> Projection:
    """Projects by the triangular factor of the longer side.

    A tall matrix is read in blocks of rows and never held; a wide one is formed once.
    The factor of the shorter side `s` is `s x s`. Costs some `3 rows columns s` flop
    and `4 s^3`, or `25 s^3` if the factor is singular.

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
    # A wide matrix is J = R^T Q^T, its reflectors kept where the matrix was.
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

    # The factor of [J, Y] holds Q^T Y beside the factor of J: no Q is needed.
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

    What is left then lies in directions that the Gram matrix does not show. Some steps
    of LSQR take off the part of it that `J` still reaches, if it is above the
    tolerance.

    Costs `rows^2 columns` multiply-adds, less where the operator knows better, and some
    `9 rows^3` flop.

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
    """The square triangular factor of all the rows that come in blocks."""
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
    """The projection, after corrections by the error for as long as they help."""
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
