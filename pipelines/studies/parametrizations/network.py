"""tanh networks of any depth and width, under a parametrisation."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np

import keras_dalign as kd

OUTPUTS = 10

# So small that it plays no part: Keras's 1e-7 is not, where gradients are.
_EPSILON = 1e-12


def plain(
    width: int, factors: Sequence[float], *, use_bias: bool, inputs: int = 16
) -> keras.Model:
    """A tanh network as Keras initialises it, with kernels of variance 1 / fan-in.

    Args:
        width: The width.
        factors: Units of each hidden layer, as a multiple of the width.
        use_bias: Whether layers have a bias.
        inputs: Number of inputs.

    Returns:
        The network; the layers `hidden1`, `hidden2`, ... put out what is behind tanh.
    """
    options = {
        "use_bias": use_bias,
        "kernel_initializer": keras.initializers.VarianceScaling(
            distribution="untruncated_normal"
        ),
    }
    layers = [keras.Input((inputs,))]
    for number, factor in enumerate(factors, start=1):
        units = max(1, round(factor * width))
        layers.append(keras.layers.Dense(units, **options))
        layers.append(keras.layers.Activation("tanh", name=f"hidden{number}"))
    return keras.Sequential([*layers, keras.layers.Dense(OUTPUTS, **options)])


def parametrized(
    kind: str,
    optimizer: str,
    width: int,
    base: int,
    factors: Sequence[float],
    *,
    use_bias: bool,
    seed: int,
) -> keras.Model:
    """A network of some width under a parametrisation.

    Args:
        kind: As for `keras_dalign.parametrize`.
        optimizer: As for `keras_dalign.parametrize`.
        width: The width.
        base: The width of the base, whose hidden layers all have as many units.
        factors: As for `plain`.
        use_bias: As for `plain`.
        seed: Seed of the initial weights.

    Returns:
        The network.
    """
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    model = plain(width, factors, use_bias=use_bias)
    even = plain(base, [1.0] * len(factors), use_bias=use_bias)
    return kd.parametrize(model, even, kind, optimizer)


def train(
    model: keras.Model,
    x: np.ndarray,
    y: np.ndarray,
    *,
    optimizer: str,
    learning_rate: float,
    steps: int,
) -> None:
    """Takes steps with all samples, on half the squared error of a sample.

    Args:
        model: The model.
        x: Inputs, shape `(n, d)`.
        y: Targets, shape `(n, C)`.
        optimizer: `"sgd"` or `"adam"`.
        learning_rate: Its learning rate.
        steps: Their number.
    """
    if optimizer == "sgd":
        # Keras's error is the mean over the outputs, too, and not halved.
        compiled = keras.optimizers.SGD(learning_rate * y.shape[1] / 2)
    else:
        compiled = keras.optimizers.Adam(learning_rate, epsilon=_EPSILON)
    model.compile(optimizer=compiled, loss="mse")
    # An epoch of many batches, all the same, costs much less than as many epochs.
    model.fit(
        np.tile(x, (steps, 1)),
        np.tile(y, (steps, 1)),
        batch_size=len(x),
        shuffle=False,
        verbose=0,
    )


def features(model: keras.Model, x: np.ndarray) -> list[np.ndarray]:
    """The outputs of each hidden layer.

    Args:
        model: A network of this module.
        x: Inputs, shape `(n, d)`.

    Returns:
        For each layer an array `(n, units)`, float64.
    """
    hidden = [layer.output for layer in model.layers if "hidden" in layer.name]
    outputs = keras.tree.flatten(keras.Model(model.input, hidden)(x))
    return [keras.ops.convert_to_numpy(z).astype("float64") for z in outputs]


def smallest_eigenvalue(z: np.ndarray) -> float:
    """The smallest eigenvalue of the Gram matrix `z z^T / units` of features.

    Args:
        z: Features, shape `(n, units)`, float64.

    Returns:
        The square of the smallest of the `n` singular values over the units: exact
        where an eigenvalue of the product would be lost to rounding. 0 if there are
        fewer units than samples.
    """
    n, units = z.shape
    if units < n:
        return 0.0
    return float(np.linalg.svd(z, compute_uv=False)[-1] ** 2 / units)
