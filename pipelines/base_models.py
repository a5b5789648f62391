"""Base models: plain Keras models that end in logits.

Another one is a function in `BUILDERS`; its settings stand in params.yaml. The
residual networks of the benchmark (`keras_dalign.models.resnet`) belong here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from pipelines.params import pick


def mlp(
    input_shape: tuple[int, ...], n_classes: int, *, units: Sequence[int]
) -> keras.Model:
    """A multilayer perceptron with ReLU, for inputs `(batch, *input_shape)`.

    Args:
        input_shape: Shape of one input.
        n_classes: Number of logits.
        units: Widths of the hidden layers.

    Returns:
        A model with outputs `(batch, n_classes)`.
    """
    return keras.Sequential(
        [
            keras.Input(input_shape),
            keras.layers.Flatten(),
            *(keras.layers.Dense(width, activation="relu") for width in units),
            keras.layers.Dense(n_classes),
        ],
        name="mlp",
    )


BUILDERS: dict[str, Callable[..., keras.Model]] = {"mlp": mlp}


def build(
    settings: Mapping[str, Any], input_shape: tuple[int, ...], n_classes: int
) -> keras.Model:
    """Builds a base model.

    Args:
        settings: `name` of a builder, and what else it takes.
        input_shape: Shape of one input.
        n_classes: Number of logits.

    Returns:
        A model with outputs `(batch, n_classes)`, not compiled.
    """
    builder = pick("base model", BUILDERS, str(settings.get("name")))
    rest = {key: value for key, value in settings.items() if key != "name"}
    return builder(input_shape, n_classes, **rest)
