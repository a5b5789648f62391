"""Gradient descent on all samples at once, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.studies.autoencoders.network import Array, Autoencoder

# A loss above so many times the first one has diverged.
_DIVERGED = 1e6


def descend(
    network: Autoencoder, x: Array, rate: float, steps: int, until: float = 0.0
) -> tuple[Autoencoder, list[float]]:
    """Trains by gradient descent.

    Args:
        network: Where to begin; it is left as it is.
        x: Inputs, shape `(n, d)`.
        rate: Learning rate of the loss, half the sum of the squared errors.
        steps: How many.
        until: The loss at which it ends.

    Returns:
        The network, and the losses at the weights before each step and at the end. A
        run whose loss exceeds 1e6 times the first one is broken off.
    """
    losses: list[float] = []
    for _ in range(steps):
        loss, encoder, decoder = network.loss_and_gradients(x)
        losses.append(loss)
        if loss <= until or not loss <= _DIVERGED * losses[0]:
            return network, losses
        network = network.step(
            None if encoder is None else -rate * encoder,
            None if decoder is None else -rate * decoder,
        )
    losses.append(network.loss(x))
    return network, losses
