"""Normalised features, computed from the trunk's features a block of rows at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from keras_dalign.numerics import threads

if TYPE_CHECKING:
    from keras_dalign.head.alignment_head import AlignmentHead

Array = npt.NDArray[np.float64]

# Squared length below which a sample's features count as equal to their mean. The head
# has the same limit.
LEAST_SQUARE = 1e-12


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """Mean and deviation by which a head computes `v = [sqrt(p) * u / ||u||, 1]`.

    Attributes:
        mean: Mean of the features, shape `(p,)`, float64.
        inverse: Inverse of their standard deviation, shape `(p,)`, float64.
    """

    mean: Array
    inverse: Array


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureRows:
    """The features `v` of all samples, shape `(n, d)`, without a second copy of them.

    Only the trunk's features are stored, in memory or as a memory map. Blocks of rows
    are normalised when they are used.

    Attributes:
        raw: Shape `(n, p)`, of any float dtype; or `(n, d)` without `normalisation`.
        normalisation: How a block is normalised; None if `raw` is `v` already.
    """

    raw: np.ndarray
    normalisation: Normalisation | None = None

    @classmethod
    def from_head(cls, head: AlignmentHead, gated: np.ndarray) -> FeatureRows:
        """The rows of a head's gated features.

        Args:
            head: The head.
            gated: The inputs of its gated units, shape `(n, ...)`.

        Returns:
            The rows; `gated` is not copied.
        """
        mean, variance = head.standardisation()
        inverse = 1.0 / np.sqrt(variance + head.standardize.epsilon)
        return cls(gated.reshape(len(gated), -1), Normalisation(mean, inverse))

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.raw)

    @property
    def d(self) -> int:
        """Number of features, the constant included."""
        return int(self.raw.shape[1]) + (self.normalisation is not None)

    def block(self, rows: Any, dtype: npt.DTypeLike = np.float64) -> np.ndarray:
        """Some rows of `v`.

        Args:
            rows: A slice or indices.
            dtype: The dtype of the computation.

        Returns:
            Shape `(rows, d)`. It may be a view of `raw` if nothing is computed.
        """
        raw = self.raw[rows]
        if self.normalisation is None:
            return raw.astype(dtype, copy=False)
        out = np.empty((len(raw), self.d), dtype)
        u = out[:, :-1]
        np.subtract(raw, self.normalisation.mean.astype(dtype), out=u)
        u *= self.normalisation.inverse.astype(dtype)
        square = np.einsum("ij,ij->i", u, u)
        u *= np.sqrt(u.shape[1] / np.maximum(square, LEAST_SQUARE))[:, None]
        out[:, -1] = 1.0
        return out

    def centred(self, rows: Any, dtype: npt.DTypeLike) -> np.ndarray:
        """Some rows of the trunk's features minus their mean; of `v` if `raw` is `v`.

        A product with `v` is a product with these rows, scaled by columns and by
        `scales`. This is cheaper than to normalise the block.

        Args:
            rows: A slice or indices.
            dtype: The dtype of the computation.

        Returns:
            Shape `(rows, p)`, or `(rows, d)` without `normalisation`.
        """
        raw = self.raw[rows]
        if self.normalisation is None:
            return raw.astype(dtype, copy=False)
        return raw - self.normalisation.mean.astype(dtype)

    @functools.cached_property
    def scales(self) -> Array | None:
        """Factors that give the rows a length of `sqrt(p)`, shape `(n,)`."""
        if self.normalisation is None:
            return None
        out = np.empty(self.n)
        inverse = self.normalisation.inverse

        def compute(rows: slice) -> None:
            for part in self.blocks(16 * self.d, 2**21, rows):
                u = self.centred(part, np.float64) * inverse
                square = np.einsum("ij,ij->i", u, u)
                out[part] = np.sqrt(u.shape[1] / np.maximum(square, LEAST_SQUARE))

        threads.over_rows(compute, self.n, split=self.raw.size >= 2**21)
        return out

    def fold(self, q: Array) -> tuple[Array, Array | None]:
        """Maps coefficients of `v` to those of the centred features and the constant.

        Args:
            q: Shape `(d, k)`.

        Returns:
            Shapes `(p, k)` and `(k,)`: `v q = scales * (centred first) + second`. The
            second is None, and the first is `q`, without `normalisation`.
        """
        if self.normalisation is None:
            return q, None
        return q[:-1] * self.normalisation.inverse[:, None], q[-1]

    def unfold(self, gradient: Array, constant: Array) -> Array:
        """The transpose of `fold`.

        Args:
            gradient: `centred^T (scales * W)`, shape `(p, k)`.
            constant: The sum of the rows of `W`, shape `(k,)`; unused without
                `normalisation`.

        Returns:
            `v^T W`, shape `(d, k)`.
        """
        if self.normalisation is None:
            return gradient
        scaled = gradient * self.normalisation.inverse[:, None]
        return np.concatenate([scaled, constant[None]])

    def dense(self) -> Array:
        """All rows in float64, shape `(n, d)`."""
        return self.block(slice(None))

    def take(self, rows: npt.NDArray[np.intp]) -> FeatureRows:
        """Some of the samples; a copy of their features."""
        return FeatureRows(self.raw[rows], self.normalisation)

    def blocks(
        self, row_bytes: int, block_bytes: int, rows: slice | None = None
    ) -> Iterator[slice]:
        """Slices of rows for blocks of about a given size.

        Args:
            row_bytes: Bytes of a row and of what is computed from it.
            block_bytes: Bytes of a block.
            rows: A slice of rows; all by default.

        Yields:
            Slices that cover the rows in order.
        """
        first, last = (rows.start, rows.stop) if rows else (0, self.n)
        step = max(block_bytes // row_bytes, 64)
        for start in range(first, last, step):
            yield slice(start, min(start + step, last))
