"""Networks with normalised layers, and their errors while they are trained."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from pipelines.studies.mixture_norm.layer import MixtureNormalization

KINDS = ("convolution", "dense")


def network(kind: str, components: int, seed: int) -> keras.Model:
    """A network for 8 x 8 images of 10 classes, with a normalisation in each layer.

    Args:
        kind: `"convolution"`: three of 16, 32 and 32 channels, the first followed by
            pooling, and a mean over the places; or `"dense"`: three layers of 64 units.
        components: Of each `MixtureNormalization`.
        seed: Seed of the weights.

    Returns:
        The model; it takes images `(batch, 8, 8, 1)` and gives logits.
    """
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    layers: list[Any] = []
    if kind == "convolution":
        for channels in (16, 32, 32):
            layers += [
                keras.layers.Conv2D(channels, 3, padding="same", use_bias=False),
                MixtureNormalization(components),
                keras.layers.ReLU(),
            ]
        layers.insert(3, keras.layers.MaxPooling2D())
        layers.append(keras.layers.GlobalAveragePooling2D())
    else:
        layers.append(keras.layers.Flatten())
        for _ in range(3):
            layers += [
                keras.layers.Dense(64, use_bias=False),
                MixtureNormalization(components),
                keras.layers.ReLU(),
            ]
    return keras.Sequential([keras.Input((8, 8, 1)), *layers, keras.layers.Dense(10)])


def adapt(model: keras.Model, x: npt.NDArray[np.float32], seed: int) -> None:
    """Fits the mixtures to the inputs of their layers, one layer after the other.

    Args:
        model: A model of `network`.
        x: Images.
        seed: Seed of the clusterings.
    """
    outputs = x
    for layer in model.layers:
        if isinstance(layer, MixtureNormalization):
            layer.adapt(keras.ops.convert_to_numpy(outputs), seed)
        outputs = layer(outputs)


class Errors(keras.callbacks.Callback):
    """Measures the shares of wrong digits after every so many updates.

    Args:
        draws: By name, images and labels.
        every: Updates from one measurement to the next.

    Attributes:
        rows: For each measurement, `updates` and the share of each draw.
    """

    def __init__(
        self,
        draws: dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]],
        every: int,
    ) -> None:
        super().__init__()
        self.draws = draws
        self.every = every
        self.updates = 0
        self.rows: list[dict[str, Any]] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        """An update was made."""
        self.updates += 1
        if self.updates % self.every:
            return
        wrong = {
            name: float((self.model.predict_on_batch(x).argmax(axis=1) != y).mean())
            for name, (x, y) in self.draws.items()
        }
        self.rows.append({"updates": self.updates, **wrong})
