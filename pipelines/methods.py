"""Methods: how a run is finished after the base training that methods share.

A kind of method is a function in `KINDS`; params.yaml names methods and gives each a
kind and its settings.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

import keras_dalign as kd
from pipelines import temperature as temperatures
from pipelines.exploration import Exploration, Job, discard, explore, fit, objective
from pipelines.held_out import held_out
from pipelines.method_settings import SHORT, SOLVE
from pipelines.optimizers import optimizer
from pipelines.params import pick
from pipelines.stream import FollowEpoch

if TYPE_CHECKING:
    from pipelines.recording import Recorder


@dataclass(frozen=True)
class Trained:
    """The result of a method.

    Attributes:
        model: The model, from images to logits.
        epochs: The records of each epoch; see `recording.Recorder`.
        phases: Wall time in seconds of `explore`, `switch` and `exploit`, without the
            time for measuring the test error.
        parameters: Numbers of parameters: `base` (the base model's), `total` and
            `exploited`.
        l2: The weight of the L2 term that was minimised with the loss.
        switch: The rank check at the switch, where there was one.
        temperature: What logits are divided by, if it was fitted.
    """

    model: keras.Model
    epochs: list[dict[str, float]]
    phases: dict[str, float]
    parameters: dict[str, int]
    l2: float = 0.0
    switch: dict[str, Any] | None = field(default=None)
    temperature: float | None = None


def base(
    job: Job,
    shared: Callable[[], Exploration],
    backup: Path,
    *,
    epochs: float | str = 1.0,
    reestimate: bool = False,
    average: bool = False,
    temperature: float | None = None,
) -> Trained:
    """The base model, with the requested improvements.

    Args:
        job: What to train on, and how.
        shared: Reads the base training of the seed.
        backup: A path next to which a separate run is backed up.
        epochs: The share of the epochs that it is trained for, rounded up to whole
            ones, or `"short"`, that share in the parameters. Any but 1 is a separate
            run, whose schedule has that length.
        reestimate: Whether its batch-norm statistics are re-estimated at the end.
        average: Whether its weights are first set to their running average.
        temperature: The share of the training samples on which a temperature is fitted,
            which the logits are divided by. A second model, trained in the same way on
            the other samples, gives the logits to fit it on.

    Returns:
        The model.
    """
    share = job.short if epochs == SHORT else float(epochs)
    job = job.lasting(share)
    keeping = {"reestimate": reestimate, "average": average}
    explored = shared() if share == 1.0 else None
    model, entries, phases = _base(job, explored, backup, **keeping)
    found = None
    if temperature is not None:
        part = held_out(job.data, temperature, job.run.seed)
        # The first model must not go on from a backup of the second one.
        second, _, times = _base(
            dataclasses.replace(job, data=part),
            None,
            backup.with_name(f"{backup.stem}-second{backup.suffix}"),
            **keeping,
        )
        begin = time.perf_counter()
        logits = second.predict(part.x_test, batch_size=256, verbose=0)
        found = temperatures.fit(logits, part.y_test)
        model = temperatures.scaled(model, found)
        times["switch"] += time.perf_counter() - begin
        phases = {name: phases[name] + times[name] for name in phases}
    count = model.count_params()
    return Trained(
        model,
        entries,
        {name: seconds for name, seconds in phases.items() if seconds},
        {"base": count, "total": count, "exploited": 0},
        temperature=found,
    )


def _base(
    job: Job,
    exploration: Exploration | None,
    backup: Path,
    *,
    reestimate: bool,
    average: bool,
) -> tuple[keras.Model, list[dict[str, float]], dict[str, float]]:
    """A base model, its records and phases; trained here without an exploration."""
    if exploration is None:
        with tempfile.TemporaryDirectory() as folder:
            exploration = explore(job, Path(folder), backup, average=average)
            model = exploration.model(1.0, average=average)
        discard(backup)
    else:
        model = exploration.model(1.0, average=average)
    phases = {"explore": exploration.seconds(1.0, average=average), "switch": 0.0}
    if reestimate:
        begin = time.perf_counter()
        kd.reestimate_batch_norm(model, job.data.x_train)
        phases["switch"] = time.perf_counter() - begin
    return model, exploration.until(1.0), phases


def two_phase(
    job: Job,
    shared: Callable[[], Exploration],
    backup: Path,
    *,
    gates: str = "random",
    explore: float = 0.6,
    exploit: str = "copy",
    l2: float | str = 0.0,
    average: bool = False,
    **head: Any,
) -> Trained:
    """The base model with an alignment head: explore, switch, exploit.

    With random gates the exploration is that of the base model, which is shared. With
    learned gates it is a separate run.

    Args:
        job: What to train on, and how.
        shared: Reads the base training of the seed.
        backup: A path next to which a separate run is backed up.
        gates: `"random"` or `"learned"`.
        explore: The share of the epochs that is explored.
        exploit: `"copy"`, a fresh copy of the optimizer, for the other epochs; or
            `"solve"`, full batch to a certified gap, on the images as they are.
        l2: Weight of the L2 term of `"solve"`, or `"auto"`.
        average: Whether the switch sets the weights to their running average, which the
            shared exploration keeps. With `"solve"` and `"auto"` it makes a run of
            `DAlign` with its defaults.
        **head: More arguments of `keras_dalign.align`.

    Returns:
        The model after exploitation.

    Raises:
        RuntimeError: If the model never came to its switch.
    """
    epochs, tau = job.train.epochs, max(1, round(explore * job.train.epochs))
    first, rest = (
        optimizer(job.recipe, job.steps, epochs, start=start) for start in (0, tau)
    )
    head = {"gates": gates, "seed": job.run.seed, **head}
    if gates == "random":
        exploration = shared()
        entries = exploration.until(explore)
        seconds = exploration.seconds(explore, average=average)
        trunk = exploration.model(explore, average=average)
    else:
        trunk = job.base()
    begin = time.perf_counter()
    model = kd.align(trunk, n_samples=len(job.data.x_train), **head)
    model.compile(
        optimizer=kd.DAlign(first, rest, explore=tau, average_weights=0), **objective()
    )
    if gates != "random":
        entries = fit(job, model, tau, backup=backup).epochs
        seconds = sum(entry["seconds"] for entry in entries)
        begin = time.perf_counter()
    keras.utils.set_random_seed(job.run.seed)
    noting = 0.0
    if exploit == SOLVE:
        # In batches as large as those of `fit`, for the same rounding.
        solved = kd.solve(
            model,
            job.data.x_train,
            job.data.y_train,
            l2=l2,
            batch_size=4 * job.train.batch_size,
            verbose=0,
        )
        l2 = solved.l2
    else:
        recorder = _exploit(job, model, tau)
        entries, noting = [*entries, *recorder.epochs], recorder.own_seconds
    spent = time.perf_counter() - begin - noting
    report = model.switch_report
    if report is None:
        raise RuntimeError(f"Training ended without a switch. Received: {job.run.name}")
    discard(backup)
    q, bias = model.head.q, model.head.bias
    return Trained(
        model,
        entries,
        {
            "explore": seconds,
            "switch": report.seconds,
            "exploit": spent - report.seconds,
        },
        {
            "base": trunk.count_params(),
            "total": model.count_params(),
            "exploited": int(np.prod(q.shape)) + int(np.prod(bias.shape)),
        },
        float(l2),
        {"epoch": tau, "width": model.head.width, **_rank_record(report.rank)},
    )


def _rank_record(rank: Any) -> dict[str, Any]:
    """The rank check of a switch; empty if an L2 term makes it unnecessary."""
    if rank is None:
        return {}
    return {
        "rank": rank.rank,
        "n": rank.rows_checked,
        "full": rank.full,
        "complete": rank.complete,
        "text": str(rank),
    }


def last_layer(
    job: Job,
    shared: Callable[[], Exploration],
    backup: Path,  # noqa: ARG001
    *,
    explore: float = 0.6,
) -> Trained:
    """Exploitation without gated units: trains the base model's last layer alone.

    As `two_phase` otherwise: batch-norm statistics are re-estimated, the trunk is a
    fixed function in inference mode, and the features of images that are not augmented
    are computed once.

    Args:
        job: What to train on, and how.
        shared: Reads the base training of the seed.
        backup: Not used.
        explore: The share of the epochs that is explored.

    Returns:
        The model with its last layer trained.
    """
    exploration = shared()
    epochs, tau = job.train.epochs, exploration.epoch(explore)
    phases = {"explore": exploration.seconds(explore)}
    model = exploration.model(explore)
    begin = time.perf_counter()
    keras.utils.set_random_seed(job.run.seed)
    kd.reestimate_batch_norm(model, job.data.x_train)
    last = model.layers[-1]
    trunk = keras.Model(model.inputs, last.input)
    trunk.trainable = False
    phases["switch"] = time.perf_counter() - begin
    rest = optimizer(job.recipe, job.steps, epochs, start=tau)
    entries = exploration.until(explore)
    if job.augment is None:
        features = trunk.predict(job.data.x_train, batch_size=256, verbose=0)
        inputs = keras.Input(features.shape[1:])
        head = keras.Model(inputs, last(inputs))
        head.compile(optimizer=rest, **objective())
        history = head.fit(
            features,
            job.data.y_train,
            batch_size=job.train.batch_size,
            epochs=epochs,
            initial_epoch=tau,
            verbose=0,
        ).history
        losses, own = history["loss"], 0.0
        seconds = time.perf_counter() - begin - phases["switch"]
        entries += [
            {"epoch": tau + 1 + i, "train_loss": loss, "phase": 1, "seconds": 0.0}
            for i, loss in enumerate(losses)
        ]
    else:
        inputs = keras.Input(model.inputs[0].shape[1:])
        whole = keras.Model(inputs, last(trunk(inputs, training=False)))
        whole.compile(optimizer=rest, **objective())
        recorder = _exploit(job, whole, tau)
        own = recorder.own_seconds
        entries += [entry | {"phase": 1} for entry in recorder.epochs]
        seconds = time.perf_counter() - begin - phases["switch"] - own
    phases["exploit"] = seconds
    trunk.trainable = True
    return Trained(
        model,
        entries,
        phases,
        {
            "base": model.count_params(),
            "total": model.count_params(),
            "exploited": last.count_params(),
        },
    )


# Each takes a job, what reads the shared exploration, a path for a backup, and its
# settings.
KINDS: dict[str, Callable[..., Trained]] = {
    "base": base,
    "two_phase": two_phase,
    "last_layer": last_layer,
}


def finish(
    job: Job,
    settings: Mapping[str, Any],
    shared: Callable[[], Exploration],
    backup: Path,
) -> Trained:
    """Finishes a run by a method.

    Args:
        job: What to train on, and how.
        settings: `kind` of the method, and its settings.
        shared: Reads the base training of the seed.
        backup: A path next to which a separate run is backed up.

    Returns:
        The result of the method.
    """
    kind = pick("kind of method", KINDS, str(settings.get("kind")))
    rest = {key: value for key, value in settings.items() if key != "kind"}
    return kind(job, shared, backup, **rest)


class _Seed(keras.callbacks.Callback):
    """Sets the seed at an epoch, so that its shuffle is that of any other run.

    PyTorch's loader of arrays draws the order as the epoch begins, after Keras has
    built what a resumed run did not build yet, which draws numbers as well.
    """

    def __init__(self, seed: int, epoch: int) -> None:
        super().__init__()
        self._seed, self._epoch = seed, epoch

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Keras's hook."""
        if epoch == self._epoch:
            keras.utils.set_random_seed(self._seed)


def _exploit(job: Job, model: keras.Model, start: int) -> Recorder:
    """Fits the epochs after the first `start`; returns their recorder."""
    epochs = job.train.epochs
    recorder = job.recorder(epochs, start=start)
    settings = {"initial_epoch": start, "epochs": epochs, "verbose": 0}
    callbacks = [_Seed(job.run.seed, start), recorder]
    if job.augment is None:
        model.fit(
            job.data.x_train,
            job.data.y_train,
            batch_size=job.train.batch_size,
            callbacks=callbacks,
            **settings,
        )
    else:
        stream = job.stream()
        callbacks = [FollowEpoch(stream), *callbacks]
        model.fit(stream, shuffle=False, callbacks=callbacks, **settings)
    return recorder
