"""The independent least-squares problems of a Jacobian, as operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_dalign.numerics.operators import DenseOperator, Operator, Products

if TYPE_CHECKING:
    from keras_dalign.diagnostics.jacobian import Jacobian
    from keras_dalign.numerics import Array
    from keras_dalign.solving.problem import ConvexProblem


@dataclasses.dataclass(frozen=True)
class System:
    """One of the independent least-squares problems of a Jacobian.

    Attributes:
        operator: Its matrix, `(rows, columns)`.
        targets: `(rows, k)`.
        gram_flops: Multiply-adds for its Gram matrix.
        unit: The fewest rows that are formed together for the Gram matrix; 0 if it is
            computed without forming any.
    """

    operator: Operator
    targets: Array
    gram_flops: float
    unit: int


class HeadOperator(Operator):
    """One output's block of the head's Jacobian, `[Phi_c, 1]`."""

    def __init__(self, problem: ConvexProblem, output: int) -> None:
        super().__init__((problem.n, problem.d * problem.width + 1))
        self._problem = problem.single_output(output)

    def matvec(self, vector: Array) -> Array:
        """The product with a vector; see `Operator`."""
        return self._problem.product(vector)[:, 0]

    def rmatvec(self, vector: Array) -> Array:
        """The transpose's product with a vector; see `Operator`."""
        return self._problem.transposed_product(vector[:, None])

    def blocks(self, size: int) -> Iterator[tuple[slice, Array]]:
        """All rows, a block at a time; see `Operator`."""
        problem = self._problem
        for start in range(0, problem.n, size):
            features = problem.rows.block(slice(start, start + size))
            gates = problem.gates.values(features)[:, 0]
            rows = np.empty((len(features), self.shape[1]))
            for j in range(problem.d):
                columns = slice(j * problem.width, (j + 1) * problem.width)
                np.multiply(features[:, j : j + 1], gates, out=rows[:, columns])
            rows[:, -1] = 1.0
            yield slice(start, start + len(rows)), rows

    def gram(self, lot: int) -> Array:  # noqa: ARG002
        """The Gram matrix, without forming the features; see `Operator`."""
        return self._problem.gram(0)


class JacobianOperator(Operator):
    """The Jacobian without structure, through its products."""

    def __init__(self, J: Jacobian) -> None:
        super().__init__(J.shape)
        self._jacobian = J

    def matvec(self, vector: Array) -> Array:
        """The product with a vector; see `Operator`."""
        return checked_finite(self._jacobian.matvec(vector))

    def rmatvec(self, vector: Array) -> Array:
        """The transpose's product with a vector; see `Operator`."""
        return checked_finite(self._jacobian.rmatvec(vector))

    def blocks(self, size: int) -> Iterator[tuple[slice, Array]]:
        """All rows, a block at a time; see `Operator`."""
        for here, rows in self._jacobian.row_blocks(8 * size * self.shape[1]):
            yield here, checked_finite(rows)


def systems_of(J: Jacobian, targets: Array) -> list[System]:
    """Splits the least squares in a Jacobian into independent problems.

    Args:
        J: The Jacobian, `(nC, P)`.
        targets: The modified targets, `(n, C)`.

    Returns:
        One problem for a last layer, whose outputs share one matrix; one for each
        output of a head; one for any other Jacobian.

    Raises:
        ValueError: If the Jacobian is not finite.
    """
    structured: Any = J
    if J.kind == "last":
        features = structured.features
        n, columns = features.shape
        operator = DenseOperator(checked_finite(features))
        return [System(operator, targets, float(n) * n * columns, 0)]
    if J.kind == "head":
        problem = structured.problem
        flops = float(problem.n) ** 2 * (problem.d + problem.width)
        return [
            System(HeadOperator(problem, c), targets[:, c : c + 1], flops, 0)
            for c in range(J.units)
        ]
    rows, columns = J.shape
    column = targets.reshape(-1, 1)
    flops = float(rows) * rows * columns
    return [System(JacobianOperator(J), column, flops, J.units)]


@dataclasses.dataclass(frozen=True)
class KnownColumns:
    """Columns of the Jacobian of the form `phi (x) I_C`.

    Attributes:
        basis: Orthonormal basis of the columns of `phi`, `(n, r)`.
        sigma_max: Largest singular value of `phi`.
    """

    basis: Array
    sigma_max: float


class Deflated(Products):
    """`(I - Q Q^T) J`, with an orthonormal basis `Q (x) I_C` of some columns of `J`.

    Least squares in it are those in `J`, with these columns solved exactly.
    """

    def __init__(self, products: Products, basis: Array) -> None:
        super().__init__(products.shape)
        self._products = products
        self._basis = basis

    def outside(self, vector: Array) -> Array:
        """The part of a vector `(rows,)` orthogonal to the basis; shape `(rows,)`."""
        matrix = vector.reshape(len(self._basis), -1)
        return (matrix - self._basis @ (self._basis.T @ matrix)).ravel()

    def matvec(self, vector: Array) -> Array:
        """The product with a vector; see `Products`."""
        return self.outside(self._products.matvec(vector))

    def rmatvec(self, vector: Array) -> Array:
        """The transpose's product with a vector; see `Products`."""
        return self._products.rmatvec(self.outside(vector))


def checked_finite(array: Array) -> Array:
    """Checks that part of a Jacobian is finite.

    Args:
        array: Any array.

    Returns:
        The array itself.

    Raises:
        ValueError: If it is not.
    """
    if not np.isfinite(array).all():
        raise ValueError(
            "The Jacobian must be finite: the model has probably diverged, or is not "
            "differentiable at these inputs. Received: NaN or infinite derivatives"
        )
    return array
