"""Step time of `DAlign(Adam())` while exploring, against bare `Adam()`.

The same model with the same weights is trained twice: by Keras alone, and aligned with
random gates, whose exploration equals the base run. Short blocks of steps alternate
between the two. The figure is the median over all pairs of blocks of the ratio of their
times. A control, the bare model against a copy of itself, shows the effect of the
machine's noise on such a ratio.

`KERAS_BACKEND` chooses the backend; each writes its own files.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

import keras_dalign as kd
from benchmarks import common
from benchmarks.common import Target

BARE = "Adam"
CONTROL = "Adam, a copy"
WRAPPED = "DAlign(Adam)"


@dataclass(frozen=True)
class Case:
    """A model, and the length of its blocks.

    Attributes:
        name: Its name.
        build: Builds the base model.
        steps: Steps per block, enough for a tenth of a second or more.
    """

    name: str
    build: Callable[[], keras.Model]
    steps: int


CASES = (
    Case("MLP 64-64", lambda: common.mlp(0), 100),
    Case("ResNet-8", lambda: kd.models.resnet(8, (28, 28, 1)), 4),
)


class _Stopwatch(keras.callbacks.Callback):
    """Times an epoch from its first step, without the set-up before."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = 0.0
        self.seconds = 0.0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Starts at the first step."""
        if batch == 0:
            self.begin = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Stops after the metrics were read, when all steps have finished."""
        self.seconds = time.perf_counter() - self.begin


def models(case: Case, n_samples: int) -> dict[str, keras.Model]:
    """The bare model, its copy and the aligned model, with equal weights.

    Args:
        case: The case.
        n_samples: Number of training samples, for the aligned model's width.

    Returns:
        Compiled models by name.
    """
    bases = [case.build() for _ in range(3)]
    for copy in bases[1:]:
        copy.set_weights(bases[0].get_weights())
    found = dict(zip((BARE, CONTROL, WRAPPED), bases, strict=True))
    found[WRAPPED] = kd.align(bases[2], n_samples=n_samples, seed=0)
    for name, model in found.items():
        optimizer = keras.optimizers.Adam(common.LEARNING_RATE)
        if name == WRAPPED:
            # All epochs of a block are exploration, and no phase follows.
            optimizer = kd.DAlign(optimizer, None, explore=1)
        model.compile(
            optimizer=optimizer,
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    return found


def measure(case: Case, pairs: int) -> dict[str, list[float]]:
    """Times blocks of steps, in turns and in alternating order.

    Args:
        case: The case.
        pairs: Number of blocks of each model.

    Returns:
        Seconds per step of each block, by the model's name.
    """
    n = case.steps * common.BATCH_SIZE
    rng = np.random.default_rng(0)
    found = models(case, n)
    shape = found[BARE].input_shape[1:]
    x = rng.random((n, *shape), dtype="float32")
    y = rng.integers(10, size=n)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    stopwatch = _Stopwatch()
    # The first two blocks of each model are for compilation and caches, and do not
    # count.
    for index in range(-2, pairs):
        order = list(found)
        order = order[index % 3 :] + order[: index % 3]
        for name in order if index % 2 else reversed(order):
            found[name].fit(
                x,
                y,
                batch_size=common.BATCH_SIZE,
                shuffle=False,
                verbose=0,
                callbacks=[stopwatch],
            )
            if index >= 0:
                seconds[name].append(stopwatch.seconds / case.steps)
    return seconds


def summary(seconds: dict[str, list[float]], name: str) -> dict[str, float]:
    """Median and quartiles of the ratios of paired blocks.

    Args:
        seconds: Seconds per step of each block, by the model's name.
        name: The model to compare with the bare one.

    Returns:
        `ratio` (median), `lower` and `upper` (quartiles), `error` (the standard
        error of the median, by bootstrap), `fast` (the ratio of the models' fast
        blocks, the 10 % quantiles), and `step` (median seconds).
    """
    ratios = np.asarray(seconds[name]) / np.asarray(seconds[BARE])
    lower, ratio, upper = np.quantile(ratios, [0.25, 0.5, 0.75])
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, size=(2000, len(ratios))), axis=1)
    return {
        "ratio": float(ratio),
        "lower": float(lower),
        "upper": float(upper),
        "error": float(medians.std()),
        "fast": float(
            np.quantile(seconds[name], 0.1) / np.quantile(seconds[BARE], 0.1)
        ),
        "step": float(np.median(seconds[name])),
    }


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=150, help="blocks of each model")


def main() -> None:
    """Measures, prints and writes the results."""
    options = common.arguments(__doc__, more=_options)
    backend = keras.backend.backend()
    measured = {case.name: measure(case, options.pairs) for case in CASES}
    rows, targets = [], []
    for case in CASES:
        seconds = measured[case.name]
        bare = float(np.median(seconds[BARE]))
        rows.append([case.name, BARE, f"{1e3 * bare:.3f}", "1", "", "", "1"])
        for name in (CONTROL, WRAPPED):
            found = summary(seconds, name)
            rows.append(
                [
                    case.name,
                    name,
                    f"{1e3 * found['step']:.3f}",
                    f"{found['ratio']:.3f}",
                    f"{found['error']:.3f}",
                    f"{found['lower']:.3f} to {found['upper']:.3f}",
                    f"{found['fast']:.3f}",
                ]
            )
        found = summary(seconds, WRAPPED)
        claim = f"{case.name}, {backend}: step time over Adam's, ± {found['error']:.3f}"
        targets.append(Target(claim, found["ratio"], 1.03))
    header = [
        "model",
        "optimizer",
        "ms a step",
        "ratio",
        "± error",
        "quartiles",
        "fast blocks",
    ]
    steps = ", ".join(f"{case.steps} steps ({case.name})" for case in CASES)
    about = (
        f"Batch size {common.BATCH_SIZE}; {options.pairs} interleaved blocks of "
        f"{steps} for each model. Ratios are medians over pairs of blocks, with "
        "the standard error of that median and the quartiles of the ratios; the "
        "last column compares the fast blocks (10 % quantiles). Where the control, a "
        "copy of the bare model, is far from 1, the machine was too busy."
    )
    common.write(
        options.out,
        f"step_time_{backend}",
        title=f"Step time in exploration, {backend}",
        body=[about, common.table(header, rows)],
        targets=targets,
        settings={
            "pairs": options.pairs,
            "batch_size": common.BATCH_SIZE,
            "steps": {case.name: case.steps for case in CASES},
        },
        measurements=measured,
    )


if __name__ == "__main__":
    main()
