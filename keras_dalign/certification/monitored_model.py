"""The features and logits of a model under training, on fixed samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_dalign.head import data
from keras_dalign.head.alignment_head import EXPLOITING, AlignmentHead
from keras_dalign.training.aligned_model import AlignedModel
from keras_dalign.training.output_layer import output_layer

if TYPE_CHECKING:
    from keras_dalign.numerics import Array

_BATCH_SIZE = 256

# The most that two passes over the same samples may differ, relative to the largest
# feature.
_PASS_TOLERANCE = 1e-3


class MonitoredModel:
    """Features and logits of a model on fixed samples; leaves the model unchanged.

    Args:
        model: An `AlignedModel`, or any other model with an output layer.
        x: The samples' inputs, arrays.

    Raises:
        ValueError: If the model has no output layer that is linear in its weights.
    """

    def __init__(self, model: keras.Model, x: Any) -> None:
        self._model = model
        self.head: AlignmentHead | None = None
        if isinstance(model, AlignedModel):
            self.head = model.head
            self.dense = model.head.dense
            trunk, self.units = model.trunk, model.head.units
        else:
            trunk, self.dense = output_layer(model)
            self.units = self.dense.units
        self._trunk = self._inference(trunk)
        self._x = x
        self._features: Any = None
        self._phase: str | None = None
        self.follow_phase()

    def _inference(self, layer: keras.layers.Layer) -> InferenceModel:
        strategy = getattr(self._model, "distribute_strategy", None)
        if strategy is None:
            return InferenceModel(layer)
        with strategy.scope():
            return InferenceModel(layer)

    @property
    def exploiting(self) -> bool:
        """Whether the trunk is frozen."""
        return self.head is not None and self.head.phase == EXPLOITING

    def follow_phase(self) -> bool:
        """Compiles the output layer for the model's phase; True if it has changed."""
        phase = "plain" if self.head is None else self.head.phase
        changed = phase != self._phase
        if changed:
            output = self.dense if self.head is None else self.head
            self._output = self._inference(output)
            self._phase = phase
        return changed

    def features(self) -> Any:
        """The inputs of the output layer, an array `(n, p)` or a pair of them."""
        self._features = self._trunk.outputs(self._x)
        return self._features

    def checked_features(self) -> Any:
        """`features`, computed twice.

        Returns:
            The features.

        Raises:
            ValueError: If the two passes do not agree.
        """
        first, second = (keras.tree.flatten(self.features()) for _ in range(2))
        for before, after in zip(first, second, strict=True):
            scale = np.max(np.abs(before), initial=0.0)
            if not np.isfinite(scale):
                continue
            change = np.abs(after - before).max()
            if change > _PASS_TOLERANCE * scale:
                raise ValueError(
                    "The model's features must be a function of the inputs. Received: "
                    f"model '{self._model.name}', which gave other features for the "
                    "same inputs in inference mode, different by up to "
                    f"{change:.3g}. Make its layers deterministic for training=False."
                )
        return self._features

    def logits(self) -> Array:
        """The logits `(n, C)` of the features that were computed last."""
        return self._output.outputs(self._features).astype(np.float64)


class InferenceModel(keras.Model):
    """A layer in inference mode, compiled separately from its model."""

    def __init__(self, layer: keras.layers.Layer) -> None:
        # An automatic name would raise Keras's counter, which names other models.
        super().__init__(dtype=layer.dtype_policy, name="alignment_monitor")
        self.layer = layer
        self.built = True

    def build(self, input_shape: Any = None) -> None:
        """Does nothing: the layer is built already."""

    def call(self, inputs: Any) -> Any:
        """The layer's outputs."""
        return self.layer(inputs)

    def outputs(self, x: Any) -> Any:
        """The outputs for all samples, in float32 or float64, as `(n, ...)` arrays."""
        n = data.n_samples(x)
        size = data.even_batch_size(n, _BATCH_SIZE)
        parts = []
        for start in range(0, n, size):
            rows = np.minimum(np.arange(start, start + size), n - 1)
            batch = keras.tree.map_structure(lambda leaf, rows=rows: leaf[rows], x)
            count = min(size, n - start)
            # Under a distribution strategy each replica predicts the whole batch.
            part = keras.tree.map_structure(
                lambda leaf, count=count: _as_float(leaf[:count]),
                self.predict_on_batch(batch),
            )
            parts.append(part)
        return keras.tree.map_structure(lambda *leaves: np.concatenate(leaves), *parts)


def _as_float(values: Any) -> np.ndarray:
    array = np.asarray(values)
    return array if array.dtype == np.float64 else array.astype(np.float32)
