"""The Jacobian of a model's outputs in its parameters, as an operator in float64.

For `n` samples and `C` outputs `J` has `n C` rows, in the C-order of the outputs
`(n, C)`, and a column for each parameter. Products with it and with its transpose read
the data batch by batch, in inference mode, and hold one batch at a time. Where the
outputs are linear in the parameters, `J` has structure. Products use it, and `J` is not
formed:

- for a last `Dense` layer, `J = features (x) I_C` (Kronecker product);
- for an alignment head that exploits, `J` is block-diagonal, one block for each output.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import TYPE_CHECKING

import keras
import numpy as np
import numpy.typing as npt
from scipy.sparse.linalg import LinearOperator

from keras_dalign.numerics.memory import check_memory

if TYPE_CHECKING:
    from keras_dalign.numerics import Array
    from keras_dalign.solving.problem import ConvexProblem


PER_PARAMETER = "P, one entry per parameter"

# The most bytes and the most vectors of one vectorised product.
_STACK_BYTES = 2**28
_MAX_STACK = 32
# The most bytes of the rows of the dense Jacobian that are computed at once.
_ROWS_BYTES = 2**28


class Jacobian(abc.ABC):
    """The Jacobian `J`, of shape `(n C, P)`, through its products; see `jacobian`.

    It belongs to the weights at the time it was made. Vectors and matrices are NumPy
    arrays in float64. Every product reads the data again and checks that they have not
    changed.

    Attributes:
        shape: `(n * C, P)`.
        n: Number of samples.
        units: Number of outputs, `C`.
        variables: The model's variables that the columns belong to, in order; each is
            flattened in C-order.
        dtype: The dtype of the computation: `"float64"`, unless the model could not be
            rebuilt in it.
        dtype_reason: Why it is not float64; empty if it is.
    """

    # The structure; private to this package.
    # - "generic": none.
    # - "last": `features` are the layer's inputs, with a last column of ones if it has
    #   a bias, shape `(n, p + 1)`.
    # - "head": `problem` is the head's convex problem on these data, for products and
    #   Gram matrices; its targets are zeros.
    kind: str
    features: Array
    problem: ConvexProblem

    def __init__(
        self,
        variables: list[keras.Variable],
        theta: Array,
        outputs: Array,
        dtype: str,
        dtype_reason: str,
    ) -> None:
        self.variables = variables
        self.n, self.units = outputs.shape
        self.shape = (outputs.size, theta.size)
        self.dtype = dtype
        self.dtype_reason = dtype_reason
        self._theta = theta
        self._outputs = outputs

    def __repr__(self) -> str:
        return (
            f"<Jacobian {self.shape[0]} x {self.shape[1]}, kind={self.kind!r}, "
            f"dtype={self.dtype!r}>"
        )

    def theta(self) -> Array:
        """The parameters, shape `(P,)`."""
        return self._theta.copy()

    def outputs(self) -> Array:
        """The model's outputs, shape `(n, C)`."""
        return self._outputs.copy()

    def offset(self) -> Array:
        """The part of the outputs that is constant in the parameters.

        Returns:
            Shape `(n, C)`. For a head that exploits it is the frozen linear part,
            otherwise zeros.
        """
        return np.zeros((self.n, self.units))

    @abc.abstractmethod
    def at(self, theta: npt.ArrayLike) -> Jacobian:
        """The Jacobian at other values of the parameters; the model is not changed.

        Args:
            theta: The values, shape `(P,)`.

        Returns:
            The Jacobian there, with the outputs there.
        """

    def matvec(self, vector: npt.ArrayLike) -> Array:
        """`J v` for `v` of shape `(P,)`.

        Returns:
            Shape `(n C,)`.

        Raises:
            ValueError: If the vector is of another length, or the data have changed.
        """
        vector = as_vector(vector, self.shape[1], PER_PARAMETER)
        return self._product(vector).ravel()

    def rmatvec(self, vector: npt.ArrayLike) -> Array:
        """`J^T u` for `u` of shape `(n C,)`.

        Returns:
            Shape `(P,)`.

        Raises:
            ValueError: If the vector is of another length, or the data have changed.
        """
        vector = as_vector(vector, self.shape[0], "n * C, one entry per output")
        return self._transposed(vector.reshape(self.n, self.units))

    def matmat(self, matrix: npt.ArrayLike) -> Array:
        """`J V` for `V` of shape `(P, k)`.

        Returns:
            Shape `(n C, k)`.

        Raises:
            ValueError: If the matrix has other rows, or the data have changed.
        """
        matrix = _matrix(matrix, self.shape[1], "P, one row per parameter")
        out = np.empty((self.shape[0], matrix.shape[1]))
        for columns in _stacks(matrix.shape[1], self.shape[1]):
            products = self._products(np.ascontiguousarray(matrix[:, columns].T))
            out[:, columns] = products.reshape(len(products), -1).T
        return out

    def rmatmat(self, matrix: npt.ArrayLike) -> Array:
        """`J^T U` for `U` of shape `(n C, k)`.

        Returns:
            Shape `(P, k)`.

        Raises:
            ValueError: If the matrix has other rows, or the data have changed.
        """
        matrix = _matrix(matrix, self.shape[0], "n * C, one row per output")
        out = np.empty((self.shape[1], matrix.shape[1]))
        for columns in _stacks(matrix.shape[1], self.shape[1]):
            stack = np.ascontiguousarray(matrix[:, columns].T)
            out[:, columns] = self._transposeds(stack.reshape(-1, self.n, self.units)).T
        return out

    def row_blocks(self, max_bytes: int = _ROWS_BYTES) -> Iterator[tuple[slice, Array]]:
        """The dense Jacobian in blocks of rows, in order.

        Args:
            max_bytes: The most bytes of a block, unless one sample's rows take more.

        Yields:
            The rows' positions as a slice, and the rows, shape `(rows, P)`.

        Raises:
            ValueError: If the data have changed.
        """
        per_sample = 8 * self.units * self.shape[1]
        size = int(max(1, max_bytes // max(per_sample, 1)))
        yield from self._row_blocks(size)

    def dense(self) -> Array:
        """The dense `J`.

        Returns:
            Shape `(n C, P)`.

        Raises:
            MemoryError: If it takes more than the free memory, before computing it.
            ValueError: If the data have changed.
        """
        check_memory(8 * self.shape[0] * self.shape[1], f"The dense {self!r}")
        out = np.empty(self.shape)
        for rows, block in self.row_blocks():
            out[rows] = block
        return out

    def to_scipy(self) -> LinearOperator:
        """`J` as a `scipy.sparse.linalg.LinearOperator`."""
        return LinearOperator(
            dtype=np.float64,
            shape=self.shape,
            matvec=self.matvec,
            rmatvec=self.rmatvec,
            matmat=self.matmat,
            rmatmat=self.rmatmat,
        )

    @abc.abstractmethod
    def _product(self, vector: Array) -> Array: ...

    @abc.abstractmethod
    def _transposed(self, cotangents: Array) -> Array: ...

    @abc.abstractmethod
    def _row_blocks(self, size: int) -> Iterator[tuple[slice, Array]]: ...

    def _products(self, stack: Array) -> Array:
        return np.stack([self._product(vector) for vector in stack])

    def _transposeds(self, stack: Array) -> Array:
        return np.stack([self._transposed(cotangents) for cotangents in stack])


def as_vector(vector: npt.ArrayLike, size: int, meaning: str) -> Array:
    """A vector as a float64 array of shape `(size,)`.

    Args:
        vector: Shape `(size,)` or `(size, 1)`.
        size: Its length.
        meaning: What the length is, for the error.

    Returns:
        The array.

    Raises:
        ValueError: If the shape is another one.
    """
    array = np.asarray(vector, dtype=np.float64)
    if array.shape not in ((size,), (size, 1)):
        raise ValueError(
            f"The vector must have {size} entries ({meaning}). Received: shape "
            f"{array.shape}"
        )
    return array.ravel()


def _matrix(matrix: npt.ArrayLike, size: int, meaning: str) -> Array:
    array = np.asarray(matrix, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] != size:
        raise ValueError(
            f"The matrix must have {size} rows ({meaning}). Received: shape "
            f"{array.shape}"
        )
    return array


def _stacks(n_columns: int, n_parameters: int) -> Iterator[slice]:
    """Slices of the columns of a product, so that each fits the device."""
    fitting = _STACK_BYTES // max(8 * n_parameters, 1)
    step = int(min(max(fitting, 1), _MAX_STACK))
    return (slice(i, min(i + step, n_columns)) for i in range(0, n_columns, step))
