"""The Jacobian in any variables of any model, by automatic differentiation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import numpy.typing as npt

from keras_dalign.diagnostics.jacobian import PER_PARAMETER, Jacobian, as_vector
from keras_dalign.diagnostics.reread_data import RereadData, digest_of, padded
from keras_dalign.head import data

if TYPE_CHECKING:
    from keras_dalign.diagnostics.engines import Engine
    from keras_dalign.numerics import Array


class GenericJacobian(Jacobian):
    """Jacobian in any variables of any model, by automatic differentiation.

    Args:
        variables: See `Jacobian`.
        theta: Values of the variables, shape `(P,)`.
        outputs: The outputs there, shape `(n, C)`.
        dtype: See `Jacobian`.
        dtype_reason: See `Jacobian`.
        derivatives: The engine that differentiates one batch.
        stream: The data.
        source: The model itself if the engine works on it, not on a copy. Its weights
            must not change then.
        moved: `theta` if it differs from the variables' values, else None.
    """

    kind = "generic"

    def __init__(
        self,
        variables: list[keras.Variable],
        theta: Array,
        outputs: Array,
        dtype: str,
        dtype_reason: str,
        derivatives: Engine,
        stream: RereadData,
        source: keras.Model | None,
        moved: Array | None = None,
    ) -> None:
        super().__init__(variables, theta, outputs, dtype, dtype_reason)
        self._engine = derivatives
        self._stream = stream
        self._source = source
        self._moved = moved
        self._weights = None if source is None else digest_of(source.get_weights())

    def at(self, theta: npt.ArrayLike) -> Jacobian:
        """The Jacobian at other values of the parameters; see `Jacobian.at`."""
        theta = as_vector(theta, self.shape[1], PER_PARAMETER)
        outputs = np.empty((self.n, self.units))
        for rows, batch in self._batches():
            there = self._engine.outputs_at(self._stream.padded(batch), theta)
            outputs[rows] = self._stream.cut(there, batch)
        return GenericJacobian(
            self.variables,
            theta,
            outputs,
            self.dtype,
            self.dtype_reason,
            self._engine,
            self._stream,
            self._source,
            theta,
        )

    def _batches(self) -> Iterator[tuple[slice, Any]]:
        if self._source is not None and digest_of(self._source.get_weights()) != (
            self._weights
        ):
            raise ValueError(
                "The model's weights have changed since its Jacobian was made, which "
                f"works on the model itself: {self.dtype_reason}. Make it anew."
            )
        return iter(self._stream)

    def _product(self, vector: Array) -> Array:
        out = np.empty((self.n, self.units))
        for rows, batch in self._batches():
            padded = self._stream.padded(batch)
            out[rows] = self._stream.cut(
                self._engine.jvp(padded, vector, self._moved), batch
            )
        return out

    def _transposed(self, cotangents: Array) -> Array:
        out = np.zeros(self.shape[1])
        for rows, batch in self._batches():
            padded = self._stream.padded(batch)
            filled = self._stream.zero_padded(cotangents[rows], 0)
            out += self._engine.vjp(padded, filled, self._moved)
        return out

    def _products(self, stack: Array) -> Array:
        out = np.empty((len(stack), self.n, self.units))
        for rows, batch in self._batches():
            products = self._engine.jvps(self._stream.padded(batch), stack, self._moved)
            out[:, rows] = products[:, : rows.stop - rows.start]
        return out

    def _transposeds(self, stack: Array) -> Array:
        out = np.zeros((len(stack), self.shape[1]))
        for rows, batch in self._batches():
            padded = self._stream.padded(batch)
            filled = self._stream.zero_padded(stack[:, rows], 1)
            out += self._engine.vjps(padded, filled, self._moved)
        return out

    def _row_blocks(self, size: int) -> Iterator[tuple[slice, Array]]:
        # Parts of equal size, so that only one is compiled.
        largest = self._stream.rows
        step = data.even_batch_size(largest, min(size, largest))
        for rows, batch in self._batches():
            n = rows.stop - rows.start
            for start in range(0, n, step):
                part = keras.tree.map_structure(
                    lambda leaf, start=start: leaf[start : start + step], batch
                )
                count = min(step, n - start)
                block = self._engine.rows(padded(part, step), self._moved)[:count]
                first = (rows.start + start) * self.units
                yield (
                    slice(first, first + count * self.units),
                    block.reshape(count * self.units, -1),
                )
