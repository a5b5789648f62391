"""The Jacobian of a model's outputs in its parameters, as an operator in float64.

For `n` samples and `C` outputs `J` has `n C` rows, in the C-order of the outputs
`(n, C)`, and a column per parameter. Products with it and with its transpose go over
the data batch by batch, in inference mode, and hold one batch at a time. Where the
outputs are linear in the parameters, `J` has structure, which is used and never written
out:

- of a last `Dense`, `J = features (x) I_C` (Kronecker product);
- of an alignment head that exploits, `J` is block-diagonal, one block an output.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops
from scipy.sparse.linalg import LinearOperator

from keras_dalign import data
from keras_dalign.alignment_head import EXPLOITING, AlignmentHead
from keras_dalign.determinism import check_deterministic, no_gradients
from keras_dalign.engines import Engine, engine
from keras_dalign.features import FeatureSet, _free_gib
from keras_dalign.gram import gate_activations
from keras_dalign.losses import SquaredError
from keras_dalign.output_path import OutputPath, output_path, untouched_graph
from keras_dalign.precision import (
    RebuildError,
    float64_context,
    in_float64,
    widened,
)
from keras_dalign.problem import ConvexProblem
from keras_dalign.reread_data import RereadData, digest_of, padded

if TYPE_CHECKING:
    from keras_dalign.aligned_model import AlignedModel

Array = npt.NDArray[np.float64]

_PER_PARAMETER = "P, one entry per parameter"
_PARAMETERS = ("head", "last", "all")

# Vectors in one vectorised product: what they take on the device, and how many.
_STACK_BYTES = 2**28
_MAX_STACK = 32
# Samples that a structure is verified on by differentiation.
_FEW = 8
# Rows of the dense Jacobian that are computed at once.
_ROWS_BYTES = 2**28

# Outputs of one function, computed in two ways in one dtype, and in two dtypes: the
# largest difference, in units of the largest output, that is put down to rounding.
_ROUNDING = {"float64": 1e-9, "float32": 1e-3, "float16": 0.1, "bfloat16": 0.1}
_NARROWING = {"float64": 1e-6, "float32": 1e-2, "float16": 0.3, "bfloat16": 0.3}


class Jacobian(abc.ABC):
    """`J`, of shape `(n C, P)`, as products. Made by `jacobian`.

    It is that of the weights at the time it was made. Vectors and matrices are NumPy,
    float64. Every product reads the data again and checks that they are the same.

    Attributes:
        kind: `"generic"`, `"last"` or `"head"`.
        shape: `(n * C, P)`.
        n: Number of samples.
        units: Number of outputs, `C`.
        variables: The model's variables that the columns belong to, in order; each is
            flattened in C-order.
        dtype: What it is computed in: `"float64"`, unless the model could not be
            rebuilt.
        dtype_reason: Why not in float64; empty if it is.
        features: Of kind `"last"` alone: what the layer works on, with a last column of
            ones if it has a bias, shape `(n, p + 1)`.
        problem: Of kind `"head"` alone: the head's convex problem on these data. Its
            products and Gram matrices are what counts: its targets are zeros.
    """

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
            Shape `(n, C)`. Known where the structure says so, as for the head: its
            linear part, which is frozen. Zeros otherwise.
        """
        return np.zeros((self.n, self.units))

    @abc.abstractmethod
    def at(self, theta: npt.ArrayLike) -> Jacobian:
        """The same at other values of the parameters; the model is left alone.

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
        vector = _vector(vector, self.shape[1], _PER_PARAMETER)
        return self._product(vector).ravel()

    def rmatvec(self, vector: npt.ArrayLike) -> Array:
        """`J^T u` for `u` of shape `(n C,)`.

        Returns:
            Shape `(P,)`.

        Raises:
            ValueError: If the vector is of another length, or the data have changed.
        """
        vector = _vector(vector, self.shape[0], "n * C, one entry per output")
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
        """The dense Jacobian, some of its rows at a time, in order.

        Args:
            max_bytes: What a block may take, unless one sample's rows take more.

        Yields:
            The rows that they are, and the rows, shape `(rows, P)`.

        Raises:
            ValueError: If the data have changed.
        """
        per_sample = 8 * self.units * self.shape[1]
        size = int(max(1, max_bytes // max(per_sample, 1)))
        yield from self._row_blocks(size)

    def dense(self) -> Array:
        """`J` written out.

        Returns:
            Shape `(n C, P)`.

        Raises:
            MemoryError: If it takes more than what is free, before it is begun.
            ValueError: If the data have changed.
        """
        _check_memory(8 * self.shape[0] * self.shape[1], f"The dense {self!r}")
        out = np.empty(self.shape)
        for rows, block in self.row_blocks():
            out[rows] = block
        return out

    def to_scipy(self) -> LinearOperator:
        """The same as a `scipy.sparse.linalg.LinearOperator`."""
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


def jacobian(
    model: keras.Model,
    x: Any,
    parameters: str | Sequence[keras.Variable] = "all",
    *,
    batch_size: int = 256,
    steps: int | None = None,
    dtype: str | None = "float64",
) -> Jacobian:
    """The Jacobian of a model's outputs on given data, in inference mode.

    One pass over the data: the outputs are computed, and it is checked that the model
    is deterministic and treats its samples one by one. The computation is that of a
    float64 copy (see `precision.in_float64`), whatever dtype the model trains in. A
    model that cannot be rebuilt is differentiated in its own dtype, which the result
    says. The model is left as it was.

    Args:
        model: A built Keras model with one output of shape `(batch, C)`.
        x: Inputs: arrays, or a stream that can be read again and again, with or without
            targets (`tf.data.Dataset`, `PyDataset`, `DataLoader`); in the same order
            each time.
        parameters: The columns of the Jacobian.

            - `"head"`: `q` and `b` of an `AlignedModel` that exploits.
            - `"last"`: the weights of the last layer that has any; of an `AlignedModel`
              that exploits, its head's `q` and `b`. Where several such layers are
              merged behind them: the weights of all.
            - `"all"`: `model.trainable_variables`; of an `AlignedModel` that exploits,
              what either of its phases trains: the trunk, the linear part and `(q, b)`,
              not the frozen gates.
            - a list of floating variables of the model.
        batch_size: Samples per batch, for arrays.
        steps: Batches that make one pass, for streams that do not end.
        dtype: `"float64"`; or None for the model's own.

    Returns:
        The Jacobian.

    Raises:
        ValueError: If the parameters are none of the model's, the model is stochastic,
            changes when it is called or mixes samples, has not one output of shape
            `(batch, C)`, or if data or outputs are empty, non-finite or cannot be read
            again.
        MemoryError: If features that have to be kept do not fit.

    Example:

    ```python
    J = jacobian(model, x, "last")
    residual = J.to_scipy() @ scipy.sparse.linalg.lsmr(J.to_scipy(), y)[0] - y
    ```
    """
    _check_arguments(model, parameters, dtype)
    stream = RereadData(x, batch_size, steps)
    first = stream.first()
    dtype_reason = ""
    copy = model
    check_deterministic(model, first)
    if dtype == "float64":
        try:
            copy = _agreeing_copy(model, first)
            dtype_reason = _narrow_operations(copy, first)
        except RebuildError as error:
            dtype_reason = str(error)
    else:
        dtype_reason = "the model's own dtype was asked for"
    wide = copy is not model
    stream.wide = wide
    with untouched_graph(model):
        return _Builder(model, copy, stream, wide, dtype_reason).build(parameters)


class _Builder:
    """What it takes to build a Jacobian: model, copy, data, outputs."""

    def __init__(
        self,
        model: keras.Model,
        copy: keras.Model,
        stream: RereadData,
        wide: bool,
        dtype_reason: str,
    ) -> None:
        self.model = model
        self.copy = copy
        self.stream = stream
        self.wide = wide
        self.dtype = "float32" if wide else str(model.compute_dtype)
        if wide and not dtype_reason:
            self.dtype = "float64"
        self.dtype_reason = dtype_reason
        self.device_dtype = "float64" if wide else "float32"
        if not wide and model.variable_dtype == "float64":
            self.device_dtype = "float64"

    def build(self, parameters: str | Sequence[keras.Variable]) -> Jacobian:
        head = exploiting_head(self.copy)
        if parameters in ("head", "last") and head is not None:
            built: Jacobian | None = self.of_head(head)
            if built is not None:
                return built
            parameters = self.originals([head.q, head.bias])
        elif parameters == "head":
            raise ValueError(
                "There is no alignment head that exploits, and whose outputs are "
                "linear in its parameters. Received: parameters='head' for model "
                f"'{self.model.name}' of type {type(self.model).__name__}. Use 'last' "
                "or 'all', or let the model explore and switch first."
            )
        elif parameters == "last":
            path = self.last_path()
            built = None if path.dense is None else self.of_last(path, path.dense)
            if built is not None:
                return built
            parameters = self.originals(path.variables())
        elif parameters == "all":
            parameters = _all_variables(self.model)
        return self.generic(_checked_variables(self.model, parameters))

    def context(self) -> Any:
        return float64_context() if self.wide else contextlib.nullcontext()

    def generic(self, variables: list[keras.Variable]) -> Jacobian:
        derivatives = engine(self.copy, self.copies(variables), self.device_dtype)
        outputs = np.concatenate(
            [
                self.outputs_of(derivatives, batch, index)
                for index, (_, batch) in enumerate(self.stream)
            ]
        )
        theta = _flat(self.copies(variables))
        fixed = None if self.wide else self.model
        return _Generic(
            variables, theta, outputs, self.dtype, self.dtype_reason, derivatives,
            self.stream, fixed,
        )  # fmt: skip

    def last_path(self) -> OutputPath:
        with self.context():
            path = output_path(self.copy, self.stream.first())
        if path is None or not path.last or not path.variables():
            raise ValueError(
                "The last layer with weights cannot be found: the model's `call` must "
                "be made of Keras layers and keras.ops. Received: parameters='last' "
                f"for model '{self.model.name}' of type {type(self.model).__name__}. "
                "Pass the variables instead: parameters=[layer.kernel, layer.bias]."
            )
        return path

    def of_last(self, path: OutputPath, dense: Any) -> Jacobian | None:
        tensor = path.last[0].tensor
        if len(tensor.shape) != 2:
            return None
        with self.context():
            features = keras.Model(path.inputs, tensor)
        p = int(tensor.shape[1])
        variables = [v for v in (dense.kernel, dense.bias) if v is not None]
        weights = np.concatenate(
            [
                np.asarray(_numpy(variable)).reshape(-1, dense.units)
                for variable in variables
            ]
        )
        whole = engine(self.copy, [], self.device_dtype)
        trunk = engine(features, [], self.device_dtype)
        blocks: list[Array] = []
        for index, (_, batch) in enumerate(self.stream):
            z = self.stream.cut(trunk.outputs(self.stream.padded(batch)), batch)
            if dense.bias is not None:
                z = np.concatenate([z, np.ones((len(z), 1))], axis=1)
            # What stands behind the layer, or beside it, shows here.
            outputs = self.outputs_of(whole, batch, index)
            if not _close(outputs, z @ weights, self.rounding):
                return None
            if index == 0:
                if not self.is_linear(self.originals(variables), batch, z):
                    return None
                n_bytes = 8 * self.stream.n_hint * (p + 1)
                _check_memory(n_bytes, "The features of the last layer")
            blocks.append(z)
        return _LastLayer(
            self.originals(variables),
            weights,
            np.concatenate(blocks),
            self.dtype,
            self.dtype_reason,
        )

    def is_linear(
        self, variables: list[keras.Variable], batch: Any, features: Array
    ) -> bool:
        """Whether weights act through the layer alone: tied ones move its features."""
        few = keras.tree.map_structure(lambda leaf: leaf[:_FEW], batch)
        derivatives = engine(self.copy, self.copies(variables), self.device_dtype)
        direction = np.random.default_rng(0).standard_normal(derivatives.size)
        product = features[:_FEW] @ direction.reshape(features.shape[1], -1)
        return _close(product, derivatives.jvp(few, direction), self.rounding)

    def of_head(self, head: AlignmentHead) -> Jacobian | None:
        whole = engine(self.copy, [], self.device_dtype)
        trunk = engine(_trunk(self.copy), [], self.device_dtype)
        features: list[Any] = []
        outputs: list[Array] = []
        for index, (_, batch) in enumerate(self.stream):
            z = trunk.outputs(self.stream.padded(batch))
            features.append(self.stream.cut(z, batch))
            outputs.append(self.outputs_of(whole, batch, index))
        z = keras.tree.map_structure(lambda *parts: np.concatenate(parts), *features)
        n = self.stream.n
        _check_memory(8 * n * head.units * int(head.width), "The head's gates")
        problem = ConvexProblem.of_head(
            head,
            FeatureSet(z, np.zeros((n, head.units)), None, n),
            SquaredError(),
        )
        theta = problem.theta_of(head)
        logits = problem.logits(theta)
        if not _close(np.concatenate(outputs), logits, self.rounding):
            return None
        return _Head(
            self.originals([head.q, head.bias]),
            theta,
            logits,
            self.dtype,
            self.dtype_reason,
            problem,
        )

    @property
    def rounding(self) -> float:
        return _ROUNDING[self.dtype]

    def outputs_of(self, derivatives: Engine, batch: Any, index: int) -> Array:
        """The outputs of one batch, checked."""
        padded = self.stream.padded(batch)
        raw = derivatives.outputs(padded)
        if not isinstance(raw, np.ndarray) or raw.ndim != 2:
            shapes = [leaf.shape for leaf in keras.tree.flatten(raw)]
            raise ValueError(
                "The model must have one output of shape (batch, C). Received: model "
                f"'{self.model.name}' with outputs of shapes {shapes}"
            )
        outputs: Array = self.stream.cut(raw, batch)
        if not np.all(np.isfinite(outputs)):
            bad = int(np.sum(~np.isfinite(outputs).all(axis=1)))
            raise ValueError(
                "The model's outputs are not finite. Received: NaN or infinity for "
                f"{bad} of {len(outputs)} samples of batch {index}. Check the model's "
                "weights."
            )
        if index == 0 and len(raw) > 1:
            self.check_separate(derivatives, padded, raw)
        return outputs

    def check_separate(self, derivatives: Engine, batch: Any, outputs: Array) -> None:
        """Checks that a sample's outputs are its own, whatever else is in the batch."""
        half = len(outputs) - len(outputs) // 2
        order = np.arange(len(outputs)) % half
        repeated = keras.tree.map_structure(lambda leaf: leaf[order], batch)
        again = derivatives.outputs(repeated)
        if not _close(outputs[:half], again[:half], self.rounding):
            difference = np.max(np.abs(outputs[:half] - again[:half]))
            raise ValueError(
                "The outputs of a sample depend on the other samples of its batch, so "
                "the Jacobian is not one of the data alone. Received: model "
                f"'{self.model.name}', whose outputs change by up to {difference:.3g} "
                "with the rest of the batch. Call batch normalisation without "
                "training=True, and let no layer mix samples in inference."
            )

    def copies(self, variables: list[keras.Variable]) -> list[keras.Variable]:
        known = {
            id(v): twin
            for v, twin in zip(self.model.weights, self.copy.weights, strict=True)
        }
        return [known[id(v)] for v in variables]

    def originals(self, variables: list[keras.Variable]) -> list[keras.Variable]:
        known = {
            id(twin): v
            for v, twin in zip(self.model.weights, self.copy.weights, strict=True)
        }
        return [known[id(v)] for v in variables]


class _Generic(Jacobian):
    """Any variables of any model: products by automatic differentiation."""

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
        live: keras.Model | None,
        moved: Array | None = None,
    ) -> None:
        super().__init__(variables, theta, outputs, dtype, dtype_reason)
        self._engine = derivatives
        self._stream = stream
        self._live = live
        self._moved = moved
        self._weights = None if live is None else digest_of(live.get_weights())

    def at(self, theta: npt.ArrayLike) -> Jacobian:
        """The same at other values of the parameters; see `Jacobian.at`."""
        theta = _vector(theta, self.shape[1], _PER_PARAMETER)
        outputs = np.empty((self.n, self.units))
        for rows, batch in self._batches():
            there = self._engine.outputs_at(self._stream.padded(batch), theta)
            outputs[rows] = self._stream.cut(there, batch)
        return _Generic(
            self.variables,
            theta,
            outputs,
            self.dtype,
            self.dtype_reason,
            self._engine,
            self._stream,
            self._live,
            theta,
        )

    def _batches(self) -> Iterator[tuple[slice, Any]]:
        if self._live is not None and digest_of(self._live.get_weights()) != (
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
        # Parts of one size, so that they are compiled once.
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


class _LastLayer(Jacobian):
    """A last `Dense`: `J = features (x) I_C`."""

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
        """The same at other values of the parameters; see `Jacobian.at`."""
        theta = _vector(theta, self.shape[1], _PER_PARAMETER)
        return _LastLayer(
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


class _Head(Jacobian):
    """An alignment head that exploits: `J` is block-diagonal."""

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
        """The same at other values of the parameters; see `Jacobian.at`."""
        theta = _vector(theta, self.shape[1], _PER_PARAMETER)
        logits = self.problem.logits(theta)
        return _Head(
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
        d, units, width = problem.r.shape
        outputs = np.arange(units)
        for start in range(0, self.n, size):
            zh = problem.features[start : start + size]
            block = np.zeros((len(zh), units, self.shape[1]))
            q = block[:, :, : d * units * width].reshape(
                len(zh), units, d, units, width
            )
            gates = np.stack(
                [
                    problem.w[c] * gate_activations(zh, problem.r[:, c], problem.slope)
                    for c in range(units)
                ],
                axis=1,
            )
            q[:, outputs, :, outputs] = np.einsum("id,icm->cidm", zh, gates)
            block[:, :, : d * units * width] = q.reshape(len(zh), units, -1)
            block[:, outputs, d * units * width + outputs] = 1.0
            first = start * units
            rows = slice(first, first + len(zh) * units)
            yield rows, block.reshape(len(zh) * units, -1)


def _check_arguments(model: Any, parameters: Any, dtype: Any) -> None:
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            f"`model` must be a built keras.Model. Received: model={model}. Call it "
            "once on a batch of data to build it."
        )
    if isinstance(parameters, str):
        if parameters not in _PARAMETERS:
            raise ValueError(
                f"`parameters` must be one of {_PARAMETERS}, or a list of variables. "
                f"Received: parameters={parameters!r}"
            )
    elif not isinstance(parameters, (list, tuple)):
        raise ValueError(
            f"`parameters` must be one of {_PARAMETERS}, or a list of variables. "
            f"Received: parameters of type {type(parameters).__name__}"
        )
    else:
        _checked_variables(model, parameters)
    if dtype not in ("float64", None):
        raise ValueError(
            "`dtype` must be 'float64', or None for the model's own. Received: "
            f"dtype={dtype!r}"
        )


def _checked_variables(
    model: keras.Model, variables: Sequence[Any]
) -> list[keras.Variable]:
    known = {id(v) for v in model.weights}
    foreign = [
        getattr(v, "path", repr(v)[:60]) for v in variables if id(v) not in known
    ]
    if foreign:
        raise ValueError(
            "All of `parameters` must be variables of the model (layer.kernel, not its "
            f"values). Received: {foreign[:10]}, unknown to model '{model.name}'"
        )
    if len({id(v) for v in variables}) < len(variables):
        paths = [v.path for v in variables]
        raise ValueError(
            f"`parameters` must not name a variable twice. Received: {paths[:10]}"
        )
    integer = [v.path for v in variables if "float" not in str(v.dtype)]
    if integer:
        raise ValueError(
            "Outputs have no derivative in variables that are not floating. Received: "
            f"{integer[:10]}"
        )
    if not variables:
        raise ValueError(
            "There are no parameters to differentiate by. Received: an empty list, or "
            f"model '{model.name}' without trainable variables. Unfreeze layers, or "
            "pass a list of variables."
        )
    return list(variables)


def _all_variables(model: keras.Model) -> list[keras.Variable]:
    head = exploiting_head(model)
    if head is None:
        return list(model.trainable_variables)
    candidates = [
        *_trunk(model).trainable_variables,
        *head.explored_variables,
        *head.exploited_variables,
    ]
    return list({id(variable): variable for variable in candidates}.values())


def exploiting_head(model: keras.Model) -> AlignmentHead | None:
    """The head of an `AlignedModel` that exploits."""
    head = getattr(model, "head", None)
    if isinstance(head, AlignmentHead) and isinstance(
        getattr(model, "trunk", None), keras.Model
    ):
        return head if head.phase == EXPLOITING else None
    return None


def _trunk(model: AlignedModel) -> keras.Model:
    return model.trunk


def _agreeing_copy(model: keras.Model, batch: Any) -> keras.Model:
    """The float64 copy, if it computes what the model computes."""
    copy = in_float64(model, batch)
    with no_gradients():
        own = model(
            keras.tree.map_structure(ops.convert_to_tensor, batch), training=False
        )
        with float64_context():
            wide = keras.tree.map_structure(
                lambda leaf: ops.convert_to_tensor(widened(leaf)), batch
            )
            other = copy(wide, training=False)
    rounding = max(_NARROWING.get(dtype, 0.0) for dtype in _dtypes(model))
    for a, b in zip(keras.tree.flatten(own), keras.tree.flatten(other), strict=True):
        if not _close(_numpy(b), _numpy(a), rounding):
            raise RebuildError(
                "The model's float64 copy computes something else. Received: model "
                f"'{model.name}' of type {type(model).__name__}, whose outputs differ "
                f"by up to {np.max(np.abs(_numpy(a) - _numpy(b))):.3g} from its copy's."
                " Check that `get_config` returns everything that makes it what it is."
            )
    return copy


def _narrow_operations(copy: keras.Model, batch: Any) -> str:
    """Says so if operations of a float64 copy have float32 results all the same."""
    # In float64 outputs are straight along steps as small as these; float32 has steps
    # of its own, which are larger.
    few = keras.tree.map_structure(lambda leaf: widened(leaf[:2]), batch)
    weights = [v for v in copy.weights if "float" in str(v.dtype)]
    values = [_numpy(v) for v in weights]
    rng = np.random.default_rng(0)
    moves = [3e-9 * rng.standard_normal(value.shape) * value for value in values]
    outputs = []
    with no_gradients(), float64_context():
        tensors = keras.tree.map_structure(ops.convert_to_tensor, few)
        for step in (1, -1, 0):
            for variable, value, move in zip(weights, values, moves, strict=True):
                variable.assign(value + step * move)
            leaves = keras.tree.flatten(copy(tensors, training=False))
            outputs.append(np.concatenate([_numpy(leaf).ravel() for leaf in leaves]))
    bend = np.max(np.abs(outputs[0] + outputs[1] - 2 * outputs[2]), initial=0.0)
    if bend <= 1e-11 * np.max(np.abs(outputs[2]), initial=0.0):
        return ""
    return "some operation of the model computes in float32, whatever it is given"


def _dtypes(model: keras.Model) -> set[str]:
    """The dtypes that a model's layers compute in."""
    return {str(layer.compute_dtype) for layer in model._flatten_layers()}


def _close(a: Array, b: Array, tolerance: float) -> bool:
    scale = np.max(np.abs(a), initial=0.0)
    return a.shape == b.shape and bool(np.all(np.abs(a - b) <= tolerance * scale))


def _numpy(tensor: Any) -> Array:
    array: Array = np.asarray(ops.convert_to_numpy(tensor)).astype("float64")
    return array


def _flat(variables: list[keras.Variable]) -> Array:
    return np.concatenate([_numpy(variable).ravel() for variable in variables])


def _vector(vector: npt.ArrayLike, size: int, meaning: str) -> Array:
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
    """The columns of a product, as many at a time as fit the device."""
    fitting = _STACK_BYTES // max(8 * n_parameters, 1)
    step = int(min(max(fitting, 1), _MAX_STACK))
    return (slice(i, min(i + step, n_columns)) for i in range(0, n_columns, step))


def _check_memory(n_bytes: int, what: str) -> None:
    free = _free_gib()
    if free is not None and n_bytes / 2**30 > free:
        raise MemoryError(
            f"{what} would take {n_bytes / 2**30:.3g} GiB of the {free:.3g} GiB that "
            "are free. Use fewer samples, or products (matvec, rmatvec) instead."
        )
