"""Gradient descent with a learning rate for each layer, and what the kernel predicts.

Tan, Wu, Zhou and Huang (2023) weight each layer's part of the tangent kernel. Gradient
descent whose learning rates are in proportion to these weights follows the weighted
kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from pipelines.studies import sample
from pipelines.studies.kernels.network import Network, mlp

if TYPE_CHECKING:
    from pipelines.studies.kernels.arc_cosine import Array
    from pipelines.studies.sample import Row


class LayerRates(keras.optimizers.SGD):
    """Gradient descent with a learning rate for each variable.

    Args:
        learning_rate: What all rates are multiplied by.
        factors: What that of each trainable variable is multiplied by, in their order.
    """

    def __init__(self, learning_rate: float, factors: Sequence[float]) -> None:
        super().__init__(learning_rate)
        self.factors = tuple(factors)

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Makes a step. A multiple of the gradient is a multiple of the rate.

        Args:
            grads: The gradients.
            trainable_variables: The variables, as for Keras.
        """
        scaled = [f * grad for f, grad in zip(self.factors, grads, strict=True)]
        super().apply(scaled, trainable_variables)


def descend(
    model: keras.Model,
    x: Array,
    y: Array,
    factors: Sequence[float],
    rate: float,
    steps: int,
) -> None:
    """Trains a model with all samples in each step, on half the squared error's sum.

    Args:
        model: What is trained.
        x: Inputs, shape `(n, d)`.
        y: Targets, shape `(n, 1)`.
        factors: For each trainable variable, its rate over `rate`.
        rate: The common learning rate.
        steps: Number of steps.
    """
    # Keras averages the squares over the samples.
    model.compile(LayerRates(rate * len(x) / 2.0, factors), "mse")
    # One epoch over copies of the data: an epoch for each step takes longer.
    model.fit(
        np.tile(x, (steps, 1)),
        np.tile(y, (steps, 1)),
        batch_size=len(x),
        shuffle=False,
        verbose=0,
    )


def predicted(
    kernel: Array,
    cross: Array,
    start: Array,
    start_elsewhere: Array,
    y: Array,
    rate: float,
    steps: int,
) -> Array:
    """Outputs elsewhere after some steps, if the kernel stayed as it is.

    `f_0(z) - K(z, x) K^{-1} (I - (I - s K)^t) (f_0(x) - y)` with the rate `s` and `t`
    steps; directions in which `K` is zero are not moved.

    Args:
        kernel: `K`, shape `(n, n)`.
        cross: `K(z, x)`, shape `(k, n)`.
        start: The outputs `f_0(x)`, shape `(n, 1)`.
        start_elsewhere: The outputs `f_0(z)`, shape `(k, 1)`.
        y: Targets, shape `(n, 1)`.
        rate: `s`, below `2` over the largest eigenvalue.
        steps: `t`.

    Returns:
        Shape `(k, 1)`.
    """
    values, vectors = np.linalg.eigh(kernel)
    # The sum of (1 - s v)^j over j < t, times s. It has no pole at v = 0.
    tiny = values < 1e-12 * values[-1]
    safe = np.where(tiny, 1.0, values)
    filters = np.where(tiny, rate * steps, (1.0 - (1.0 - rate * safe) ** steps) / safe)
    coefficients = vectors @ (filters[:, None] * (vectors.T @ (start - y)))
    return start_elsewhere - cross @ coefficients


def measure(settings: Mapping[str, Any], cell: Row) -> list[Row]:
    """How far training with layer-wise rates is from what the kernel predicts.

    A network learns whether a digit is odd. Its outputs on digits that it was not
    trained on are compared.

    Args:
        settings: Those of the study.
        cell: With `width` and `seed`.

    Returns:
        One row: the `error` of the weighted kernel's prediction, and that of the
        `unweighted` kernel's for one rate for all layers, both relative to the change
        of the outputs. Each rate is in proportion to `1 / lambda_max` of its kernel.
    """
    n, steps = settings["rate_samples"], settings["rate_steps"]
    pixels, digit = sample.pooled_digits(2 * n, cell["seed"])
    x, z = pixels[:n], pixels[n:]
    y = np.where(digit[:n, None] % 2 == 1, 1.0, -1.0)
    factors = settings["layer_rates"]
    network = mlp(x.shape[1], cell["width"], len(factors) - 1, 1, cell["seed"])
    weighted = Network(
        network.model,
        tuple(f * v for f, v in zip(factors, network.variances, strict=True)),
    )
    start = _outputs(network.model, pixels)
    predictions: dict[str, Array] = {}
    rates: dict[str, float] = {}
    for name, each in (("error", weighted), ("unweighted", network)):
        kernel = each.tangent_kernel(pixels)
        own = kernel[:n, :n]
        # Of the largest eigenvalue 1, so that no prediction is unstable.
        rates[name] = settings["rate"] / float(np.linalg.eigvalsh(own)[-1])
        predictions[name] = predicted(
            own, kernel[n:, :n], start[:n], start[n:], y, rates[name], steps
        )
    descend(network.model, x, y, weighted.variances, rates["error"], steps)
    end = _outputs(network.model, z)
    change = np.linalg.norm(end - start[n:])
    return [
        {
            **cell,
            **{
                name: float(np.linalg.norm(each - end) / change)
                for name, each in predictions.items()
            },
        }
    ]


def _outputs(model: keras.Model, x: Array) -> Array:
    return np.asarray(model.predict(x, verbose=0), dtype="float64")
