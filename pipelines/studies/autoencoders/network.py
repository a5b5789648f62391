"""Autoencoders of two layers without biases: as arrays, and as Keras models."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

Array = npt.NDArray[np.float64]

# What is trained. Tied: the decoder is the encoder's transpose.
TRAINED = ("encoder", "decoder", "joint", "tied")


@dataclasses.dataclass(frozen=True, eq=False)
class Autoencoder:
    """`u(x) = c A relu(W^T x)`, and which of its weights are trained.

    Attributes:
        trained: `"encoder"` (`W`), `"decoder"` (`A`), `"joint"` (both) or `"tied"`
            (`A = W`, one matrix).
        encoder: `W`, shape `(d, m)`.
        decoder: `A`, shape `(d, m)`.
        scale: `c`.
    """

    trained: str
    encoder: Array
    decoder: Array
    scale: float

    def __post_init__(self) -> None:
        """Checks the shapes.

        Raises:
            ValueError: If what is trained has another name, or encoder and decoder do
                not fit.
        """
        if self.trained not in TRAINED:
            raise ValueError(
                f"`trained` must be one of {TRAINED}. Received: {self.trained!r}"
            )
        if self.encoder.shape != self.decoder.shape:
            raise ValueError(
                "Encoder and decoder of an autoencoder must both have the shape "
                "(inputs, width); tied ones are one matrix. Received: encoder of shape "
                f"{self.encoder.shape}, decoder of shape {self.decoder.shape}"
            )
        if self.trained == "tied" and not np.array_equal(self.encoder, self.decoder):
            raise ValueError(
                "With tied weights the decoder must equal the encoder. Received: two "
                f"matrices of shape {self.encoder.shape} with different entries"
            )

    @property
    def width(self) -> int:
        """Number of hidden units, `m`."""
        return int(self.encoder.shape[1])

    def hidden(self, x: Array) -> Array:
        """Hidden units before the ReLU, `W^T x`, for inputs `(n, d)`: `(n, m)`."""
        return x @ self.encoder

    def outputs(self, x: Array) -> Array:
        """`u(x)` for inputs `(n, d)`; shape `(n, d)`."""
        return self.scale * np.maximum(self.hidden(x), 0.0) @ self.decoder.T

    def loss(self, x: Array) -> float:
        """Half the sum of the squared errors."""
        return 0.5 * float(np.sum((self.outputs(x) - x) ** 2))

    def loss_and_gradients(self, x: Array) -> tuple[float, Array | None, Array | None]:
        """The loss and its gradients.

        Args:
            x: Inputs, shape `(n, d)`.

        Returns:
            The loss, and its gradients in encoder and decoder, `(d, m)` each: None for
            one that is not trained, and equal for tied ones.
        """
        hidden = self.hidden(x)
        active = hidden > 0
        hidden *= active
        error = self.scale * (hidden @ self.decoder.T) - x
        loss = 0.5 * float(np.vdot(error, error))
        encoder = decoder = None
        if self.trained != "encoder":
            decoder = self.scale * (error.T @ hidden)
        if self.trained != "decoder":
            back = error @ self.decoder
            back *= active
            encoder = self.scale * (x.T @ back)
        if self.trained == "tied" and encoder is not None and decoder is not None:
            encoder = decoder = encoder + decoder
        return loss, encoder, decoder

    def step(self, encoder: Array | None, decoder: Array | None) -> Autoencoder:
        """The network with something added to its weights; None adds nothing."""
        moved = self.encoder if encoder is None else self.encoder + encoder
        if self.trained == "tied":
            return dataclasses.replace(self, encoder=moved, decoder=moved)
        other = self.decoder if decoder is None else self.decoder + decoder
        return dataclasses.replace(self, encoder=moved, decoder=other)


def initial(
    trained: str, inputs: int, width: int, seed: int, scale: float | None = None
) -> Autoencoder:
    """An initial autoencoder: `W ~ N(0, 1)`, `A = +-1` at random, or `A = W`.

    Args:
        trained: What will be trained.
        inputs: `d`.
        width: `m`.
        seed: Seed of the weights. All that is trained but `"tied"` starts alike.
        scale: `c`; `1 / sqrt(m d)` by default.

    Returns:
        The network.
    """
    rng = np.random.default_rng(seed)
    encoder = rng.standard_normal((inputs, width))
    decoder = rng.choice([-1.0, 1.0], size=(inputs, width))
    if scale is None:
        scale = 1.0 / math.sqrt(width * inputs)
    return Autoencoder(
        trained, encoder, encoder if trained == "tied" else decoder, scale
    )


def keras_model(network: Autoencoder) -> keras.Model:
    """The same as a Keras model, whose trainable variables are what is trained."""
    inputs, width = network.encoder.shape
    keras.utils.clear_session()
    first = keras.Input((inputs,))
    if network.trained == "tied":
        tied = TiedLayer(width, network.scale, name="tied")
        model = keras.Model(first, tied(first))
        tied.kernel.assign(network.encoder)
        return model
    encoder = keras.layers.Dense(width, "relu", use_bias=False, name="encoder")
    decoder = keras.layers.Dense(inputs, use_bias=False, name="decoder")
    hidden = keras.layers.Rescaling(network.scale)(encoder(first))
    model = keras.Model(first, decoder(hidden))
    encoder.kernel.assign(network.encoder)
    decoder.kernel.assign(network.decoder.T)
    encoder.trainable = network.trained != "decoder"
    decoder.trainable = network.trained != "encoder"
    return model


@keras.saving.register_keras_serializable("autoencoders")
class TiedLayer(keras.layers.Layer):
    """`c W relu(W^T x)`: the decoder is the encoder's transpose.

    Args:
        width: Number of hidden units, at least 1.
        scale: `c`.
        **arguments: See `keras.layers.Layer`.
    """

    def __init__(self, width: int, scale: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.width, self.scale = width, scale

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Makes the kernel, `(d, m)`."""
        self.kernel = self.add_weight(
            shape=(input_shape[-1], self.width), name="kernel"
        )

    def call(self, inputs: Any) -> Any:
        """The reconstruction of inputs `(n, d)`."""
        hidden = ops.relu(ops.matmul(inputs, self.kernel))
        return self.scale * ops.matmul(hidden, ops.transpose(self.kernel))

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {**super().get_config(), "width": self.width, "scale": self.scale}
