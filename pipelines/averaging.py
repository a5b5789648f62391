"""The running average of the weights during the training of a base model."""

from __future__ import annotations

import time
from typing import Any

import keras
import numpy as np

from keras_dalign.training.weight_average import WeightAverage

# The default of `DAlign`.
SHARE = 0.1


class RunningAverage(keras.callbacks.Callback):
    """Keeps the average that `DAlign` keeps, without changing the training.

    Its variables are among those of the optimizer, so that they are backed up and
    restored together.

    Args:
        model: The compiled model that will be trained.
    """

    def __init__(self, model: keras.Model) -> None:
        super().__init__()
        optimizer, variables = model.optimizer, model.trainable_variables
        if not optimizer.built:
            optimizer.build(variables)
        steps = optimizer.add_variable(
            (), initializer="zeros", dtype="int", name="averaged_steps"
        )
        self._average = WeightAverage(
            variables, SHARE, optimizer.add_variable_from_reference, steps
        )
        self._update = _compiled(self._step)
        self._seconds = 0.0

    def take_seconds(self) -> float:
        """The seconds spent averaging since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def weights(self) -> list[np.ndarray]:
        """The averages, in the order of the model's `trainable_variables`."""
        return [keras.ops.convert_to_numpy(v) for v in self._average.averages]

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Keras's hook."""
        begin = time.perf_counter()
        # JAX's trainer keeps the weights outside the model; this writes them back.
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        self._update()
        self._seconds += time.perf_counter() - begin

    def _step(self) -> None:
        stop = keras.ops.stop_gradient
        self._average.update([stop(v.value) for v in self._average.averaged])


def _compiled(function: Any) -> Any:
    """The function, compiled on TensorFlow, where this takes a tenth of the time."""
    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf  # noqa: PLC0415

    # Traced here, so that no epoch's time includes it.
    return tf.function(function).get_concrete_function()
