"""The cost of `AlignmentMonitor`, as a share of an epoch.

The monitor runs with its default settings as the first callback. Its time after each
epoch is compared with the time of the epoch's training steps. The models are an MLP on
digits, whose epochs are very short, and ResNet-8 on the first 5,000 training images of
MNIST. Each is measured as a plain model, in exploration with random gates, and in
exploitation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import keras

import keras_dalign as kd
from benchmarks import common, mnist
from benchmarks.common import BASE, EXPLORE, RANDOM, Data, Target

PLAIN, EXPLORING, EXPLOITING = "plain", "exploring", "exploiting"


@dataclass(frozen=True)
class Case:
    """A model and its data.

    Attributes:
        name: The name.
        build: Builds the base model.
        data: The data.
        epochs: Epochs of the plain run, and of exploitation in the two-phase run; at
            least 3.
    """

    name: str
    build: Callable[[], keras.Model]
    data: Data
    epochs: int


class _TimedMonitor(kd.AlignmentMonitor):
    """Records the seconds of each epoch and of the monitor after it."""

    def __init__(self, data: Data) -> None:
        super().__init__(data.x, data.y)
        self.set_up = 0.0
        self.epochs: list[dict[str, Any]] = []
        self._begin = 0.0

    def on_train_begin(self, logs: Any = None) -> None:
        """Times the monitor's set-up."""
        begin = time.perf_counter()
        super().on_train_begin(logs)
        self.set_up = time.perf_counter() - begin

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Starts the clock."""
        self._begin = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Times the epoch and the monitor."""
        begin = time.perf_counter()
        super().on_epoch_end(epoch, logs)
        phase = PLAIN
        if isinstance(self.model, kd.AlignedModel):
            phase = self.model.phase
        self.epochs.append(
            {
                "phase": phase,
                "epoch": begin - self._begin,
                "monitor": time.perf_counter() - begin,
            }
        )


def measure(case: Case) -> dict[str, Any]:
    """Fits a plain and an aligned model with the monitor on.

    Args:
        case: The model and its data.

    Returns:
        For each method the seconds of `fit`, of the monitor's set-up, and of each epoch
        and the monitor after it.
    """
    found = {}
    for method in (BASE, RANDOM):
        model = common.compiled(method, case.build(), len(case.data.x), 0)
        monitor = _TimedMonitor(case.data)
        epochs = case.epochs if method == BASE else round(case.epochs / (1 - EXPLORE))
        seconds = common.timed_fit(
            model, case.data, seed=0, epochs=epochs, callbacks=[monitor]
        )
        found[method] = {
            "fit": seconds,
            "set_up": monitor.set_up,
            "epochs": monitor.epochs,
        }
    return found


def summary(runs: dict[str, Any], phase: str) -> dict[str, float]:
    """The monitor's time in one phase.

    Args:
        runs: From `measure`.
        phase: `PLAIN`, `EXPLORING` or `EXPLOITING`.

    Returns:
        `epoch` and `monitor` (median seconds, without the first epoch of the phase,
        which compiles), `share` (the median of their ratios) and `first` (the monitor's
        seconds after the first epoch).
    """
    epochs = runs[BASE if phase == PLAIN else RANDOM]["epochs"]
    first, *later = [one for one in epochs if one["phase"] == phase]
    return {
        "epoch": median(one["epoch"] for one in later),
        "monitor": median(one["monitor"] for one in later),
        "share": median(one["monitor"] / one["epoch"] for one in later),
        "first": first["monitor"],
    }


def whole_share(run: dict[str, Any]) -> float:
    """The monitor's time in a whole `fit` divided by the rest, compilation included."""
    own = run["set_up"] + sum(one["monitor"] for one in run["epochs"])
    return own / (run["fit"] - own)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=mnist.DATA, help="the MNIST file")


def main() -> None:
    """Measures, prints and writes the results."""
    options = common.arguments(__doc__, more=_options)
    cases = (
        Case("MLP 64-64, digits", lambda: common.mlp(0), common.digits(), 20),
        Case("ResNet-8, MNIST", _resnet, mnist.read(options.data), 5),
    )
    common.warm_up()
    measured = {case.name: measure(case) for case in cases}
    rows, targets, wholes = [], [], []
    for case in cases:
        runs = measured[case.name]
        for phase in (PLAIN, EXPLORING, EXPLOITING):
            found = summary(runs, phase)
            rows.append(
                [
                    f"{case.name}, n = {len(case.data.x):,}",
                    phase,
                    f"{1e3 * found['epoch']:.1f}",
                    f"{1e3 * found['monitor']:.1f}",
                    f"{100 * found['share']:.1f}",
                    f"{1e3 * found['first']:.0f}",
                ]
            )
            if case.name.startswith("ResNet"):
                claim = f"{case.name}, {phase}: the monitor's share of an epoch"
                targets.append(Target(claim, found["share"], 0.05))
        wholes += [
            f"{case.name}, {method}: {100 * whole_share(run):.1f} % of the rest of fit"
            for method, run in runs.items()
        ]
    header = [
        "model",
        "phase",
        "ms an epoch",
        "ms the monitor",
        "share, %",
        "ms after the first epoch",
    ]
    about = (
        f"Default settings, batch size {common.BATCH_SIZE}. Medians over the epochs of "
        "a phase but the first. After the first one the monitor compiles its "
        "functions and, in exploitation, computes what does not change later. An epoch "
        "of the MLP takes some hundredths of a second, so the monitor's share is "
        "large. Its option `every` is for such cases."
    )
    common.write(
        options.out,
        "monitor",
        title="What AlignmentMonitor costs",
        body=[
            about,
            common.table(header, rows),
            "In all, with compilation:",
            common.bullets(wholes),
        ],
        targets=targets,
        settings={
            "batch_size": common.BATCH_SIZE,
            "epochs": {case.name: case.epochs for case in cases},
            "explore": EXPLORE,
        },
        measurements=measured,
    )


def _resnet() -> keras.Model:
    keras.utils.set_random_seed(0)
    return kd.models.resnet(8, (28, 28, 1))


if __name__ == "__main__":
    main()
