"""The logs of an epoch of the solver: the model's loss and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

if TYPE_CHECKING:
    from keras_dalign.head.features import FeatureSet
    from keras_dalign.training.aligned_model import AlignedModel


def solver_logs(
    model: AlignedModel, logits: np.ndarray, features: FeatureSet
) -> dict[str, Any]:
    """The model's loss and metrics for given logits.

    Args:
        model: The compiled model. Its metrics are reset first.
        logits: Logits of all samples, shape `(n, C)`.
        features: The features, for their targets and weights.

    Returns:
        Values by name, floats where they are numbers.
    """
    model.reset_metrics()
    convert = keras.ops.convert_to_tensor
    y, outputs = convert(features.y), convert(logits.astype("float32"))
    weight = features.sample_weight
    weight = None if weight is None else convert(weight)
    loss = model.compute_loss(None, y, outputs, weight)
    found = model.compute_metrics(None, y, outputs, weight)
    return {key: _as_number(value) for key, value in {**found, "loss": loss}.items()}


def _as_number(value: Any) -> Any:
    """A float where the value is a number, as in Keras's logs."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value
