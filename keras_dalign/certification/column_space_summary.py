"""Residual, rank and condition of the Jacobian of an output layer or a head."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_dalign.head.alignment_head import EXPLOITING, AlignmentHead
from keras_dalign.numerics.gram import gram_matrix
from keras_dalign.numerics.rounding import EPS

if TYPE_CHECKING:
    from keras_dalign.numerics import Array


@dataclasses.dataclass(frozen=True)
class ColumnSpaceSummary:
    """The column space of a Jacobian `J`, and its distance to the targets.

    Attributes:
        residual: Distance of the targets to it, relative to their norm.
        rank: The rank of `J`.
        condition: Smallest over largest nonzero singular value of `J`.
    """

    residual: float
    rank: int
    condition: float

    def entries(self, prefix: str) -> dict[str, float]:
        """The values by the names of the monitor's entries."""
        values = (self.residual, self.rank, self.condition)
        return dict(zip(entry_names(prefix), values, strict=True))


def entry_names(prefix: str) -> tuple[str, str, str]:
    """The names of the monitor's entries for residual, rank and condition."""
    return f"{prefix}_residual", f"{prefix}_rank", f"{prefix}_condition"


def output_layer_space(
    dense: keras.layers.Dense, features: Array, targets: Array
) -> ColumnSpaceSummary:
    """The column space of `J = [z, 1] (x) I_C`, or `z (x) I_C` without a bias.

    Args:
        dense: The output layer.
        features: `z`, shape `(n, p)`.
        targets: `Y_l`, shape `(n, C)`.

    Returns:
        Residual, rank and condition of `J`.
    """
    matrix: Array = features.astype(np.float64)
    if dense.use_bias:
        matrix = np.concatenate([matrix, np.ones((len(matrix), 1))], axis=1)
    rows, columns = matrix.shape
    if columns >= rows:
        squares, basis = np.linalg.eigh(matrix @ matrix.T)
        values = np.sqrt(np.maximum(squares, 0.0))
    else:
        basis, values, _ = np.linalg.svd(matrix, full_matrices=False)
    outputs = targets.shape[1]
    kept = values > _relative_cutoff(rows * outputs, columns * outputs) * values.max()
    error = targets - basis[:, kept] @ (basis[:, kept].T @ targets)
    # If the column space is all of R^n, `error` is rounding alone.
    full = np.count_nonzero(kept) == rows
    return ColumnSpaceSummary(
        0.0 if full else _relative(float(np.linalg.norm(error)), targets),
        int(np.count_nonzero(kept)) * outputs,
        _condition(values[kept]),
    )


def head_space(
    head: AlignmentHead, features: Any, targets: Array, gates: tuple[Array, Array]
) -> ColumnSpaceSummary:
    """The column space of the head's `J = blockdiag([Phi_1, 1], ..., [Phi_C, 1])`.

    Args:
        head: The head, in either phase.
        features: The head's inputs.
        targets: `Y_l`, shape `(n, C)`.
        gates: `r` and `w`, see `AlignmentHead.gates_in_use`.

    Returns:
        Residual, rank and condition of `J`.
    """
    r, w = gates
    gated = features[1] if isinstance(features, (list, tuple)) else features
    gated = gated.reshape(len(gated), -1).astype(np.float64)
    moments = None
    if head.phase != EXPLOITING:
        moments = gated.mean(axis=0), gated.var(axis=0)
    rows = head.normalize_exactly(gated, moments)

    n, outputs = targets.shape
    groups = len(w)

    def gram(c: int) -> Array:
        group = c % groups  # Shared gates have one group, for every output.
        return gram_matrix(rows, r[:, group], w[group], head.slope) + 1.0

    squares = np.stack([np.linalg.eigvalsh(gram(c)) for c in range(groups)])
    squares = np.repeat(np.maximum(squares, 0.0), outputs // groups, axis=0)
    columns = r.shape[0] * r.shape[2] + 1
    kept = (
        squares > _relative_cutoff(n * outputs, columns * outputs) ** 2 * squares.max()
    )
    missed = 0.0
    # Outputs with a Gram matrix of full rank have a residual of 0.
    for c in np.flatnonzero(~kept.all(axis=1)).tolist():
        _, vectors = np.linalg.eigh(gram(c))
        missed += float(np.sum((vectors[:, ~kept[c]].T @ targets[:, c]) ** 2))
    return ColumnSpaceSummary(
        _relative(math.sqrt(missed), targets),
        int(np.count_nonzero(kept)),
        _condition(np.sqrt(squares[kept])),
    )


def _relative(error: float, targets: Array) -> float:
    """The error relative to the norm of the targets; 0 for targets of 0."""
    norm = float(np.linalg.norm(targets))
    return min(error / norm, 1.0) if norm else 0.0


def _relative_cutoff(*shape: int) -> float:
    """The largest singular value of `J` that counts as zero, relative to the largest.

    In the Gram matrix, the square of a smaller one is lost to rounding.

    Args:
        *shape: The shape of `J`.

    Returns:
        `sqrt(max(shape) * eps)`.
    """
    return math.sqrt(max(shape) * EPS)


def _condition(values: Array) -> float:
    return float(values.min() / values.max()) if values.size else 0.0
