"""MNIST: time, training loss and test error of the two-phase run and of the base run.

ResNet-8 is trained on the first 5,000 training images and tested on the 10,000 test
images: 10 epochs, batch size 64, Adam 1e-3, with a constant learning rate and with a
cosine schedule over all steps. The base run is shown as Keras trains it, and with its
batch-norm statistics re-estimated as at the switch. For each seed, the base run and the
two-phase runs follow each other in one process.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

import keras
import numpy as np

import keras_dalign as kd
from benchmarks import common
from benchmarks.common import BASE, LEARNED, RANDOM, REESTIMATED, Data, Target

DATA = common.ROOT.parent / "shared" / "data" / "mnist.npz"
N_TRAIN = 5000
EPOCHS = 10
SCHEDULES = ("constant", "cosine")
METHODS = (BASE, RANDOM, LEARNED)
ROWS = (BASE, REESTIMATED, RANDOM, LEARNED)

Run = dict[str, Any]


def read(path: Path) -> Data:
    """Reads MNIST: the first training images, and all test images.

    Args:
        path: A file with `x_train`, `y_train`, `x_test`, `y_test`; pixels 0..255.

    Returns:
        Images of shape `(28, 28, 1)` in [0, 1].

    Raises:
        SystemExit: If there is no such file.
    """
    if not path.is_file():
        raise SystemExit(
            f"There is no file {path}. Pass --data FILE, an .npz file with the arrays "
            "x_train and x_test (uint8, of shape (n, 28, 28) or (n, 28, 28, 1)), "
            "y_train and y_test."
        )
    with np.load(path) as arrays:
        x, y, x_test, y_test = (
            arrays[name] for name in ("x_train", "y_train", "x_test", "y_test")
        )

    def images(pixels: np.ndarray) -> np.ndarray:
        return (pixels.reshape(-1, 28, 28, 1) / 255).astype("float32")

    return Data(
        images(x[:N_TRAIN]),
        y[:N_TRAIN].astype("int64"),
        images(x_test),
        y_test.astype("int64"),
    )


def learning_rate(schedule: str, n_samples: int, epochs: int) -> Any:
    """The learning rate of a run.

    Args:
        schedule: One of `SCHEDULES`.
        n_samples: Number of training samples.
        epochs: Number of epochs.

    Returns:
        A float, or a cosine decay to zero over all steps of the run.
    """
    if schedule == "constant":
        return common.LEARNING_RATE
    steps = epochs * math.ceil(n_samples / common.BATCH_SIZE)
    return keras.optimizers.schedules.CosineDecay(common.LEARNING_RATE, steps)


def measure(
    data: Data, method: str, schedule: str, seed: int, epochs: int
) -> list[Run]:
    """Trains and evaluates one model.

    Args:
        data: The data.
        method: One of `METHODS`.
        schedule: One of `SCHEDULES`.
        seed: Seed of initial weights, shuffles and gates.
        epochs: Number of epochs.

    Returns:
        One run; for the base, a second one that is the same model with batch-norm
        statistics re-estimated.
    """
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    base = kd.models.resnet(8, input_shape=(28, 28, 1), classes=10)
    rate = learning_rate(schedule, len(data.x), epochs)
    model = common.compiled(method, base, len(data.x), seed, rate)
    clock = _Clock()
    seconds = common.timed_fit(model, data, seed=seed, epochs=epochs, callbacks=[clock])
    run = {
        "schedule": schedule,
        "seed": seed,
        "seconds": seconds,
        "epoch_seconds": clock.seconds,
    }
    runs = [{"method": method, **run, **common.evaluation(model, data)}]
    if method == BASE:
        kd.reestimate_batch_norm(model, data.x)
        runs.append({"method": REESTIMATED, **run, **common.evaluation(model, data)})
    else:
        runs[0]["switch_seconds"] = model.switch_report.seconds
    return runs


class _Clock(keras.callbacks.Callback):
    """Measures the time of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Starts the clock."""
        self._begin = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Stores the time of the epoch."""
        self.seconds.append(time.perf_counter() - self._begin)


def select(runs: list[Run], method: str, schedule: str) -> list[Run]:
    """The runs of a method with a schedule, seed by seed."""
    return [
        run for run in runs if run["method"] == method and run["schedule"] == schedule
    ]


def time_ratio(runs: list[Run], base: list[Run]) -> float:
    """Median over the seeds of a run's time divided by that of its base run."""
    pairs = zip(runs, base, strict=True)
    return median(run["seconds"] / other["seconds"] for run, other in pairs)


def steady_ratio(runs: list[Run], base: list[Run]) -> float:
    """`time_ratio` with equal times for all epochs that train the whole model.

    On a busy machine, an epoch can take twice the time of another that computes the
    same. The epochs of the base run and of exploration compute the same, so each counts
    with their median time. First epochs, which compile, count with their mean time.

    Args:
        runs: Runs of one method, seed by seed.
        base: The base runs of the same seeds.

    Returns:
        The median of the ratios.
    """
    ratios = []
    for run, other in zip(runs, base, strict=True):
        whole = [_whole_epochs(run), _whole_epochs(other)]
        epoch = median(whole[0][1:] + whole[1][1:])
        first = fmean([whole[0][0], whole[1][0]])
        own, theirs = (
            one["seconds"] - sum(epochs) + first + epoch * (len(epochs) - 1)
            for one, epochs in zip((run, other), whole, strict=True)
        )
        ratios.append(own / theirs)
    return median(ratios)


def _whole_epochs(run: Run) -> list[float]:
    """The times of the epochs that trained the whole model."""
    epochs: list[float] = run["epoch_seconds"]
    explored = common.EXPLORE if run["method"] in (RANDOM, LEARNED) else 1.0
    return epochs[: round(explored * len(epochs))]


def rows(runs: list[Run]) -> list[list[str]]:
    """The table's rows, one for each schedule and method, over all seeds."""
    found = []
    for schedule in SCHEDULES:
        base = select(runs, BASE, schedule)
        for method in ROWS:
            chosen = select(runs, method, schedule)
            found.append(
                [
                    method,
                    schedule,
                    f"{common.mean(chosen, 'loss'):.3g}",
                    f"{max(run['gap'] for run in chosen):.3g}",
                    common.plus_minus(chosen, "test_error"),
                    common.plus_minus(chosen, "seconds"),
                    f"{time_ratio(chosen, base):.3f}",
                    f"{steady_ratio(chosen, base):.3f}",
                ]
            )
    return found


def targets(runs: list[Run], schedule: str, method: str = RANDOM) -> list[Target]:
    """The figures that must be shown with a schedule.

    Args:
        runs: All runs.
        schedule: One of `SCHEDULES`.
        method: The two-phase run.

    Returns:
        The targets, against the base run and the re-estimated one.
    """
    own = select(runs, method, schedule)
    what = f"{method}, {schedule}"
    found = []
    for name in (BASE, REESTIMATED):
        other = select(runs, name, schedule)
        loss = common.mean(own, "loss") / common.mean(other, "loss")
        excess = common.mean(own, "test_error") - common.mean(other, "test_error")
        found += [
            Target(
                f"{what}: training loss over that of '{name}'",
                loss,
                0.5 if schedule == "constant" else 1.0,
            ),
            Target(
                f"{what}: mean test error above that of '{name}', points", excess, 0.5
            ),
        ]
    return found


def time_targets(runs: list[Run], method: str = RANDOM) -> list[Target]:
    """The times that must be shown, over both schedules, which take the same time."""
    own = [run for run in runs if run["method"] == method]
    base = [run for run in runs if run["method"] == BASE]
    return [
        Target(f"{method}: time over the base's", time_ratio(own, base), 0.75),
        Target(
            f"{method}: the same at each kind of epoch's median time",
            steady_ratio(own, base),
            0.75,
        ),
    ]


def better_bases(runs: list[Run]) -> list[str]:
    """Comparisons in which a base run has the lower test error or loss.

    Args:
        runs: All runs.

    Returns:
        A sentence for each such comparison.
    """
    found = []
    for schedule in SCHEDULES:
        for method in (RANDOM, LEARNED):
            own = select(runs, method, schedule)
            for name in (BASE, REESTIMATED):
                other = select(runs, name, schedule)
                for key, noun, digits in (
                    ("test_error", "test error", ".2f"),
                    ("loss", "training loss", ".3g"),
                ):
                    theirs, ours = common.mean(other, key), common.mean(own, key)
                    if theirs < ours:
                        found.append(
                            f"{schedule}: '{name}' has the lower {noun}, "
                            f"{theirs:{digits}} against {ours:{digits}} of {method}."
                        )
    return found


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=DATA, help="MNIST as .npz")
    parser.add_argument("--epochs", type=int, default=EPOCHS)


def main() -> None:
    """Measures, prints and writes the results."""
    options = common.arguments(__doc__, seeds=3, more=_options)
    data = read(options.data)
    common.warm_up()
    runs: list[Run] = []
    for seed in range(options.seeds):
        for schedule in SCHEDULES:
            for method in METHODS:
                found = measure(data, method, schedule, seed, options.epochs)
                runs += found
                for run in found:
                    print(" ".join(f"{k}={v}" for k, v in run.items()), flush=True)
    header = [
        "method",
        "schedule",
        "training loss",
        "largest gap",
        "test error, %",
        "seconds",
        "time / base's",
        "the same, steady",
    ]
    lower = better_bases(runs)
    about = (
        f"ResNet-8, {len(data.x):,} training and {len(data.x_test):,} test images, "
        f"{options.epochs} epochs, batch size {common.BATCH_SIZE}, Adam "
        f"{common.LEARNING_RATE:g} (constant, or cosine decay over all steps), "
        f"seeds: {options.seeds}. Mean training loss in inference mode, sums in "
        "float64; mean ± standard deviation of test error and of the wall time of "
        "`fit`; median over the seeds of the ratio of times, the runs of one seed one "
        "after the other; the same with every epoch at the median time of its kind "
        "(times vary on a busy machine). The re-estimated base is the base run with "
        "its batch-norm statistics set as at the switch."
    )
    common.write(
        options.out,
        "mnist",
        title="MNIST",
        body=[
            about,
            common.table(header, rows(runs)),
            "Where a base run is the better one:",
            common.bullets(lower) if lower else "Nowhere.",
        ],
        targets=[
            *time_targets(runs),
            *(target for schedule in SCHEDULES for target in targets(runs, schedule)),
        ],
        settings={
            "n_train": len(data.x),
            "epochs": options.epochs,
            "batch_size": common.BATCH_SIZE,
            "learning_rate": common.LEARNING_RATE,
            "explore": common.EXPLORE,
        },
        measurements=runs,
    )


if __name__ == "__main__":
    main()
