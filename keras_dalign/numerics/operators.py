"""Linear operators: matrices given by their products, by their rows, or in memory."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from keras_dalign.numerics import Array

# Rows formed at a time by default.
_BLOCK_ROWS = 256


class Products(abc.ABC):
    """A matrix given by its products with vectors.

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
    """A matrix given by its products and its rows, which need not fit in memory."""

    @abc.abstractmethod
    def blocks(self, size: int) -> Iterator[tuple[slice, Array]]:
        """All rows in order, about `size` of them at a time.

        Args:
            size: Approximate number of rows of a block.

        Returns:
            An iterator over pairs of a slice of rows and these rows,
            `(some, columns)`.
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
        for here, block in self.blocks(_BLOCK_ROWS):
            matrix[here] = block
        return matrix

    def gram(self, lot: int) -> Array:
        """The Gram matrix `J J^T`, `(rows, rows)`.

        Args:
            lot: Rows kept at a time. All rows are formed once for each such lot.

        Returns:
            The Gram matrix, both triangles.
        """
        rows, columns = self.shape
        gram = np.empty((rows, rows))
        for start in range(0, rows, lot):
            stop = min(start + lot, rows)
            held = np.empty((stop - start, columns))
            for here, block in self.blocks(min(lot, _BLOCK_ROWS)):
                first, last = max(here.start, start), min(here.stop, stop)
                if first < last:
                    part = block[first - here.start : last - here.start]
                    held[first - start : last - start] = part
                if here.stop > start:
                    # Rows of the lot that are still missing come with later blocks,
                    # which overwrite their entries.
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


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(k, min(k + step, length)) for k in range(0, length, step))
