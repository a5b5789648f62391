"""`solve(l2="auto")` on whole data sets: time relative to training, and test error.

Trains ResNet-8 on all of CIFAR-10 (20 epochs, crops and flips, Adam with a cosine
schedule from 5e-3, batch 128) and on all of MNIST (10 epochs), or reads networks that
an earlier run stored in `--cache`. For each network it measures

- the time of `solve(l2="auto")` divided by the training time,
- the test error, and that of a head with the width that fits any labels.

The training time is the number of epochs times the median time of four epochs, which
are timed before each solve.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

import keras
import numpy as np

import keras_dalign as kd
from benchmarks import common
from benchmarks.common import Data, Target
from keras_dalign.numerics.losses import SoftmaxCrossEntropy
from pipelines.stream import FollowEpoch, Stream

BATCH_SIZE = 128
EPOCHS = {"cifar10": 20, "mnist": 10}
TIMED_EPOCHS = 4
RATES = {"cifar10": 5e-3, "mnist": 3e-3}
AUGMENT = {"cifar10": {"crop": 4, "flip": True}, "mnist": None}
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def read(folder: Path, name: str) -> Data:
    """All images of a data set, in [0, 1]."""
    with np.load(folder / f"{name}.npz") as arrays:
        x, x_test = (
            (arrays[key] / 255).astype("float32") for key in ("x_train", "x_test")
        )
        y, y_test = (arrays[key].astype("int64") for key in ("y_train", "y_test"))
    if x.ndim == 3:
        x, x_test = x[..., None], x_test[..., None]
    return Data(x, y, x_test, y_test)


def compiled(name: str, data: Data, seed: int) -> tuple[Any, Stream]:
    """A new base model, compiled, and its stream of training data."""
    keras.utils.set_random_seed(seed)
    base = kd.models.resnet(8, data.x.shape[1:], 10)
    stream = Stream(data.x, data.y, BATCH_SIZE, seed, AUGMENT[name])
    steps = EPOCHS[name] * len(stream)
    schedule = keras.optimizers.schedules.CosineDecay(RATES[name], steps)
    base.compile(keras.optimizers.Adam(schedule), LOSS, metrics=["accuracy"])
    return base, stream


def trained(name: str, data: Data, seed: int, cache: Path) -> Any:
    """A trained base model, from the cache if it is there."""
    file = cache / f"keras-dalign-{name}-{seed}.keras"
    if file.exists():
        return keras.models.load_model(file)
    base, stream = compiled(name, data, seed)
    follow = [FollowEpoch(stream)]
    base.fit(stream, epochs=EPOCHS[name], shuffle=False, verbose=2, callbacks=follow)
    base.save(file)
    return base


def training_seconds(name: str, data: Data, seed: int) -> float:
    """Seconds of the training: its number of epochs times the median of a few epochs.

    The epochs are timed right before the solve, so that the load of the machine is
    about the same for both.

    Returns:
        The seconds.
    """
    base, stream = compiled(name, data, seed)
    ends = [time.perf_counter()]
    clock = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: ends.append(time.perf_counter())
    )
    follow = [FollowEpoch(stream), clock]
    base.fit(stream, epochs=TIMED_EPOCHS, shuffle=False, verbose=0, callbacks=follow)
    return float(EPOCHS[name] * median(np.diff(ends)))


def scores(logits: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Test error in percent, and the mean negative log likelihood."""
    logits = np.asarray(logits, dtype=float)
    return {
        "test error": 100.0 * float(np.mean(logits.argmax(axis=1) != y)),
        "test nll": float(SoftmaxCrossEntropy().value(logits, np.eye(10)[y]).mean()),
    }


def solved(base: Any, data: Data, width: int | None = None) -> dict[str, Any]:
    """Time and results of a whole call of `solve`."""
    model = kd.align(base, n_samples=len(data.x), seed=0, width=width, copy=True)
    begin = time.perf_counter()
    result = kd.solve(model, data.x, data.y, l2="auto", loss=LOSS, verbose=0)
    seconds = time.perf_counter() - begin
    widths = [trial.width for trial in result.widths or ()]
    return {
        "seconds": seconds,
        "switch": model.switch_report.seconds,
        "width": result.width,
        "widths": widths,
        "d": model.head.dim,
        "l2": result.l2,
        "gap": result.gap,
        "gradients": result.evaluations,
        **scores(model.predict(data.x_test, batch_size=256, verbose=0), data.y_test),
    }


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All runs on one data set."""
    data = read(options.data, name)
    seeds = []
    for seed in range(options.seeds if name == "cifar10" else 1):
        base = trained(name, data, seed, options.cache)
        seconds = training_seconds(name, data, seed)
        found: dict[str, Any] = {"seed": seed, "base seconds": seconds}
        logits = base.predict(data.x_test, batch_size=256, verbose=0)
        found["base"] = scores(logits, data.y_test)
        found["auto"] = solved(base, data)
        if options.wide and name == "cifar10":
            wide = -(-2 * len(data.x) // found["auto"]["d"])
            found["wide"] = solved(base, data, width=wide)
        seeds.append(found)
        print(json.dumps(found), flush=True)
    return {"seeds": seeds}


def targets_of(found: dict[str, Any], wide: bool) -> list[Target]:
    """The figures that must be shown."""
    targets = []
    if "cifar10" in found:
        seeds = found["cifar10"]["seeds"]
        ratios = [run["auto"]["seconds"] / run["base seconds"] for run in seeds]
        targets.append(Target("CIFAR-10: solve / training", fmean(ratios), 0.12))
        if wide:
            lost = [
                run["auto"]["test error"] - run["wide"]["test error"] for run in seeds
            ]
            targets.append(
                Target("CIFAR-10: points lost to the wide head", fmean(lost), 0.15)
            )
    return targets


def _seed_rows(name: str, found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for run in found["seeds"]:
        base = run["base"]
        rows.append(
            [
                name,
                f"{run['seed']}",
                "base",
                "",
                f"{base['test error']:.2f}",
                f"{base['test nll']:.3f}",
                f"{run['base seconds']:.0f}",
                "",
            ]
        )
        for kind in ("auto", "wide"):
            if kind in run:
                one = run[kind]
                rows.append(
                    [
                        name,
                        f"{run['seed']}",
                        f"solve, {kind}",
                        f"{one['width']}",
                        f"{one['test error']:.2f}",
                        f"{one['test nll']:.3f}",
                        f"{one['seconds']:.0f}",
                        f"{one['seconds'] / run['base seconds']:.3f}",
                    ]
                )
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options for data and trained networks."""
    common.add_data_folder(parser, "cifar10", "mnist")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="folder for the trained networks",
    )
    parser.add_argument("--sets", nargs="+", default=["cifar10", "mnist"])


def _options(parser: argparse.ArgumentParser) -> None:
    add_options(parser)
    parser.add_argument("--wide", action=argparse.BooleanOptionalAction, default=True)


def main() -> None:
    """Measures, prints and writes the results."""
    options = common.arguments(__doc__, seeds=3, more=_options)
    common.warm_up()
    found = {name: measure(name, options) for name in options.sets}
    header = [
        "data",
        "seed",
        "model",
        "width",
        "test error, %",
        "test NLL",
        "seconds",
        "/ training",
    ]
    rows = [row for name, runs in found.items() for row in _seed_rows(name, runs)]
    common.write(
        options.out,
        "whole",
        title="Whole data sets",
        body=[common.table(header, rows)],
        targets=targets_of(found, options.wide),
        settings={"batch size": BATCH_SIZE, "epochs": EPOCHS, "rates": RATES},
        measurements=found,
    )


if __name__ == "__main__":
    main()
