"""Subspaces spanned by samples: numerical rank, bases, repeated rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from keras_dalign.numerics.rounding import EPS

if TYPE_CHECKING:
    from keras_dalign.numerics import Array


def numerical_rank(matrix: npt.ArrayLike, rtol: float | None = None) -> int:
    """Rank of a matrix in float64: the singular values above a cut-off.

    The default cut-off is `max(shape) * eps * sigma_max`: rounding in a backward stable
    decomposition may raise a zero singular value to about that size. It is also the
    rule of LAPACK and of `numpy.linalg.matrix_rank`.

    A tall matrix is first reduced to its triangular factor, a block of rows at a time.
    The factor has the same singular values. The cost is about `2 n d^2` flop (for
    `n = 1e5` on two cores, about two seconds for `d = 512` and half a minute for
    `d = 2000`) and memory for a few `d x d` blocks. Unlike the `d x d` Gram matrix,
    which squares the condition number and loses every singular value below
    `1e-8 * sigma_max`, the factor loses no accuracy.

    Args:
        matrix: Shape `(n, d)`, any real dtype; converted to float64.
        rtol: Cut-off relative to the largest singular value. The default is
            `max(n, d) * eps`.

    Returns:
        The rank, `0` for a zero or empty matrix.

    Raises:
        ValueError: If `matrix` is not a finite matrix, or `rtol` is outside `[0, 1)`.
    """
    checked = finite_matrix(matrix, "matrix")
    if rtol is None:
        rtol = max(checked.shape) * EPS
    elif not 0 <= rtol < 1:
        raise ValueError(f"`rtol` must be in [0, 1). Received: rtol={rtol}")
    if checked.size == 0:
        return 0
    values = singular_values(checked)
    return int(np.count_nonzero(values > rtol * values[0]))


def coordinates(rows: Array, rtol: float) -> Array:
    """Maps unit rows to `rank` coordinates, again with length 1 (or 0).

    The coordinates are the left singular vectors, scaled row by row. They are a linear
    map of the row space, so the same sets of rows are independent, and the rows are
    spread as evenly as possible.

    Returns:
        Shape `(n, rank)`.
    """
    coordinates = unit_rows(orthonormal(rows.T, rtol).T)
    # The decomposition turns a zero row into rounding noise.
    coordinates[~rows.any(axis=1)] = 0
    return coordinates


def unit_rows(matrix: Array) -> Array:
    """The rows scaled to length 1; a zero row stays zero."""
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    scaled: Array = np.divide(matrix, norms, out=np.zeros_like(matrix), where=norms > 0)
    return scaled


def orthonormal(rows: Array, rtol: float) -> Array:
    """Orthonormal basis of the row space, as rows `(rank, d)`."""
    _, values, vectors = np.linalg.svd(rows, full_matrices=False)
    basis: Array = vectors[values > rtol * np.max(values, initial=0.0)]
    return basis


def singular_values(matrix: Array) -> Array:
    """Singular values, largest first; by a blocked triangular factor if it is tall."""
    n, d = matrix.shape
    factor = matrix
    if n > 4 * d:
        step = max(4 * d, 1024)
        factor = np.zeros((0, d))
        for start in range(0, n, step):
            block = np.concatenate([factor, matrix[start : start + step]])
            factor = np.asarray(np.linalg.qr(block, mode="r"), dtype=np.float64)
    values: Array = np.linalg.svd(factor, compute_uv=False).astype(np.float64)
    return values


def first_equal(features: Array) -> npt.NDArray[np.intp]:
    """The index of the first row that equals each row exactly.

    Returns:
        Shape `(n,)`; its own index for a row that repeats no earlier one.
    """
    seen: dict[int, list[int]] = {}
    first = np.arange(len(features))
    for index, row in enumerate(features):
        # Adding 0.0 turns -0.0 into 0.0, which is equal and has other bytes.
        same = seen.setdefault(hash((row + 0.0).tobytes()), [])
        for other in same:
            if np.array_equal(row, features[other]):
                first[index] = other
                break
        else:
            same.append(index)
    return first


def first_occurrences(features: Array) -> npt.NDArray[np.intp]:
    """Indices of the rows that repeat no earlier one, compared exactly."""
    first = first_equal(features)
    return np.flatnonzero(first == np.arange(len(first)))


def visible(features: Array) -> float:
    """Relative size below which a float64 Gram matrix does not show a direction."""
    return math.sqrt(max(features.shape) * EPS)


def visible_rank(features: Array) -> int:
    """Number of directions of the rows that a float64 Gram matrix shows.

    Counts the eigenvalues of the smaller Gram matrix above the rounding error of a zero
    eigenvalue, `visible` squared. It takes a fraction of the time of `numerical_rank`,
    which also counts smaller singular values.

    Args:
        features: Shape `(n, d)`, finite.

    Returns:
        The number.
    """
    n, d = features.shape
    gram = features.T @ features if n >= d else features @ features.T
    values = np.linalg.eigvalsh(gram)
    return int(np.count_nonzero(values > visible(features) ** 2 * values[-1]))


def finite_matrix(value: npt.ArrayLike, name: str) -> Array:
    """Returns the value as a float64 matrix; raises ValueError if it is not finite."""
    matrix = np.asarray(value, dtype=np.float64)
    if matrix.ndim != 2:
        raise ValueError(
            f"`{name}` must be a matrix. Received: {name}.shape={matrix.shape}"
        )
    bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if len(bad):
        raise ValueError(
            f"`{name}` must be finite. Received: NaN or infinity in {len(bad)} of "
            f"{len(matrix)} rows, first in row {bad[0]}"
        )
    return matrix
