"""CIFAR-100, 5,000 samples: two phases against all epochs of the base model.

The cell of the profile `cpu` without augmentation, with its recipe. The base model's 12
epochs and a two-phase run, whose second phase is solved with `l2="auto"`, follow each
other. Each is one call of `fit`. The figure is the median over the seeds of the ratio
of their times.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

import numpy as np

import keras_dalign as kd
from benchmarks import common
from benchmarks.cells import EXPLORE, PARAMS, read
from benchmarks.common import Target
from pipelines.exploration import Job, objective
from pipelines.optimizers import optimizer
from pipelines.params import Run, load

NAME = "cifar100"
BASE, TWO_PHASES = "base", "two phases, solved with L2"


def measure(job: Job) -> dict[str, Any]:
    """Seconds and test errors of the base and of the two-phase run."""
    data, train = job.data, job.train
    found: dict[str, Any] = {"seed": job.run.seed}
    for name in (BASE, TWO_PHASES):
        model: Any = job.base()
        how: Any = optimizer(job.recipe, job.steps, train.epochs)
        if name != BASE:
            model = kd.align(model, n_samples=len(data.x_train), seed=job.run.seed)
            how = kd.DAlign(
                how,
                explore=EXPLORE,
                exploit_optimizer="solve",
                solve_options={"l2": "auto"},
            )
        begin = time.perf_counter()
        model.compile(how, **objective())
        model.fit(
            data.x_train,
            data.y_train,
            batch_size=train.batch_size,
            epochs=train.epochs,
            verbose=0,
        )
        seconds = time.perf_counter() - begin
        logits = model.predict(data.x_test, batch_size=256, verbose=0)
        error = 100.0 * float(np.mean(np.argmax(logits, axis=1) != data.y_test))
        found[name] = {"seconds": seconds, "test error": error}
    return found


def ratio(found: dict[str, Any]) -> float:
    """The time of the two-phase run divided by the base's."""
    return float(found[TWO_PHASES]["seconds"] / found[BASE]["seconds"])


def _options(parser: argparse.ArgumentParser) -> None:
    common.add_data_folder(parser, "cifar100")


def main() -> None:
    """Measures, prints and writes the results."""
    options = common.arguments(__doc__, seeds=3, more=_options)
    common.warm_up()
    params = load(PARAMS)
    data = read(options.data, NAME, params)
    runs = []
    for seed in range(options.seeds):
        runs.append(measure(Job.of(Run(NAME, "none", BASE, seed), params, data)))
        print(json.dumps(runs[-1]), flush=True)
    rows = [
        [
            str(run["seed"]),
            *(f"{run[name]['test error']:.2f}" for name in (BASE, TWO_PHASES)),
            *(f"{run[name]['seconds']:.1f}" for name in (BASE, TWO_PHASES)),
            f"{ratio(run):.2f}",
        ]
        for run in runs
    ]
    header = ["seed"]
    header += [
        f"{what}, {name}"
        for what in ("test error, %", "seconds")
        for name in (BASE, TWO_PHASES)
    ]
    common.write(
        options.out,
        "cifar100",
        title="CIFAR-100: two phases against the base",
        body=[common.table([*header, "ratio"], rows)],
        targets=[Target("two phases / base", median(map(ratio, runs)), 0.75)],
        settings={"explore": EXPLORE, "profile": "cpu"},
        measurements=runs,
    )


if __name__ == "__main__":
    main()
