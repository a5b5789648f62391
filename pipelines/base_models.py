"""Base models: plain Keras models that end in logits.

Another one is a function in `BUILDERS`; its settings are in params.yaml.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

import keras_dalign as kd
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


def convnet(
    input_shape: tuple[int, ...], n_classes: int, *, filters: Sequence[int]
) -> keras.Model:
    """A small convolutional network with batch normalisation.

    Each convolution but the first halves the height and width of its inputs.

    Args:
        input_shape: Shape of one image.
        n_classes: Number of logits.
        filters: Numbers of filters of the 3 x 3 convolutions.

    Returns:
        A model with outputs `(batch, n_classes)`.
    """
    layers = keras.layers
    blocks = [
        (
            layers.Conv2D(
                count, 3, strides=2 if i else 1, padding="same", use_bias=False
            ),
            # Keras's 0.99 is for runs of thousands of steps.
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
        )
        for i, count in enumerate(filters)
    ]
    return keras.Sequential(
        [
            keras.Input(input_shape),
            *(layer for block in blocks for layer in block),
            layers.Flatten(),
            layers.Dense(n_classes),
        ],
        name="convnet",
    )


def resnet(
    input_shape: tuple[int, ...], n_classes: int, *, depth: int, **settings: Any
) -> keras.Model:
    """A residual network for small images, `keras_dalign.models.resnet`.

    Args:
        input_shape: Shape of one image.
        n_classes: Number of logits.
        depth: 18, or `6 n + 2`.
        **settings: What else it takes.

    Returns:
        A model with outputs `(batch, n_classes)`.
    """
    return kd.models.resnet(depth, input_shape, n_classes, **settings)


BUILDERS: dict[str, Callable[..., keras.Model]] = {
    "mlp": mlp,
    "convnet": convnet,
    "resnet": resnet,
}


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
