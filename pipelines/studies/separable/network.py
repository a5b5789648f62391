"""A small autoencoder of digits, and ways to train it batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import keras
import numpy as np

import keras_dalign as kd
from pipelines.studies import sample
from pipelines.studies.separable.slimtrain import LastLayer

if TYPE_CHECKING:
    from pipelines.studies.sample import Row

# Takes a batch of images `(b, 64)`.
Step = Callable[[np.ndarray], object]


@dataclass(frozen=True)
class Images:
    """Digits of three draws that share no image.

    Attributes:
        train: What is trained on, `(n, 64)`.
        validation: What chooses learning rates and the weight of L2 terms.
        test: What nothing is chosen by.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @classmethod
    def drawn(cls, n: int, validation: int, test: int, seed: int) -> Images:
        """Draws them: for every `n` the same validation and test images."""
        x, _ = sample.digits(validation + test + n, seed=seed)
        return cls(
            x[validation + test :], x[:validation], x[validation : validation + test]
        )

    def losses(self, model: keras.Model) -> Row:
        """The mean squared error of a model's reconstructions, per pixel."""
        return {
            name: float(np.mean(np.square(model.predict_on_batch(x) - x)))
            for name, x in vars(self).items()
        }


def autoencoder(hidden: int, code: int, seed: int) -> keras.Model:
    """64 pixels, `hidden` tanh units, a linear code, `hidden` tanh units, 64 pixels."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(hidden, activation="tanh"),
            layers.Dense(code),
            layers.Dense(hidden, activation="tanh"),
            layers.Dense(64),
        ]
    )


def adam(model: keras.Model, rate: float) -> Step:
    """The step that trains all weights by Adam.

    Args:
        model: The autoencoder.
        rate: Learning rate.

    Returns:
        The step.
    """
    model.compile(keras.optimizers.Adam(rate), loss="mse")
    return lambda x: model.train_on_batch(x, x)


def slimtrain(
    model: keras.Model, rate: float, *, strength: float, chosen: bool, memory: int
) -> Step:
    """The step that trains the last layer in closed form, and all others by Adam.

    Args:
        model: The autoencoder.
        rate: Learning rate of Adam.
        strength: `Lambda_0`.
        chosen: Whether sampled generalised cross-validation changes it.
        memory: Number of earlier batches whose features count.

    Returns:
        The step.
    """
    *_, output = model.layers
    features = keras.Model(model.inputs[0], output.input)
    layer = LastLayer(
        np.r_[output.get_weights()[0], output.get_weights()[1][None]],
        strength=strength,
        chosen=chosen,
        memory=memory,
    )
    output.trainable = False
    model.compile(keras.optimizers.Adam(rate), loss="mse")

    def step(x: np.ndarray) -> None:
        layer.step(features.predict_on_batch(x), x)
        output.set_weights([layer.weights[:-1], layer.weights[-1]])
        model.train_on_batch(x, x)

    return step


def epochs(
    step: Step, x: np.ndarray, *, count: int, batch_size: int, seed: int
) -> Iterator[int]:
    """Trains, and pauses after each epoch.

    Args:
        step: Takes a batch.
        x: Images; what does not fill a batch is left out of the epoch.
        count: Number of epochs.
        batch_size: Samples of a batch.
        seed: Seed of the order, which is the same for every step.

    Yields:
        The number of epochs so far.
    """
    rng = np.random.default_rng(seed)
    for epoch in range(1, count + 1):
        order = rng.permutation(len(x))[: len(x) // batch_size * batch_size]
        for batch in order.reshape(-1, batch_size):
            step(x[batch])
        yield epoch


def moments(count: int, also: Iterable[int]) -> set[int]:
    """The epochs that are measured: ever fewer, and the requested ones."""
    return {1, *(round(each) for each in np.geomspace(1, count, 10)), *also}


def two_phases(model: keras.Model, images: Images, seed: int) -> Row:
    """The losses of a trained autoencoder with its head at the minimum.

    Args:
        model: The autoencoder; stays as it is.
        images: The validation images choose L2 weight and width.
        seed: Seed of the head's gates.

    Returns:
        The losses.
    """
    aligned = kd.align(model, n_samples=len(images.train), seed=seed, copy=True)
    kd.solve(
        aligned,
        images.train,
        images.train,
        loss="mse",
        validation_data=(images.validation, images.validation),
        verbose=0,
    )
    return images.losses(aligned)
