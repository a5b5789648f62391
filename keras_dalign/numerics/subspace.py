"""Subspaces spanned by samples: numerical rank, bases, repeated rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from keras_dalign.numerics import Array

EPS = float(np.finfo(np.float64).eps)


def numerical_rank(matrix: npt.ArrayLike, rtol: float | None = None) -> int:
    """Rank of a matrix in float64: the singular values above a cut-off.

    The default cut-off is `max(shape) * eps * sigma_max`, the size to which rounding in
    a backward stable decomposition may lift a singular value that is zero (the rule of
    LAPACK users, and of `numpy.linalg.matrix_rank`).

    A tall matrix is first reduced to its triangular factor, block of rows by block of
    rows, and the singular values are those of the factor. This costs about
    `2 n d^2` flop (`n = 1e5`: `d = 512` about a second or two on two cores, `d = 2000`
    half a minute), a copy of a few `d x d` blocks in memory, and no accuracy, whereas
    the `d x d` Gram matrix would square the condition number and lose every singular
    value below `1e-8 * sigma_max`.

    Args:
        matrix: Shape `(n, d)`, any real dtype; judged in float64.
        rtol: Cut-off relative to the largest singular value. The default is
            `max(n, d) * eps`.

    Returns:
        The rank, `0` for a zero or empty matrix.

    Raises:
        ValueError: If it is no matrix, or not finite, or `rtol` is outside `[0, 1)`.
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
    """Unit rows in as many coordinates as their rank, again of length 1 (or 0).

    Left singular vectors: a linear map of the row space, so the same sets are
    independent, chosen to spread the rows as evenly as possible.

    Returns:
        Shape `(n, rank)`.
    """
    coordinates = unit_rows(orthonormal(rows.T, rtol).T)
    # A zero row comes out of the decomposition as rounding noise.
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
    """Singular values, largest first, by a blocked triangular factor if it is tall."""
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
    """For each row the index of the first row equal to it, compared exactly.

    Returns:
        Shape `(n,)`; a row that repeats no earlier one has its own index.
    """
    seen: dict[int, list[int]] = {}
    first = np.arange(len(features))
    for index, row in enumerate(features):
        # Adding 0.0 turns -0.0, equal but with other bytes, into 0.0.
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
    """Relative size below which a direction is lost in a Gram matrix in float64."""
    return math.sqrt(max(features.shape) * EPS)


def visible_rank(features: Array) -> int:
    """How many directions of the rows show in a Gram matrix in float64.

    Counts the eigenvalues of the smaller Gram matrix above what rounding makes of a
    zero, `visible` squared: a fraction of the time that `numerical_rank` takes, which
    sees smaller ones.

    Args:
        features: Shape `(n, d)`, finite.

    Returns:
        The number of them.
    """
    n, d = features.shape
    gram = features.T @ features if n >= d else features @ features.T
    values = np.linalg.eigvalsh(gram)
    return int(np.count_nonzero(values > visible(features) ** 2 * values[-1]))


def finite_matrix(value: npt.ArrayLike, name: str) -> Array:
    """Returns the value as a float64 matrix, or says what is wrong with it."""
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
