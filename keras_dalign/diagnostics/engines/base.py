"""The interface of all engines: parameters as one vector, NumPy in and out."""

from __future__ import annotations

import abc
import contextlib
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_dalign.diagnostics.precision import float64_context

if TYPE_CHECKING:
    from keras_dalign.numerics import Array


class Engine(abc.ABC):
    """Products of one batch's Jacobian with vectors, in inference mode.

    The parameters are one vector `theta` of length `size = P`: the variables in order,
    each flattened in C-order. For a batch of `b` samples the outputs are `(b, C)`.
    Arguments and results are NumPy arrays, results in float64. The computation is in
    `dtype` and in the model's dtypes. Functions are compiled once for each shape of a
    batch, so pad smaller batches.

    Args:
        model: The model.
        variables: The variables to differentiate by; all others are constants. Products
            are at their current values, or at `theta` if it is given.
        dtype: `"float64"` or `"float32"`.
    """

    def __init__(
        self, model: keras.Model, variables: list[keras.Variable], dtype: str
    ) -> None:
        self.model = model
        self.variables = variables
        self.dtype = dtype
        sizes = [math.prod(variable.shape) for variable in variables]
        self._ends = list(itertools.accumulate(sizes, initial=0))
        self.size = self._ends[-1]
        # Values that replace the model's other variables while a backend compiles.
        self._constants: list[tuple[keras.Variable, Any]] = []

    def outputs(self, x: Any) -> Any:
        """The model's outputs, shape `(b, C)`, or the structure that they have."""
        with self._context():
            outputs = self._run(self._outputs, self._put_all(x))
            return keras.tree.map_structure(_to_numpy, outputs)

    def outputs_at(self, x: Any, theta: Array) -> Array:
        """The outputs at parameters `theta`, `(P,)`; shape `(b, C)`."""
        return self._product(self._call, x, theta=theta)

    def jvp(self, x: Any, tangent: Array, theta: Array | None = None) -> Array:
        """`J v` for `v` of shape `(P,)`; shape `(b, C)`."""
        return self._product(self._jvp, x, tangent, theta=theta)

    def vjp(self, x: Any, cotangents: Array, theta: Array | None = None) -> Array:
        """`J^T u` for `u` of shape `(b, C)`; shape `(P,)`."""
        return self._product(self._vjp, x, cotangents, theta=theta)

    def jvps(self, x: Any, tangents: Array, theta: Array | None = None) -> Array:
        """`J V` for `V` of shape `(k, P)`; shape `(k, b, C)`."""
        return self._product(self._jvps, x, tangents, theta=theta)

    def vjps(self, x: Any, cotangents: Array, theta: Array | None = None) -> Array:
        """`J^T U` for `U` of shape `(k, b, C)`; shape `(k, P)`."""
        return self._product(self._vjps, x, cotangents, theta=theta)

    def rows(self, x: Any, theta: Array | None = None) -> Array:
        """The dense Jacobian, `(b, C, P)`, if the samples are independent."""
        return self._product(self._rows, x, theta=theta)

    @abc.abstractmethod
    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function of tensors, compiled where the backend compiles."""

    @abc.abstractmethod
    def _jvp(self, theta: Any, x: Any, tangent: Any) -> Any: ...

    @abc.abstractmethod
    def _vjp(self, theta: Any, x: Any, cotangents: Any) -> Any: ...

    @abc.abstractmethod
    def _jvps(self, theta: Any, x: Any, tangents: Any) -> Any: ...

    @abc.abstractmethod
    def _vjps(self, theta: Any, x: Any, cotangents: Any) -> Any: ...

    @abc.abstractmethod
    def _rows(self, theta: Any, x: Any) -> Any: ...

    def _outputs(self, x: Any) -> Any:
        with keras.StatelessScope(state_mapping=self._constants):
            return self.model(x, training=False)

    def _call(self, theta: Any, x: Any) -> Any:
        """The outputs `(b, C)` as a function of `theta`."""
        values = [
            ops.cast(ops.reshape(theta[start:end], variable.shape), variable.dtype)
            for variable, (start, end) in zip(
                self.variables, itertools.pairwise(self._ends), strict=True
            )
        ]
        own = zip(self.variables, values, strict=True)
        with keras.StatelessScope(state_mapping=[*self._constants, *own]):
            return ops.cast(self.model(x, training=False), self.dtype)

    def _product(
        self,
        function: Callable[..., Any],
        x: Any,
        *factors: Array,
        theta: Array | None,
    ) -> Array:
        with self._context():
            at = self._theta() if theta is None else self._put(theta)
            tensors = [self._put(factor) for factor in factors]
            return _to_numpy(self._run(function, at, self._put_all(x), *tensors))

    def _theta(self) -> Any:
        values = [ops.cast(variable.value, self.dtype) for variable in self.variables]
        return ops.concatenate([ops.reshape(value, (-1,)) for value in values])

    def _put(self, array: Array) -> Any:
        return ops.convert_to_tensor(array, dtype=self.dtype)

    def _put_all(self, x: Any) -> Any:
        return keras.tree.map_structure(ops.convert_to_tensor, x)

    def _context(self) -> Any:
        if self.dtype == "float64":
            return float64_context()
        return contextlib.nullcontext()


def sample_as_batch(sample: Any) -> Any:
    """One sample's inputs as those of a batch of one."""
    return keras.tree.map_structure(lambda leaf: leaf[None], sample)


def _to_numpy(tensor: Any) -> Array:
    array: Array = np.asarray(ops.convert_to_numpy(tensor)).astype("float64")
    return array
