"""The cost of batch-norm statistics and features, in inference passes of the trunk.

At the switch the trunk makes two passes over the data: one to re-estimate its
batch-norm statistics, one to compute the features. The unit is one inference pass of
the trunk over the same data in the same batches. Each of the three times includes
tracing and compilation, as at a switch. The cost in inference passes of a compiled
trunk is shown as well. The passes follow each other in rounds, and the figure is the
median over the rounds of the ratio of their times. CPU time is shown as well as wall
time, since other work on the machine affects it less.

`KERAS_BACKEND` chooses the backend; each writes its own files.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_dalign as kd
from benchmarks import common
from benchmarks.common import Target
from keras_dalign.head import data
from keras_dalign.head.batch_predictor import BatchPredictor
from keras_dalign.head.features import FeaturePass

BATCH_SIZE = 256
UNIT, COMPILED = "inference", "inference, compiled"
STATISTICS, FEATURES = "statistics", "features"
# The target for the sum of both, in inference passes.
MOST = 2.2

Seconds = tuple[float, float]


def images(path: Path, n: int) -> np.ndarray:
    """Images like CIFAR-10's.

    Args:
        path: An `.npz` file with the array `x_train`. It need not exist.
        n: Number of images.

    Returns:
        Images `(n, 32, 32, 3)` in [0, 1], float32: the first ones of the file, repeated
        if it has too few, or noise if there is no file.
    """
    if not path.exists():
        return np.random.default_rng(0).random((n, 32, 32, 3), dtype="float32")
    with np.load(path) as arrays:
        found = arrays["x_train"]
    return np.resize(found, (n, *found.shape[1:])).astype("float32") / 255


def timed(function: Callable[[], Any]) -> Seconds:
    """Wall time and CPU time of a call, in seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - processor


def infer(predictor: BatchPredictor, x: np.ndarray) -> None:
    """One inference pass of a trunk."""
    for batch, _, _ in data.batches(x, batch_size=BATCH_SIZE):
        predictor.predict(batch)


def measure(x: np.ndarray, rounds: int) -> dict[str, list[Seconds]]:
    """Times the passes, round by round.

    Args:
        x: Images `(n, ...)`.
        rounds: Number of rounds.

    Returns:
        Wall time and CPU time of each pass in every round, by name.
    """
    base = kd.models.resnet(8, x.shape[1:])

    def fresh() -> kd.AlignedModel:
        return kd.align(base, n_samples=len(x), seed=0, copy=True)

    # Before measuring, run what a process does only once.
    infer(BatchPredictor(fresh().trunk), x[: 2 * BATCH_SIZE])
    found: dict[str, list[Seconds]] = {
        name: [] for name in (UNIT, COMPILED, STATISTICS, FEATURES)
    }
    for _ in range(rounds):
        model, predictor = fresh(), BatchPredictor(fresh().trunk)
        functions = (
            partial(infer, predictor, x),
            partial(infer, predictor, x),
            partial(kd.reestimate_batch_norm, model.trunk, x, batch_size=BATCH_SIZE),
            partial(FeaturePass(model, keep=True).run, x, batch_size=BATCH_SIZE),
        )
        for name, function in zip(found, functions, strict=True):
            found[name].append(timed(function))
    return found


def ratios(
    seconds: dict[str, list[Seconds]], *names: str, unit: str = UNIT
) -> tuple[float, float]:
    """Medians over the rounds of the time of some passes in inference passes.

    Args:
        seconds: From `measure`.
        *names: The passes, whose times are added.
        unit: `UNIT` or `COMPILED`.

    Returns:
        The ratio of wall times and that of CPU times.
    """
    passes = np.sum([seconds[name] for name in names], axis=0)
    wall, processor = np.median(passes / np.asarray(seconds[unit]), axis=0)
    return float(wall), float(processor)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        default=common.DATA / "cifar10.npz",
        help="npz file with x_train; without the file, noise of the same shape",
    )
    parser.add_argument(
        "--samples", type=int, nargs="+", default=[5000, 50000], help="data sizes"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each size")


def main() -> None:
    """Measures, prints and writes the results."""
    options = common.arguments(__doc__, more=_options)
    backend = keras.backend.backend()
    common.warm_up()
    x = images(options.data, max(options.samples))
    measured = {n: measure(x[:n], options.rounds) for n in options.samples}
    rows, targets = [], []
    for n, seconds in measured.items():
        both = STATISTICS, FEATURES
        total, processor = ratios(seconds, *both)
        rows.append(
            [
                f"{n:,}",
                *(
                    f"{np.median([wall for wall, _ in seconds[unit]]):.2f}"
                    for unit in (UNIT, COMPILED)
                ),
                *(f"{ratios(seconds, name)[0]:.2f}" for name in both),
                f"{total:.2f}",
                f"{processor:.2f}",
                f"{ratios(seconds, *both, unit=COMPILED)[0]:.2f}",
            ]
        )
        claim = f"{n:,} samples, {backend}: both passes, in inference passes"
        targets.append(Target(claim, total, MOST))
    source = options.data.name if options.data.exists() else "noise"
    about = (
        f"ResNet-8, images of 32x32x3 ({source}), batch size {BATCH_SIZE}; "
        f"{options.rounds} rounds, medians. Statistics and features are in inference "
        "passes of a fresh trunk, whose tracing and compilation count for all of them; "
        "the last column is in passes of a trunk that is compiled already."
    )
    header = [
        "samples",
        "inference, s",
        "compiled, s",
        "statistics",
        "features",
        "both",
        "both, CPU",
        "both, in compiled passes",
    ]
    common.write(
        options.out,
        f"passes_{backend}",
        title=f"Batch-norm statistics and features, {backend}",
        body=[about, common.table(header, rows)],
        targets=targets,
        settings={
            "rounds": options.rounds,
            "batch_size": BATCH_SIZE,
            "samples": options.samples,
            "data": source,
        },
        measurements={str(n): seconds for n, seconds in measured.items()},
    )


if __name__ == "__main__":
    main()
