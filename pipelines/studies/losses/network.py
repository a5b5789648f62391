"""Classifiers of digits, trained with one of four losses and weight decay."""

from __future__ import annotations

import keras
import numpy as np

CROSS_ENTROPY, SQUARED = "cross-entropy", "squared error"
FOCAL, SMOOTHING = "focal", "label smoothing"
LOSSES = (CROSS_ENTROPY, SQUARED, FOCAL, SMOOTHING)

CLASSES = 10
# Squared error has this number times the one-hot labels as targets.
_SCALE = 15.0
_GAMMA = 3.0
_SMOOTHING = 0.05
# When the learning rate falls, as parts of the training, and to which part of it.
_FALLS, _PARTS = (0.6, 0.85), (1.0, 0.1, 0.01)


def classifier(
    width: int, depth: int, *, batch_norm: bool, weight_decay: float, seed: int
) -> keras.Model:
    """A ReLU network with `depth` hidden layers of `width` units and 10 logits.

    Args:
        width: Units of a hidden layer.
        depth: Number of hidden layers.
        batch_norm: Whether each has batch normalisation.
        weight_decay: Half of this times the squared norm of all trainable weights is
            added to the loss.
        seed: Seed of the weights.

    Returns:
        The network.
    """
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    decay = keras.regularizers.L2(weight_decay / 2)
    dense = {"kernel_regularizer": decay, "bias_regularizer": decay}
    layers: list[keras.layers.Layer] = []
    for _ in range(depth):
        layers.append(keras.layers.Dense(width, **dense))
        if batch_norm:
            layers.append(
                keras.layers.BatchNormalization(
                    momentum=0.9, beta_regularizer=decay, gamma_regularizer=decay
                )
            )
        layers.append(keras.layers.ReLU())
    output = keras.layers.Dense(CLASSES, **dense)
    return keras.Sequential([keras.Input((64,)), *layers, output])


def loss(name: str) -> keras.losses.Loss:
    """One of `LOSSES`, of logits and `targets`."""
    if name == SQUARED:
        return keras.losses.MeanSquaredError()
    if name == FOCAL:
        return keras.losses.CategoricalFocalCrossentropy(
            alpha=1.0, gamma=_GAMMA, from_logits=True
        )
    smoothing = _SMOOTHING if name == SMOOTHING else 0.0
    return keras.losses.CategoricalCrossentropy(
        from_logits=True, label_smoothing=smoothing
    )


def targets(name: str, labels: np.ndarray) -> np.ndarray:
    """The targets of a loss, `(n, 10)`, for labels `(n,)`."""
    scale = _SCALE if name == SQUARED else 1.0
    return scale * np.eye(CLASSES, dtype="float32")[labels]


def compile_model(model: keras.Model, name: str, *, rate: float, steps: int) -> None:
    """Compiles a model for training with momentum 0.9.

    Args:
        model: The model.
        name: One of `LOSSES`.
        rate: Learning rate; it falls to a tenth and a hundredth on the way.
        steps: Number of steps of the whole training.
    """
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [round(part * steps) for part in _FALLS], [part * rate for part in _PARTS]
    )
    sgd = keras.optimizers.SGD(schedule, momentum=0.9)
    model.compile(optimizer=sgd, loss=loss(name))


def train(
    model: keras.Model,
    x: np.ndarray,
    y: np.ndarray,
    *,
    epochs: int,
    batch_size: int,
    rng: np.random.Generator,
) -> None:
    """Trains for some epochs, each in another order.

    Args:
        model: A compiled model.
        x: Images `(n, 64)`.
        y: Targets `(n, 10)`.
        epochs: Number of epochs.
        batch_size: Samples of a batch; what does not fill one is left out of the epoch.
        rng: Gives the orders.
    """
    full = len(x) // batch_size * batch_size
    # One call: each costs as much as some dozen steps.
    order = np.concatenate([rng.permutation(len(x))[:full] for _ in range(epochs)])
    model.fit(x[order], y[order], batch_size=batch_size, shuffle=False, verbose=0)
