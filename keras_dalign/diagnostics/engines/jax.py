"""Jacobian products on JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import keras

from keras_dalign.diagnostics.engines.base import Engine, sample_as_batch


class BackendEngine(Engine):
    """Jacobian products by `jax.jvp` and `jax.vjp`, jitted."""

    def __init__(
        self, model: keras.Model, variables: list[keras.Variable], dtype: str
    ) -> None:
        super().__init__(model, variables, dtype)
        self._jitted: dict[str, Any] = {}

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        # Variables are arguments: JAX would compile values in a closure as constants.
        state = list(self.model.variables)
        name = function.__name__

        def pure(values: list[Any], *arguments: Any) -> Any:
            self._constants = list(zip(state, values, strict=True))
            try:
                return function(*arguments)
            finally:
                self._constants = []

        if name not in self._jitted:
            self._jitted[name] = jax.jit(pure)
        return self._jitted[name]([variable.value for variable in state], *arguments)

    def _jvp(self, theta: Any, x: Any, tangent: Any) -> Any:
        try:
            return jax.jvp(lambda t: self._call(t, x), (theta,), (tangent,))[1]
        except TypeError:
            # Functions with a custom reverse mode have no forward mode. But J^T u is
            # linear in u, and the transpose of its derivative is J.
            outputs, transposed = jax.vjp(lambda t: self._call(t, x), theta)
            zeros = jax.numpy.zeros_like(outputs)
            return jax.vjp(lambda u: transposed(u)[0], zeros)[1](tangent)[0]

    def _vjp(self, theta: Any, x: Any, cotangents: Any) -> Any:
        return jax.vjp(lambda t: self._call(t, x), theta)[1](cotangents)[0]

    def _jvps(self, theta: Any, x: Any, tangents: Any) -> Any:
        return jax.vmap(lambda v: self._jvp(theta, x, v))(tangents)

    def _vjps(self, theta: Any, x: Any, cotangents: Any) -> Any:
        return jax.vmap(lambda u: self._vjp(theta, x, u))(cotangents)

    def _rows(self, theta: Any, x: Any) -> Any:
        def of_sample(sample: Any) -> Any:
            batch = sample_as_batch(sample)
            return jax.jacrev(lambda t: self._call(t, batch)[0])(theta)

        return jax.vmap(of_sample)(x)
