"""Digits: training loss and test error of the two-phase run and of the base run.

An MLP 64-64 on 1,200 of scikit-learn's digits, 40 epochs, batch size 64, Adam 1e-3.
The base model as Keras trains it is compared with the two-phase runs with random and
with learned gates, at the same number of epochs.
"""

from __future__ import annotations

import argparse
from typing import Any

import keras

from benchmarks import common
from benchmarks.common import BASE, LEARNED, RANDOM, Data, Target

EPOCHS = 40
METHODS = (BASE, RANDOM, LEARNED)

Run = dict[str, Any]


def measure(data: Data, method: str, seed: int, epochs: int) -> Run:
    """Trains and evaluates one model.

    Args:
        data: The data.
        method: One of `METHODS`.
        seed: Seed of initial weights, shuffles and gates.
        epochs: Number of epochs.

    Returns:
        Method, seed, seconds, and the results of `common.evaluation`.
    """
    keras.utils.clear_session()
    model = common.compiled(method, common.mlp(seed), len(data.x), seed)
    seconds = common.timed_fit(model, data, seed=seed, epochs=epochs)
    numbers = common.evaluation(model, data)
    return {"method": method, "seed": seed, "seconds": seconds, **numbers}


def targets(by_method: dict[str, list[Run]]) -> list[Target]:
    """The figures that must be shown.

    Args:
        by_method: The runs of each method, seed by seed.

    Returns:
        The targets.
    """
    base = by_method[BASE]
    found = []
    for method, factor in ((RANDOM, 1.0), (LEARNED, 20.0)):
        runs = by_method[method]
        ratio = common.mean(base, "loss") / common.mean(runs, "loss")
        worst = max(a["loss"] / b["loss"] for a, b in zip(runs, base, strict=True))
        excess = common.mean(runs, "test_error") - common.mean(base, "test_error")
        found += [
            Target(f"{method}: loss over the base's, worst seed", worst, 1.0),
            Target(f"{method}: base's mean loss over it", ratio, factor, True),
            Target(f"{method}: mean test error above the base's, points", excess, 0.3),
        ]
    return found


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=int, default=EPOCHS)


def main() -> None:
    """Measures, prints and writes the results."""
    options = common.arguments(
        __doc__,
        seeds=5,
        more=_options,
    )
    data = common.digits()
    common.warm_up()
    runs = [
        measure(data, method, seed, options.epochs)
        for seed in range(options.seeds)
        for method in METHODS
    ]
    by_method = {
        method: [run for run in runs if run["method"] == method] for method in METHODS
    }
    base_loss = common.mean(by_method[BASE], "loss")
    rows = [
        [
            method,
            f"{common.mean(of_method, 'loss'):.3g}",
            f"{base_loss / common.mean(of_method, 'loss'):.3g}",
            f"{max(run['gap'] for run in of_method):.3g}",
            common.plus_minus(of_method, "test_error"),
            common.plus_minus(of_method, "seconds"),
        ]
        for method, of_method in by_method.items()
    ]
    header = [
        "method",
        "training loss",
        "base's loss / loss",
        "largest gap",
        "test error, %",
        "seconds",
    ]
    about = (
        f"MLP 64-64, 1,200 training and 597 test images, {options.epochs} epochs, "
        f"batch size {common.BATCH_SIZE}, Adam {common.LEARNING_RATE:g}, "
        f"seeds: {options.seeds}. Mean training loss in inference mode, sums in "
        "float64; mean ± standard deviation of test error and of the wall time of "
        "`fit`."
    )
    common.write(
        options.out,
        "digits",
        title="Digits",
        body=[
            about,
            common.table(header, rows),
        ],
        targets=targets(by_method),
        settings={
            "epochs": options.epochs,
            "batch_size": common.BATCH_SIZE,
            "learning_rate": common.LEARNING_RATE,
            "explore": common.EXPLORE,
        },
        measurements=runs,
    )


if __name__ == "__main__":
    main()
