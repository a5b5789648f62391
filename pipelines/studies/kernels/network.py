"""ReLU networks whose tangent kernels have a known limit, and how far they are off."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

import keras_dalign as kd
from pipelines.studies import sample
from pipelines.studies.kernels import arc_cosine

if TYPE_CHECKING:
    from pipelines.studies.kernels.arc_cosine import Array
    from pipelines.studies.sample import Row

INITIALIZERS = ("gaussian", "orthogonal")


@dataclass(frozen=True)
class Network:
    """A model, and the variances that its weights are drawn with.

    As weights of `tangent_kernel` these variances give the kernel of the NTK
    parametrisation, in which a weight is its standard deviation times a parameter of
    variance 1.

    Attributes:
        model: A Keras model.
        variances: One for each of its trainable variables, in their order.
    """

    model: keras.Model
    variances: tuple[float, ...]

    def tangent_kernel(self, x: Array, z: Array | None = None) -> Array:
        """The tangent kernel of the NTK parametrisation.

        Args:
            x: Inputs, `n` samples.
            z: Others, `k` samples. Default: `x`.

        Returns:
            Shape `(n * C, k * C)` for `C` outputs.
        """
        return kd.tangent_kernel(self.model, x, z, weights=self.variances)


def mlp(
    inputs: int,
    width: int,
    depth: int,
    outputs: int,
    seed: int,
    initializer: str = "gaussian",
) -> Network:
    """A ReLU network without biases.

    Args:
        inputs: Number of inputs.
        width: Units of a hidden layer.
        depth: Number of hidden layers.
        outputs: Number of outputs.
        seed: Seed of the weights.
        initializer: `"gaussian"`, or `"orthogonal"`: orthonormal rows or columns times
            a factor, of the same variance, `2 / fan-in` and at the output
            `1 / fan-in`.

    Returns:
        The network.
    """
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    sizes = [inputs, *[width] * depth, outputs]
    layers: list[keras.layers.Layer] = []
    variances: list[float] = []
    for layer, (fan_in, units) in enumerate(itertools.pairwise(sizes)):
        hidden = layer < depth
        variance = (2.0 if hidden else 1.0) / fan_in
        if initializer == "orthogonal":
            # Entries of an orthonormal factor have the variance 1 / max(shape).
            gain = math.sqrt(variance * max(fan_in, units))
            kernel = keras.initializers.Orthogonal(gain)
        else:
            kernel = keras.initializers.RandomNormal(0.0, math.sqrt(variance))
        layers.append(
            keras.layers.Dense(
                units,
                "relu" if hidden else None,
                use_bias=False,
                kernel_initializer=kernel,
            )
        )
        variances.append(variance)
    model = keras.Sequential([keras.Input((inputs,)), *layers])
    return Network(model, tuple(variances))


def of_all_outputs(kernel: Array, outputs: int) -> Array:
    """The limit for several outputs: they share no parameter's derivative."""
    return np.kron(kernel, np.eye(outputs)).astype(np.float64)


def measure(settings: Mapping[str, Any], cell: Row) -> list[Row]:
    """Distance of a network's tangent kernel from the limit.

    Args:
        settings: Those of the study.
        cell: With `initializer`, `width` and `seed`.

    Returns:
        One row, with the relative `error`.
    """
    x, _ = sample.pooled_digits(settings["network_samples"], cell["seed"])
    depth, outputs = settings["network_depth"], settings["outputs"]
    network = mlp(
        x.shape[1], cell["width"], depth, outputs, cell["seed"], cell["initializer"]
    )
    limit = arc_cosine.tangent_kernel(x, x, depth) / x.shape[1]
    expected = of_all_outputs(limit, outputs)
    error = arc_cosine.distance(network.tangent_kernel(x), expected)
    return [{**cell, "error": error}]
