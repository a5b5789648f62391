"""The tangent kernel of recurrent networks, and its limit for infinite width.

Alemohammad, Wang, Balestriero and Baraniuk (ICLR 2021). The network is

    h_t = relu(s_w W h_{t-1} / sqrt(n) + s_u U x_t / sqrt(m) + s_b b),  h_0 = 0,
    f = s_v v . h_T / sqrt(n),

with standard normal `W`, `U`, `b` and `v`, which the derivatives are in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from pipelines.studies import sample
from pipelines.studies.kernels import arc_cosine
from pipelines.studies.kernels.network import Network, of_all_outputs

if TYPE_CHECKING:
    from pipelines.studies.kernels.arc_cosine import Array
    from pipelines.studies.sample import Row

LENGTHS = ("equal", "different")


@dataclass(frozen=True)
class Scales:
    """Standard deviations of the parameters, before the division by the fan-in's root.

    Attributes:
        state: `s_w`, of the recurrent kernel.
        inputs: `s_u`, of the kernel of the inputs.
        bias: `s_b`.
        output: `s_v`.
    """

    state: float = math.sqrt(2.0)
    inputs: float = 1.0
    bias: float = 0.1
    output: float = 1.0


def network(
    inputs: int, width: int, outputs: int, seed: int, scales: Scales | None = None
) -> Network:
    """A recurrent ReLU network for sequences of any length.

    Args:
        inputs: Entries of a step, `m`.
        width: Units, `n`.
        outputs: Number of outputs.
        seed: Seed of the weights.
        scales: Their standard deviations.

    Returns:
        The network.
    """
    scales = scales or Scales()
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    variances = (
        scales.inputs**2 / inputs,
        scales.state**2 / width,
        scales.bias**2,
        scales.output**2 / width,
    )
    kernel, recurrent, bias, output = (
        keras.initializers.RandomNormal(0.0, math.sqrt(variance))
        for variance in variances
    )
    model = keras.Sequential(
        [
            keras.Input((None, inputs)),
            keras.layers.SimpleRNN(
                width,
                activation="relu",
                kernel_initializer=kernel,
                recurrent_initializer=recurrent,
                bias_initializer=bias,
            ),
            keras.layers.Dense(outputs, use_bias=False, kernel_initializer=output),
        ]
    )
    return Network(model, variances)


def relu_moments(covariance: Array, first: Array, second: Array) -> tuple[Array, Array]:
    """`E[relu(a) relu(b)]` and `E[1{a > 0} 1{b > 0}]` of Gaussian `a` and `b`.

    Args:
        covariance: Of `a` and `b`, any shape.
        first: The variance of `a`, of a shape that broadcasts with it.
        second: The variance of `b`.

    Returns:
        Both, in the shape of `covariance`.
    """
    scale = np.sqrt(first * second)
    cosine = covariance / scale
    product = scale * arc_cosine.degree_1(cosine) / 2.0
    return product, arc_cosine.degree_0(cosine) / 2.0


def limit(x: Array, z: Array, scales: Scales | None = None) -> Array:
    """The tangent kernel of infinite width.

    Steps of two sequences are paired counted from the end: derivatives of steps at
    different distances from the output are uncorrelated.

    Args:
        x: Sequences, shape `(n, T, m)`.
        z: Others, shape `(k, T2, m)`.
        scales: Standard deviations of the parameters.

    Returns:
        Shape `(n, k)`.
    """
    scales = scales or Scales()
    state, bias = scales.state**2, scales.bias**2
    inputs = scales.inputs**2 / x.shape[2]
    first, second = (_variances(each, scales) for each in (x, z))
    steps = min(x.shape[1], z.shape[1])
    product = slopes = tangent = np.zeros((len(x), len(z)))
    for back in range(steps, 0, -1):
        covariance = state * product + inputs * (x[:, -back] @ z[:, -back].T) + bias
        tangent = covariance + state * slopes * tangent
        product, slopes = relu_moments(
            covariance, first[:, -back, None], second[None, :, -back]
        )
    return scales.output**2 * (product + slopes * tangent)


def _variances(x: Array, scales: Scales) -> Array:
    """The variance of each step's pre-activations, shape `(n, T)`."""
    drive = scales.inputs**2 * (x**2).mean(axis=2) + scales.bias**2
    variances = np.empty(x.shape[:2])
    previous = np.zeros(len(x))
    for step in range(x.shape[1]):
        variances[:, step] = drive[:, step] + scales.state**2 * previous
        # E[relu(a)^2] is half the variance of a.
        previous = variances[:, step] / 2.0
    return variances


def measure(settings: Mapping[str, Any], cell: Row) -> list[Row]:
    """Distance of a recurrent network's tangent kernel from the limit.

    A sequence has the rows of a pooled digit as its steps.

    Args:
        settings: Those of the study.
        cell: With `width` and `seed`.

    Returns:
        A row for sequences of equal `lengths`, and one for the whole ones against those
        without their first step, with the relative `error`.
    """
    n, outputs = settings["network_samples"], settings["outputs"]
    pixels, _ = sample.pooled_digits(n, cell["seed"])
    side = math.isqrt(pixels.shape[1])
    # Of mean square 1, so that inputs matter beside the biases.
    x = side * pixels.reshape(n, side, side)
    rnn = network(side, cell["width"], outputs, cell["seed"])
    rows = []
    for lengths, z in zip(LENGTHS, (x, x[:, 1:]), strict=True):
        found = rnn.tangent_kernel(x, None if z is x else z)
        expected = of_all_outputs(limit(x, z), outputs)
        error = arc_cosine.distance(found, expected)
        rows.append({**cell, "lengths": lengths, "error": error})
    return rows
