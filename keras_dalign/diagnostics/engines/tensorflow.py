"""Jacobian products on TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_dalign.diagnostics.engines.base import Engine, sample_as_batch


class BackendEngine(Engine):
    """Jacobian products by `tf.GradientTape`, in graphs."""

    def __init__(
        self, model: keras.Model, variables: list[keras.Variable], dtype: str
    ) -> None:
        super().__init__(model, variables, dtype)
        self._graphs: dict[Any, Any] = {}

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        leaves = keras.tree.flatten(arguments)
        key = (function.__name__, *((str(x.shape), x.dtype.name) for x in leaves))
        if key not in self._graphs:
            # A concrete function: otherwise TensorFlow takes the functions of several
            # engines for one that is traced too often, and warns.
            self._graphs[key] = tf.function(function).get_concrete_function(*arguments)
        return self._graphs[key](*arguments)

    def _jvp(self, theta: Any, x: Any, tangent: Any) -> Any:
        # J^T u is linear in u, and the transpose of its derivative is J. Forward mode
        # is as fast, takes twice as long to trace, and fails on loops.
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(theta)
                outputs = self._call(theta, x)
            cotangents = tf.zeros_like(outputs)
            outer.watch(cotangents)
            product = inner.gradient(
                outputs, theta, cotangents, unconnected_gradients="zero"
            )
        return outer.gradient(
            product, cotangents, tangent, unconnected_gradients="zero"
        )

    def _vjp(self, theta: Any, x: Any, cotangents: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(theta)
            outputs = self._call(theta, x)
        return tape.gradient(outputs, theta, cotangents, unconnected_gradients="zero")

    def _jvps(self, theta: Any, x: Any, tangents: Any) -> Any:
        return tf.map_fn(lambda v: self._jvp(theta, x, v), tangents)

    def _vjps(self, theta: Any, x: Any, cotangents: Any) -> Any:
        return tf.map_fn(lambda u: self._vjp(theta, x, u), cotangents)

    def _rows(self, theta: Any, x: Any) -> Any:
        def of_sample(sample: Any) -> Any:
            batch = sample_as_batch(sample)
            with tf.GradientTape(persistent=True) as tape:
                tape.watch(theta)
                outputs = self._call(theta, batch)[0]
            return tape.jacobian(outputs, theta, unconnected_gradients="zero")

        return tf.map_fn(of_sample, x, fn_output_signature=theta.dtype)
