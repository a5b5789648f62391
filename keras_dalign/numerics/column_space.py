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
- `by_iteration`: LSQR (Paige & Saunders 1982). It takes products with `J` alone, and of
  all `beta` in the space that its products span it finds the one nearest to `Y`.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg
import scipy.sparse.linalg

from keras_dalign.numerics.subspace import EPS

if TYPE_CHECKING:
    from keras_dalign.numerics.gram import Array

# The rounding of a product, in units of eps * sigma_max * ||beta||.
_PRODUCT_ROUNDING = 4.0
# Corrections by the residual: each gains as many digits as the first solution had.
_REFINEMENTS = 4
# LSQR is started again, from where it was, if its own estimates stopped it too early.
_STARTS = 5
# Steps of LSQR in the directions that a Gram matrix does not show.
_GRAM_STEPS = 100
# A triangular factor takes up rows in blocks of this many times its side.
_BLOCK_SIDES = 2
_MIN_BLOCK_ROWS = 256


class Products(abc.ABC):
    """A matrix known by its products with vectors.

    Args:
        shape: `(rows, columns)`.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    @abc.abstractmethod
    def matvec(self, vector: Array) -> Array:
        """The product with a vector `(columns,)`; shape `(rows,)`."""

    @abc.abstractmethod
    def rmatvec(self, vector: Array) -> Array:
        """The transpose's product with a vector `(rows,)`; shape `(columns,)`."""


class Operator(Products):
    """A matrix that need not be formed as a whole: its products, and its rows."""

    @abc.abstractmethod
    def blocks(self, size: int) -> Iterator[tuple[slice, Array]]:
        """All rows in order, some `size` of them at a time.

        Args:
            size: Number of rows of a block, about.

        Returns:
            An iterator over the rows that they are, and the rows, `(some, columns)`.
        """

    def matmat(self, matrix: Array) -> Array:
        """The product with a matrix `(columns, k)`; shape `(rows, k)`."""
        return np.stack([self.matvec(column) for column in matrix.T], axis=1)

    def rmatmat(self, matrix: Array) -> Array:
        """The transpose's product with a matrix `(rows, k)`; shape `(columns, k)`."""
        return np.stack([self.rmatvec(column) for column in matrix.T], axis=1)

    def dense(self) -> Array:
        """The matrix itself, `(rows, columns)`, for the caller to overwrite."""
        matrix = np.empty(self.shape)
        for here, block in self.blocks(_MIN_BLOCK_ROWS):
            matrix[here] = block
        return matrix

    def gram(self, lot: int) -> Array:
        """The Gram matrix `J J^T`, `(rows, rows)`.

        Args:
            lot: Rows held at a time; for each such lot all rows are formed once.

        Returns:
            The Gram matrix, both triangles.
        """
        rows, columns = self.shape
        gram = np.empty((rows, rows))
        for start in range(0, rows, lot):
            stop = min(start + lot, rows)
            held = np.empty((stop - start, columns))
            for here, block in self.blocks(min(lot, _MIN_BLOCK_ROWS)):
                first, last = max(here.start, start), min(here.stop, stop)
                if first < last:
                    part = block[first - here.start : last - here.start]
                    held[first - start : last - start] = part
                if here.stop > start:
                    # What the lot still lacks is overwritten by the later blocks.
                    later = slice(max(here.start, start), here.stop)
                    right = block[later.start - here.start :]
                    n_held = last - start
                    product = held[:n_held] @ right.T
                    gram[start:last, later] = product
                    gram[later, start:last] = product.T
        return gram


class DenseOperator(Operator):
    """A matrix in memory.

    Args:
        matrix: Shape `(rows, columns)`, float64.
    """

    def __init__(self, matrix: Array) -> None:
        super().__init__(matrix.shape)
        self._matrix = matrix

    def matvec(self, vector: Array) -> Array:
        """The product with a vector; see `Operator`."""
        return self._matrix @ vector

    def rmatvec(self, vector: Array) -> Array:
        """The transpose's product with a vector; see `Operator`."""
        return self._matrix.T @ vector

    def blocks(self, size: int) -> Iterator[tuple[slice, Array]]:
        """All rows, a block at a time; see `Operator`."""
        for here in _slices(self.shape[0], size):
            yield here, self._matrix[here]

    def dense(self) -> Array:
        """A copy of the matrix; see `Operator`."""
        return self._matrix.copy()

    def matmat(self, matrix: Array) -> Array:
        """The product with a matrix; see `Operator`."""
        return self._matrix @ matrix

    def rmatmat(self, matrix: Array) -> Array:
        """The transpose's product with a matrix; see `Operator`."""
        return self._matrix.T @ matrix


@dataclasses.dataclass(frozen=True)
class Projection:
    """What is left of the targets outside a column space, and the spectrum seen.

    Attributes:
        error: `Y - J beta` with the `beta` found, `(rows, k)`.
        rounding: What the rounding of `J beta` may add to the norm of the error.
        slope: `J^T error`, which is 0 at the least distance, as a norm, `(k,)`.
        rank: Number of singular values above the cut-off; None after LSQR.
        sigma_max: The largest singular value; after LSQR a lower bound on it.
        sigma_min: The smallest singular value above the cut-off, 0 if there is none;
            None after LSQR.
        cut: Singular values up to `cut * sigma_max` count as zero; after LSQR, what
            they could still take off the error was not asked for.
        iterations: Steps of LSQR, all targets together.
        converged: Whether nothing above the cut-off is left to take off the error, or
            the error is below the tolerance.
    """

    error: Array
    rounding: float
    slope: Array
    rank: int | None
    sigma_max: float
    sigma_min: float | None
    cut: float
    iterations: int = 0
    converged: bool = True


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

    Takes one product with `J` and one with its transpose a step, a few vectors, and
    a row and a column for each step that is held, to keep later ones orthogonal to it.
    Otherwise rounding repeats directions that were found before, and steps are wasted.

    It ends when the error is below the tolerance; when `||J^T error||` is so small that
    directions with singular values above the cut-off cannot take more than half a
    percent off the error; or when the steps are used up, and then says so.

    The largest singular value of the bidiagonal matrix that LSQR builds is at most that
    of `J`, and close to it after few steps; it comes at no further cost.

    Args:
        operator: `J`.
        targets: `Y`, shape `(rows, k)`.
        cut: Relative cut-off of the singular values.
        tolerance: An error of this size, relative to all targets, is small enough.
        max_iterations: Steps for each target.
        held: Steps held, at most; 0 is plain LSQR.
        progress: Called with the number of steps so far, once a step.
        sigma_max: A lower bound on the largest singular value, as far as known.
        eps: Machine precision of the operator's products.

    Returns:
        The projection, without a rank.
    """
    watched = _Watched(operator, held, progress, sigma_max)
    goal = tolerance * float(np.linalg.norm(targets)) / math.sqrt(targets.shape[1])
    runs = [
        _lsqr(watched, target, cut, goal, max_iterations, eps) for target in targets.T
    ]
    return Projection(
        error=np.stack([run.error for run in runs], axis=1),
        rounding=math.hypot(*(run.rounding for run in runs)),
        slope=np.array([run.slope for run in runs]),
        rank=None,
        sigma_max=watched.sigma_max,
        sigma_min=None,
        cut=cut,
        iterations=sum(run.steps for run in runs),
        converged=all(run.converged for run in runs),
    )


@dataclasses.dataclass(frozen=True)
class _Run:
    """What LSQR found for one target; see `Projection`."""

    error: Array
    rounding: float
    slope: float
    steps: int
    converged: bool


def _lsqr(
    watched: _Watched,
    target: Array,
    cut: float,
    goal: float,
    max_iterations: int,
    eps: float,
) -> _Run:
    solution = np.zeros(watched.shape[1])
    error, left, rounding = target, float(np.linalg.norm(target)), 0.0
    slope = watched.begin(error)
    steps = 0
    # Within a tenth of the cut-off, sqrt(1 - 0.1^2) of the error is out of reach.
    relative = 0.1 * cut

    def converged() -> bool:
        return left + rounding <= goal or slope <= 0.1 * cut * watched.sigma_max * left

    for _ in range(_STARTS):
        if converged() or steps >= max_iterations:
            break
        found = scipy.sparse.linalg.lsqr(
            watched,
            error,
            atol=relative,
            btol=0.5 * goal / left,
            conlim=0,
            iter_lim=max_iterations - steps,
        )
        watched.end_of_run()
        steps += int(found[2])
        better = solution + found[0]
        remaining = target - watched.operator.matvec(better)
        added = _rounding(better, watched.sigma_max, eps)
        before, after = left + rounding, float(np.linalg.norm(remaining)) + added
        # Near the least distance the slope still falls where the distance does not.
        if after > before * (1 + 1e-9):
            break
        flatter = watched.begin(remaining)
        if after >= before and flatter >= slope:
            break
        solution, error, rounding, slope = better, remaining, added, flatter
        left = float(np.linalg.norm(error))
        relative = max(0.01 * relative, 10 * eps)
    return _Run(error, rounding, slope, steps, converged())


def _rounding(solution: Array, sigma_max: float, eps: float) -> float:
    return _PRODUCT_ROUNDING * eps * sigma_max * float(np.linalg.norm(solution))


class _Watched(scipy.sparse.linalg.LinearOperator):
    """Products for LSQR, cleaned of rounding; its bidiagonal matrix is read off them.

    LSQR asks for `J^T u_1, J v_1, J^T u_2, ...` with unit vectors that are orthogonal
    in exact arithmetic, as `u_k+1 = (J v_k - alpha_k u_k) / beta_k+1` and
    `v_k+1 = (J^T u_k+1 - beta_k+1 v_k) / alpha_k+1`. What these have along earlier ones
    is rounding and is taken away. (Doing so on one side alone is cheaper, and wrong
    where singular values are as small as those that matter here.)
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
        # The unit vectors of the last calls, and what the last one returned.
        self._vectors: list[Array] = []
        self._product: Array | None = None
        self._n_calls = 0
        self._first: Array | None = None

    def begin(self, error: Array) -> float:
        """Announces the next run's right side; returns `||J^T error||`."""
        first = self.operator.rmatvec(error)
        norm = float(np.linalg.norm(error))
        # LSQR's first product, then, spared.
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
            # This vector is the last product, less what it had along the one before,
            # over its length: the entry is that length.
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
            # Twice is enough, also where next to nothing is left.
            for _ in range(2):
                rest -= (earlier @ rest) @ earlier
            product = along + rest
        self._n_calls += 1
        self._vectors = [*self._vectors[-1:], vector]
        self._product = product
        return product

    def end_of_run(self) -> None:
        """Takes the largest singular value of the run's bidiagonal matrix."""
        entries = self._entries
        self._start()
        if not entries:
            return
        # [[0, B], [B^T, 0]], its rows in the order u_1, v_1, u_2, ..., is tridiagonal,
        # and its eigenvalues are the singular values and their opposites.
        last = len(entries)
        (value,) = scipy.linalg.eigvalsh_tridiagonal(
            np.zeros(last + 1), entries, select="i", select_range=(last, last)
        )
        self.sigma_max = max(self.sigma_max, float(value))


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


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(k, min(k + step, length)) for k in range(0, length, step))


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
        added = _rounding(solution, sigma_max, eps)
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
