"""Random labels: the two-phase run's loss keeps falling, whatever the labels are.

An MLP 64-64 is trained on 1,200 of scikit-learn's digits with random labels: batch size
64, Adam 1e-3. All runs are compared after 40 epochs. Then they are continued for the
same number of epochs.
"""

from __future__ import annotations

import argparse
import dataclasses
from itertools import pairwise
from typing import Any

import keras
import numpy as np

import keras_dalign as kd
from benchmarks import common
from benchmarks.common import BASE, LEARNED, RANDOM, Data, Target

# Numbers of epochs. The two-phase run explores for a share of the first, then exploits.
TRACE = (40, 80, 160, 320, 640)
METHODS = (BASE, RANDOM, LEARNED)

Run = dict[str, Any]


def random_labels(data: Data, seed: int) -> Data:
    """The same images, with labels drawn uniformly from the ten classes."""
    y = np.random.default_rng(seed).integers(10, size=len(data.y))
    return dataclasses.replace(data, y=y)


def measure(data: Data, method: str, seed: int, trace: tuple[int, ...]) -> Run:
    """Trains one model and measures its loss after some epochs.

    Args:
        data: The data.
        method: One of `METHODS`.
        seed: Seed of labels, initial weights, shuffles and gates.
        trace: Numbers of epochs after which the loss is measured, ascending.

    Returns:
        Method, seed, losses and seconds of training after each of `trace`.
    """
    keras.utils.clear_session()
    labelled = random_labels(data, seed)
    model = common.compiled(method, common.mlp(seed), len(data.x), seed)
    losses: list[float] = []
    seconds: list[float] = []
    for index, (begin, end) in enumerate(pairwise((0, *trace))):
        # Continued runs need other shuffles.
        elapsed = common.timed_fit(
            model, labelled, seed=seed + 1000 * index, initial_epoch=begin, epochs=end
        )
        losses.append(kd.certify(model, labelled.x, labelled.y).loss)
        seconds.append(elapsed + (seconds[-1] if seconds else 0.0))
    return {"method": method, "seed": seed, "losses": losses, "seconds": seconds}


def targets(by_method: dict[str, list[Run]], trace: tuple[int, ...]) -> list[Target]:
    """The figures that must be shown.

    Args:
        by_method: The runs of each method, seed by seed.
        trace: Where the losses were measured.

    Returns:
        The targets.
    """
    found = []
    for method in (RANDOM, LEARNED):
        runs = by_method[method]
        first = max(
            run["losses"][0] / base["losses"][0]
            for run, base in zip(runs, by_method[BASE], strict=True)
        )
        found.append(
            Target(
                f"{method}: loss after {trace[0]} epochs as a fraction of the base's, "
                "worst seed",
                first,
                1.0,
            )
        )
        if len(trace) > 1:
            falls = max(b / a for run in runs for a, b in pairwise(run["losses"]))
            found.append(
                Target(
                    f"{method}: the loss keeps falling: loss over the one before it in "
                    "the trace, largest of all seeds",
                    falls,
                    1.0,
                )
            )
    return found


def overtaken(by_method: dict[str, list[Run]], trace: tuple[int, ...]) -> list[str]:
    """Numbers of epochs after which the continued base run has the lower loss.

    Args:
        by_method: The runs of each method, seed by seed.
        trace: Where the losses were measured.

    Returns:
        A sentence for each of them.
    """
    losses = {
        method: np.mean([run["losses"] for run in runs], axis=0)
        for method, runs in by_method.items()
    }
    return [
        f"After {epochs} epochs the base run has the lower mean loss: "
        f"{losses[BASE][index]:.3g} against {losses[method][index]:.3g} of {method}."
        for method in (RANDOM, LEARNED)
        for index, epochs in enumerate(trace)
        if losses[BASE][index] < losses[method][index]
    ]


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace", type=int, nargs="+", default=TRACE, help="numbers of epochs"
    )


def main() -> None:
    """Measures, prints and writes the results."""
    options = common.arguments(
        __doc__,
        seeds=3,
        more=_options,
    )
    trace = tuple(options.trace)
    data = common.digits()
    common.warm_up()
    runs = [
        measure(data, method, seed, trace)
        for seed in range(options.seeds)
        for method in METHODS
    ]
    by_method = {
        method: [run for run in runs if run["method"] == method] for method in METHODS
    }
    rows = [
        [
            method,
            *(f"{loss:.3g}" for loss in np.mean([r["losses"] for r in of_method], 0)),
            f"{np.mean([r['seconds'][-1] for r in of_method]):.1f}",
        ]
        for method, of_method in by_method.items()
    ]
    about = (
        "Digits with random labels, MLP 64-64, n = 1,200, batch size "
        f"{common.BATCH_SIZE}, Adam {common.LEARNING_RATE:g}, seeds: "
        f"{options.seeds}; two-phase runs explore for {common.EXPLORE:.0%} of the "
        f"first {trace[0]} epochs. Mean training loss after so many epochs, in "
        "inference mode, sums in float64; wall time of training altogether."
    )
    common.write(
        options.out,
        "random_labels",
        title="Random labels",
        body=[
            about,
            common.table(
                ["method", *(f"{epochs} epochs" for epochs in trace), "seconds"], rows
            ),
            *overtaken(by_method, trace),
        ],
        targets=targets(by_method, trace),
        settings={
            "trace": trace,
            "batch_size": common.BATCH_SIZE,
            "learning_rate": common.LEARNING_RATE,
            "explore": common.EXPLORE,
        },
        measurements=runs,
    )


if __name__ == "__main__":
    main()
