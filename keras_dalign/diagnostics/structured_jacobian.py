"""Jacobians with structure, which is used for products: last layer, alignment head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import keras
import numpy as np
import numpy.typing as npt

from keras_dalign.diagnostics.jacobian import PER_PARAMETER, Jacobian, as_vector

if TYPE_CHECKING:
    from keras_dalign.numerics import Array
    from keras_dalign.solving.problem import ConvexProblem


class LastLayerJacobian(Jacobian):
    """Jacobian of a last `Dense` layer: `J = features (x) I_C`."""

    kind = "last"

    def __init__(
        self,
        variables: list[keras.Variable],
        weights: Array,
        features: Array,
        dtype: str,
        dtype_reason: str,
    ) -> None:
        outputs = features @ weights
        super().__init__(variables, weights.ravel(), outputs, dtype, dtype_reason)
        self.features = features

    def at(self, theta: npt.ArrayLike) -> Jacobian:
        """The Jacobian at other values of the parameters; see `Jacobian.at`."""
        theta = as_vector(theta, self.shape[1], PER_PARAMETER)
        return LastLayerJacobian(
            self.variables,
            theta.reshape(-1, self.units),
            self.features,
            self.dtype,
            self.dtype_reason,
        )

    def _product(self, vector: Array) -> Array:
        product: Array = self.features @ vector.reshape(-1, self.units)
        return product

    def _transposed(self, cotangents: Array) -> Array:
        product: Array = self.features.T @ cotangents
        return product.ravel()

    def _row_blocks(self, size: int) -> Iterator[tuple[slice, Array]]:
        identity = np.eye(self.units)
        for start in range(0, self.n, size):
            z = self.features[start : start + size]
            block = np.einsum("ij,cd->icjd", z, identity).reshape(-1, self.shape[1])
            first = start * self.units
            yield slice(first, first + len(block)), block


class HeadJacobian(Jacobian):
    """Jacobian of an alignment head that exploits; it is block-diagonal."""

    kind = "head"

    def __init__(
        self,
        variables: list[keras.Variable],
        theta: Array,
        outputs: Array,
        dtype: str,
        dtype_reason: str,
        problem: ConvexProblem,
    ) -> None:
        super().__init__(variables, theta, outputs, dtype, dtype_reason)
        self.problem = problem

    def at(self, theta: npt.ArrayLike) -> Jacobian:
        """The Jacobian at other values of the parameters; see `Jacobian.at`."""
        theta = as_vector(theta, self.shape[1], PER_PARAMETER)
        logits = self.problem.logits(theta)
        return HeadJacobian(
            self.variables, theta, logits, self.dtype, self.dtype_reason, self.problem
        )

    def offset(self) -> Array:
        """The frozen linear part `a . z + b0`, shape `(n, C)`."""
        return self.problem.offset.copy()

    def _product(self, vector: Array) -> Array:
        return self.problem.product(vector)

    def _transposed(self, cotangents: Array) -> Array:
        return self.problem.transposed_product(cotangents)

    def _row_blocks(self, size: int) -> Iterator[tuple[slice, Array]]:
        problem = self.problem
        d, units, width = problem.d, problem.units, problem.width
        outputs = np.arange(units)
        for start in range(0, self.n, size):
            zh = problem.rows.block(slice(start, start + size))
            block = np.zeros((len(zh), units, self.shape[1]))
            q = block[:, :, : d * units * width].reshape(
                len(zh), units, d, units, width
            )
            values = problem.gates.values(zh)
            gates = np.broadcast_to(values, (len(zh), units, width))
            q[:, outputs, :, outputs] = np.einsum("id,icm->cidm", zh, gates)
            block[:, :, : d * units * width] = q.reshape(len(zh), units, -1)
            block[:, outputs, d * units * width + outputs] = 1.0
            first = start * units
            rows = slice(first, first + len(zh) * units)
            yield rows, block.reshape(len(zh) * units, -1)
