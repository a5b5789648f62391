"""The base training of a seed, which methods share.

With random gates, exploration is the training of the base model, bit for bit. So the
base model is trained once for each data set, augmentation and seed, its weights are
kept at some epochs, and every method with random gates starts from one of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from pipelines import base_models, files
from pipelines.averaging import RunningAverage
from pipelines.optimizers import optimizer
from pipelines.params import pick
from pipelines.recording import Recorder
from pipelines.stream import FollowEpoch, Stream

if TYPE_CHECKING:
    from pipelines.datasets import Dataset
    from pipelines.layout import Layout
    from pipelines.params import Params, Recipe, Run, TrainParams

# End of the names of files with averages.
_AVERAGE = "-average"


@dataclass(frozen=True)
class Job:
    """What a run of the grid trains on, and how.

    Attributes:
        run: The run.
        data: Its data.
        train: Its base model and training.
        recipe: What its optimizer does.
        augment: Its augmentation, or None.
    """

    run: Run
    data: Dataset
    train: TrainParams
    recipe: Recipe

    @classmethod
    def of(cls, run: Run, params: Params, data: Dataset) -> Job:
        """The job of a run of the grid."""
        recipe = params.recipe(run.dataset, run.augmentation)
        return cls(run, data, params.train[run.dataset], recipe)

    def lasting(self, share: float) -> Job:
        """The job with a share of the epochs, rounded up to whole ones."""
        # Rounding may put products such as 0.07 * 100 above an integer.
        epochs = math.ceil(share * self.train.epochs - 1e-9)
        train = dataclasses.replace(self.train, epochs=epochs)
        return dataclasses.replace(self, train=train)

    @property
    def short(self) -> float:
        """The share of the epochs with which the base takes the time of our default."""
        noun = f"augmentation (under `train.{self.run.dataset}.short`)"
        return pick(noun, self.train.short, self.run.augmentation)

    @property
    def augment(self) -> dict[str, object] | None:
        """The augmentation of the run, or None."""
        return None if self.run.augmentation == "none" else dict(self.train.augment)

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return -(-len(self.data.x_train) // self.train.batch_size)

    def stream(self) -> Stream:
        """The training samples, shuffled and augmented anew every epoch."""
        data = self.data
        return Stream(
            data.x_train,
            data.y_train,
            self.train.batch_size,
            self.run.seed,
            self.augment,
        )

    def base(self) -> keras.Model:
        """The base model, with the first weights of the seed."""
        keras.utils.set_random_seed(self.run.seed)
        return base_models.build(
            self.train.model, self.data.x_train.shape[1:], self.data.n_classes
        )

    def recorder(
        self,
        epochs: int,
        backup: Path | None = None,
        *,
        start: int = 0,
        average: RunningAverage | None = None,
    ) -> Recorder:
        """A recorder of losses, seconds and, ten times, the test error."""
        every = max(1, epochs // 10)
        tested = {e for e in range(start + 1, epochs + 1) if e % every == 0} | {epochs}
        return Recorder(self.data.x_test, self.data.y_test, tested, backup, average)


@dataclass(frozen=True)
class Exploration:
    """The base training of a seed.

    Attributes:
        job: What it was trained on.
        folder: Where its weights lie.
        epochs: The entries of its `Recorder`.
    """

    job: Job
    folder: Path
    epochs: Sequence[dict[str, float]]

    @classmethod
    def read(cls, job: Job, layout: Layout) -> Exploration:
        """Reads what the stage `explore` wrote."""
        run = job.run.exploration
        history = files.read_json(layout.history(run), "epochs")["epochs"]
        times = files.read_json(layout.timing(run), "epochs", "average")
        entries = [
            {**entry, "seconds": seconds, "average_seconds": averaging}
            for entry, seconds, averaging in zip(
                history, times["epochs"], times["average"], strict=True
            )
        ]
        return cls(job, layout.run(run), entries)

    def epoch(self, share: float) -> int:
        """The number of epochs of a share, at least 1."""
        return max(1, round(share * self.job.train.epochs))

    def model(self, share: float, *, average: bool = False) -> keras.Model:
        """The base model after a share of the epochs.

        Args:
            share: In (0, 1].
            average: Whether its trainable weights are their running average.

        Returns:
            The model, not compiled.

        Raises:
            ValueError: If its weights at that epoch, or their average, were not kept.
        """
        model = self.job.base()
        weights = self._kept(share, "", len(model.weights))
        model.set_weights(weights)
        if average:
            trainable = model.trainable_variables
            averages = self._kept(share, _AVERAGE, len(trainable))
            for variable, value in zip(trainable, averages, strict=True):
                variable.assign(value)
        return model

    def _kept(self, share: float, kind: str, count: int) -> list[np.ndarray]:
        """The arrays that were kept after a share of the epochs."""
        path = _checkpoint(self.folder, self.epoch(share), kind)
        if not path.exists():
            found = self.folder.glob(f"epoch-???{kind}.npz")
            kept = sorted(int(each.name[6:9]) for each in found)
            noun = "averaged weights" if kind else "weights"
            raise ValueError(
                f"Of epoch {self.epoch(share)} no {noun} were kept. Received: "
                f"a share of {share} of {self.job.train.epochs} epochs; kept are those "
                f"after {kept}. Add the share to `train.{self.job.run.dataset}."
                "checkpoints`, and run `explore` again."
            )
        return list(files.read_arrays(path, *map(_name, range(count))))

    def until(self, share: float) -> list[dict[str, float]]:
        """The records of a share of the epochs."""
        return list(self.epochs[: self.epoch(share)])

    def seconds(self, share: float, *, average: bool = False) -> float:
        """Wall time of a share of the epochs, with or without that of the average."""
        names = ("seconds", "average_seconds") if average else ("seconds",)
        return float(sum(entry[name] for entry in self.until(share) for name in names))


def explore(
    job: Job,
    folder: Path,
    backup: Path | None = None,
    shares: Sequence[float] = (1.0,),
    *,
    average: bool = False,
) -> Exploration:
    """Trains the base model.

    Args:
        job: What to train on, and how.
        folder: Where to keep its weights; it is made.
        backup: A path next to which the run is backed up after every epoch. A killed
            run continues from there, and gives the same weights.
        shares: The shares of the epochs after which the weights are kept.
        average: Whether their running average is kept, too.

    Returns:
        The exploration.
    """
    train = job.train
    model = job.base()
    model.compile(
        optimizer=optimizer(job.recipe, job.steps, train.epochs), **objective()
    )
    folder.mkdir(parents=True, exist_ok=True)
    kept = backup.with_suffix(".weights") if backup else folder
    kept.mkdir(parents=True, exist_ok=True)
    epochs = {max(1, round(share * train.epochs)) for share in shares}
    running = RunningAverage(model) if average else None
    recorder = fit(
        job,
        model,
        train.epochs,
        [_Checkpoints(kept, epochs, running)],
        backup=backup,
        average=running,
    )
    if kept != folder:
        # They stay beside the backup, which does not make them again.
        shutil.copytree(kept, folder, dirs_exist_ok=True)
    return Exploration(job, folder, recorder.epochs)


def fit(
    job: Job,
    model: keras.Model,
    epochs: int,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    *,
    backup: Path | None = None,
    average: RunningAverage | None = None,
) -> Recorder:
    """Fits a compiled model on the stream of a job, from the first epoch.

    Args:
        job: What to train on.
        model: The model.
        epochs: Number of epochs.
        callbacks: More callbacks.
        backup: A path next to which the run is backed up after every epoch. A killed
            run continues from there. `discard` removes the backup.
        average: Averages the model's weights during the training.

    Returns:
        The recorder, also with the epochs before a kill.
    """
    stream = job.stream()
    records = backup.with_suffix(".json") if backup else None
    recorder = job.recorder(epochs, records, average=average)
    resuming: list[keras.callbacks.Callback] = []
    if backup is not None:
        # Only a built optimizer is restored.
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        resuming = [_Backup(backup.with_suffix(""))]
    model.fit(
        stream,
        epochs=epochs,
        # The stream shuffles, with a seed of its epoch; Keras would not.
        shuffle=False,
        verbose=0,
        callbacks=[
            FollowEpoch(stream),
            *([average] if average else []),
            recorder,
            *callbacks,
            *resuming,
        ],
    )
    if records is not None and not recorder.epochs:
        # The run was killed after its last epoch.
        recorder.resume(epochs)
    return recorder


def discard(backup: Path) -> None:
    """Removes the backup of a run whose results have been written."""
    # The weights go first: without them a run starts again.
    shutil.rmtree(backup.with_suffix(""), ignore_errors=True)
    shutil.rmtree(backup.with_suffix(".weights"), ignore_errors=True)
    backup.with_suffix(".json").unlink(missing_ok=True)


def objective() -> dict[str, Any]:
    """The loss of all methods."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return {"loss": loss}


@functools.cache
def warm_up() -> None:
    """Fits a throwaway model, so that no run pays for the framework's first step."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile(optimizer="adam", **objective())
    x, y = np.zeros((4, 4), "float32"), np.zeros(4, "int64")
    model.fit(x, y, batch_size=2, verbose=0)
    model.predict(x, verbose=0)


def _checkpoint(folder: Path, epoch: int, kind: str = "") -> Path:
    return folder / f"epoch-{epoch:03d}{kind}.npz"


def _name(index: int) -> str:
    """The name of an array in a checkpoint."""
    return f"{index:04d}"


class _Backup(keras.callbacks.Callback):
    """Keras's `BackupAndRestore`, of which a kill leaves a whole backup or none.

    By itself, Keras writes over the weights, and the number of the epoch after them.

    Args:
        folder: Where the backups lie, each in a folder of its own.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002
        """Keras's hook."""
        backups = self._backups()
        if backups:
            self._keras(backups[-1]).on_train_begin()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Keras's hook."""
        before = self._backups()
        with files.replacing(self._folder / f"epoch-{epoch + 1:06d}") as folder:
            self._keras(folder).on_epoch_end(epoch)
        for path in before:
            shutil.rmtree(path)

    def _backups(self) -> list[Path]:
        return sorted(self._folder.glob("epoch-*"))

    def _keras(self, folder: Path) -> keras.callbacks.Callback:
        callback = keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False)
        callback.set_model(self.model)
        return callback


class _Checkpoints(keras.callbacks.Callback):
    """Writes the weights, and their average, after some of the epochs."""

    def __init__(
        self, folder: Path, epochs: set[int], average: RunningAverage | None
    ) -> None:
        super().__init__()
        self._folder, self._epochs, self._average = folder, epochs, average

    def on_epoch_end(self, epoch: int, logs: object = None) -> None:  # noqa: ARG002
        """Keras's hook."""
        if epoch + 1 in self._epochs:
            self._write(epoch + 1, "", self.model.get_weights())
            if self._average is not None:
                self._write(epoch + 1, _AVERAGE, self._average.weights())

    def _write(self, epoch: int, kind: str, weights: Sequence[np.ndarray]) -> None:
        arrays = {_name(index): array for index, array in enumerate(weights)}
        files.write_arrays(_checkpoint(self._folder, epoch, kind), arrays)
