"""The temperature that makes the probabilities of a classifier fit held-out samples."""

from __future__ import annotations

import math

import keras
import numpy as np
from scipy.optimize import minimize_scalar

from pipelines.calibration import nll

# Far outside of what is ever found.
_LEAST, _LARGEST = 1e-2, 1e2


def fit(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature of the least negative log likelihood, in float64.

    Args:
        logits: Logits of samples that the model has not seen, shape `(n, classes)`.
        labels: Their int labels, shape `(n,)`.

    Returns:
        What logits are to be divided by, from 0.01 to 100; 1 if all samples are
        classified right. Then the likelihood grows as the temperature falls to 0, and
        says nothing of other samples.
    """
    logits = logits.astype("float64")
    if (logits.argmax(axis=1) == labels).all():
        return 1.0
    # The loss is convex in the inverse temperature, so it has one minimum here, too.
    found = minimize_scalar(
        lambda log: nll(logits / math.exp(log), labels),
        bounds=(math.log(_LEAST), math.log(_LARGEST)),
        method="bounded",
        options={"xatol": 1e-8},
    )
    return math.exp(found.x)


def scaled(model: keras.Model, temperature: float) -> keras.Model:
    """The model with its logits divided by a temperature.

    Args:
        model: A model that ends in logits.
        temperature: Positive.

    Returns:
        A model of the same inputs.
    """
    inputs = keras.Input(model.inputs[0].shape[1:])
    layer = keras.layers.Rescaling(1.0 / temperature, name="temperature")
    return keras.Model(inputs, layer(model(inputs)))
