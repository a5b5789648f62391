"""What leaving `AlignmentMonitor` on costs, as a share of an epoch.

Fits with the monitor at its default settings, first in the list of callbacks, and times
what it does after each epoch against the epoch itself: its training steps, from the
epoch's begin to the monitor's turn. An MLP on digits, whose epochs take so little that
nothing may be added to them, and ResNet-8 on the first 5,000 training images of MNIST;
each as a plain model, while random gates explore, and in exploitation.
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
        epochs: Epochs of the plain run and of each phase of the other, at least 3.
    """

    name: str
    build: Callable[[], keras.Model]
    data: Data
    epochs: int


class _TimedMonitor(kd.AlignmentMonitor):
    """Notes what each epoch, and the monitor after it, took in seconds."""

    def __init__(self, data: Data) -> None:
        super().__init__(data.x, data.y)
        self.set_up = 0.0
        self.epochs: list[dict[str, Any]] = []
        self._begin = 0.0

    def on_train_begin(self, logs: Any = None) -> None:
        """Builds what is needed."""
        begin = time.perf_counter()
        super().on_train_begin(logs)
        self.set_up = time.perf_counter() - begin

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """An epoch begins."""
        self._begin = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Adds the entries to the logs."""
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
        For each method the seconds of `fit`, of the monitor's beginning, and of each
        epoch and the monitor after it.
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
    """What the monitor takes in one phase.

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
    """The monitor's share of the rest of a whole `fit`, compilation and all."""
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
        "a phase but the first, after which the monitor compiles what it looks with, "
        "and in exploitation computes what stays the same from there. An epoch of the "
        "MLP takes some hundredths of a second: no look at a model is a small part of "
        "that, and `every` is for such cases."
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
