"""Trunks that the variants start from, trained once for each cell and seed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from benchmarks.levers.variants import ENDED, EXPLORE, PART, WHOLE, Variant
from keras_dalign.training.weight_average import WeightAverage
from pipelines import files
from pipelines.held_out import held_out
from pipelines.optimizers import optimizer
from pipelines.stream import FollowEpoch

if TYPE_CHECKING:
    from pipelines.exploration import Job
    from pipelines.params import Recipe

# The share of the samples left out of `PART`.
LEFT_OUT = 0.1
# The shares of the epochs after which the weights of `WHOLE` are kept.
EXPLORED = (0.6, 0.7, 0.8, 1.0)
# The shares of the steps that weights are averaged over.
AVERAGES = (0.05, 0.1, 0.2)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Trunks:
    """The trunks of a cell and seed, each trained when it is first needed.

    Args:
        job: What to train on, and how.
        folder: Where they are kept.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self.job = job
        self.folder = folder

    def model(self, variant: Variant) -> keras.Model:
        """The base model that a variant starts from.

        Args:
            variant: The variant.

        Returns:
            The model, with the weights of the trunk and not compiled.
        """
        self._train(variant.trunk)
        path = self._weights(variant.trunk, self.epoch(variant), variant.average)
        model = self.job.base()
        names = [f"{index:04d}" for index in range(len(model.weights))]
        model.set_weights(list(files.read_arrays(path, *names)))
        return model

    def seconds(self, variant: Variant) -> float:
        """Wall time of the exploration of a variant, without the weight averages.

        A step takes as long on every trunk, so steps are timed on `WHOLE`.

        Args:
            variant: The variant.

        Returns:
            The seconds.
        """
        self._train(WHOLE)
        kept = files.read_json(self._record(WHOLE), "seconds")["seconds"]
        steps = part_of(self.job).steps if variant.trunk == PART else self.job.steps
        return float(sum(kept[: self.epoch(variant)]) * steps / self.job.steps)

    def epoch(self, variant: Variant) -> int:
        """The epoch after which a variant takes its trunk."""
        return max(1, round(variant.explore * self.job.train.epochs))

    def _train(self, trunk: str) -> None:
        if self._record(trunk).exists():
            return
        job, recipe, epochs = self.job, self.job.recipe, self.job.train.epochs
        explored = max(1, round(EXPLORE * epochs))
        if trunk == PART:
            job = part_of(job)
        if trunk == ENDED:
            how = ended(recipe, job.steps, explored)
        else:
            how = optimizer(recipe, job.steps, epochs)
        shares = EXPLORED if trunk == WHOLE else (EXPLORE,)
        kept = {max(1, round(share * epochs)) for share in shares}

        def keep(epoch: int, average: float, weights: list[np.ndarray]) -> None:
            arrays = {f"{index:04d}": array for index, array in enumerate(weights)}
            files.write_arrays(self._weights(trunk, epoch, average), arrays)

        self.folder.mkdir(parents=True, exist_ok=True)
        model, stream, averages = job.base(), job.stream(), Averages(keep, kept)
        model.compile(how, LOSS)
        callbacks = [FollowEpoch(stream), averages]
        model.fit(
            stream, epochs=max(kept), shuffle=False, verbose=0, callbacks=callbacks
        )
        files.write_json(self._record(trunk), {"seconds": averages.seconds})

    def _record(self, trunk: str) -> Path:
        """A file that is written last and marks the trunk as complete."""
        return self.folder / f"{trunk}.json"

    def _weights(self, trunk: str, epoch: int, average: float) -> Path:
        return self.folder / f"{trunk}-{epoch:03d}-{average}.npz"


class Averages(keras.callbacks.Callback):
    """Stores the last weights and their running averages after some epochs.

    Args:
        keep: Called with the epoch, from 1, the share of the steps that weights are
            averaged over, and the weights. Share 0 stands for the last weights.
        epochs: The epochs after which weights are stored.

    Attributes:
        seconds: Wall time by epoch, without the time of this callback.
    """

    def __init__(
        self, keep: Callable[[int, float, list[np.ndarray]], None], epochs: set[int]
    ) -> None:
        super().__init__()
        self._keep, self._epochs = keep, epochs
        self.seconds: list[float] = []
        self._begin = 0.0
        self._averages: list[WeightAverage] = []

    def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002
        """Keras's hook."""
        variables = self.model.trainable_variables
        self._averages = [
            WeightAverage(
                variables,
                share,
                _zeros,
                keras.Variable(0, trainable=False, dtype="int32"),
            )
            for share in AVERAGES
        ]

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Keras's hook."""
        self._begin = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Keras's hook."""
        begin = time.perf_counter()
        # On JAX the variables hold the trainer's state only after a sync.
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        for average in self._averages:
            average.update()
        self._begin += time.perf_counter() - begin

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Keras's hook."""
        self.seconds.append(time.perf_counter() - self._begin)
        if epoch + 1 not in self._epochs:
            return
        self._keep(epoch + 1, 0.0, self.model.get_weights())
        for average in self._averages:
            pairs = zip(average.averaged, average.averages, strict=True)
            averages = {id(variable): value for variable, value in pairs}
            weights = [averages.get(id(each), each) for each in self.model.weights]
            values = [np.array(ops.convert_to_numpy(each)) for each in weights]
            self._keep(epoch + 1, average.share, values)


def _zeros(variable: keras.Variable, name: str) -> keras.Variable:
    return keras.Variable(
        np.zeros(variable.shape), dtype=variable.dtype, trainable=False, name=name
    )


def ended(recipe: Recipe, steps: int, epochs: int) -> keras.optimizers.Optimizer:
    """The optimizer of a recipe whose learning rate is zero at the end of exploration.

    Args:
        recipe: The recipe. A constant rate falls over the last third.
        steps: Steps of an epoch.
        epochs: Epochs of exploration.

    Returns:
        A new optimizer.
    """
    how = optimizer(recipe, steps, epochs)
    if recipe.schedule == "constant":
        how.learning_rate = FallingEnd(recipe.learning_rate, steps * epochs)
    return how


class FallingEnd(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that falls to zero over the last third of the steps.

    Args:
        rate: The first learning rate.
        steps: Steps until zero.
    """

    def __init__(self, rate: float, steps: int) -> None:
        super().__init__()
        self.rate, self.steps = rate, steps

    def __call__(self, step: Any) -> Any:
        """The learning rate at a step."""
        left = 1.0 - ops.cast(step, "float32") / self.steps
        return self.rate * ops.clip(3.0 * left, 0.0, 1.0)


def part_of(job: Job) -> Job:
    """The job on nine tenths of the samples; the other tenth are its test samples."""
    data = held_out(job.data, LEFT_OUT, job.run.seed)
    return dataclasses.replace(job, data=data)
