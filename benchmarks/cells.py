"""Shared gates against separate gates for each output, on the profile `cpu`.

For each data set, with and without augmentation, and each seed, the base model is
trained with the profile's recipe for the epochs of exploration. From there it is solved
with `l2="auto"` twice, with both kinds of gates. Test error, test negative log
likelihood, width and number of gradients are compared in pairs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import keras
import numpy as np

import keras_dalign as kd
from benchmarks import common
from benchmarks.common import Target
from keras_dalign.numerics.losses import SoftmaxCrossEntropy
from pipelines.datasets import Dataset
from pipelines.exploration import Job, objective
from pipelines.optimizers import optimizer
from pipelines.params import Params, Run, load
from pipelines.stream import FollowEpoch

PARAMS = common.ROOT / "profiles" / "cpu" / "params.yaml"
EXPLORE = 0.6
SHARED, OWN = "shared", "own"
# A mean difference of this many standard errors above 0 is allowed as chance.
_ERRORS = 2.0

ABOUT = "Means over {seeds} seeds. Gradients are those of the last minimisation."

Measured = dict[str, Any]


def read(folder: Path, name: str, params: Params) -> Dataset:
    """Random samples of a data set, as many as the profile has."""
    with np.load(folder / f"{name}.npz") as arrays:
        parts = {key: arrays[key] for key in arrays.files}
    size = params.prepare[name]
    rng = np.random.default_rng(size.split_seed)

    def drawn(x: np.ndarray, y: np.ndarray, rows: np.ndarray) -> tuple[Any, Any]:
        images = x[rows].astype("float32")
        images = images / (255 if images.max() > 1 else 1)
        if images.ndim == 3:
            images = images[..., None]
        return images, y[rows].ravel().astype("int64")

    if "x" in parts:
        order = rng.permutation(len(parts["x"]))
        train, test = np.split(order[: size.n_train + size.n_test], [size.n_train])
        rows = [("x", "y", train), ("x", "y", test)]
    else:
        rows = [
            (f"x_{part}", f"y_{part}", rng.permutation(len(parts[f"x_{part}"]))[:count])
            for part, count in (("train", size.n_train), ("test", size.n_test))
        ]
    halves = [drawn(parts[x], parts[y], chosen) for x, y, chosen in rows]
    return Dataset(*halves[0], *halves[1])


def explored(job: Job, folder: Path) -> keras.Model:
    """The base model after the epochs of exploration, from the cache if it is there."""
    file = folder / f"keras-dalign-{job.run.name}.weights.h5"
    model = job.base()
    if file.exists():
        model.load_weights(file)
        return model
    train = job.train
    model.compile(optimizer(job.recipe, job.steps, train.epochs), **objective())
    stream = job.stream()
    model.fit(
        stream,
        epochs=max(1, round(EXPLORE * train.epochs)),
        shuffle=False,
        verbose=0,
        callbacks=[FollowEpoch(stream)],
    )
    model.save_weights(file)
    return model


def solved(job: Job, trunk: keras.Model, kind: str) -> Measured:
    """Solves from the explored trunk with one kind of gates."""
    data = job.data
    n, seed = len(data.x_train), job.run.seed
    shared = kind == SHARED
    model = kd.align(trunk, n_samples=n, seed=seed, share_gates=shared, copy=True)
    loss = objective()["loss"]
    begin = time.perf_counter()
    found = kd.solve(model, data.x_train, data.y_train, loss=loss, l2="auto", verbose=0)
    seconds = time.perf_counter() - begin
    logits = np.asarray(model.predict(data.x_test, batch_size=256, verbose=0), float)
    one_hot = np.eye(data.n_classes)[data.y_test]
    return {
        "error": 100.0 * float(np.mean(logits.argmax(axis=1) != data.y_test)),
        "nll": float(SoftmaxCrossEntropy().value(logits, one_hot).mean()),
        "l2": found.l2,
        "width": found.width,
        "gradients": found.evaluations,
        "gap": found.gap,
        "seconds": seconds,
    }


def measure(options: argparse.Namespace) -> list[Measured]:
    """All cells and seeds."""
    params = load(PARAMS)
    grid, cells = params.grid, []
    for name, augmentation in itertools.product(grid.datasets, grid.augmentations):
        data = read(options.data, name, params)
        for seed in range(options.seeds):
            job = Job.of(Run(name, augmentation, "base", seed), params, data)
            trunk = explored(job, options.cache)
            cell: Measured = {"data": name, "augmentation": augmentation, "seed": seed}
            for kind in (SHARED, OWN):
                cell[kind] = solved(job, trunk, kind)
            cells.append(cell)
            print(json.dumps(cell), flush=True)
    return cells


def differences(cells: list[Measured], key: str) -> list[float]:
    """The value with shared gates minus that with separate ones, for each cell."""
    return [cell[SHARED][key] - cell[OWN][key] for cell in cells]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error, which is NaN for a single value."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return fmean(values), error


def _rows(cells: list[Measured]) -> Iterator[list[str]]:
    groups = itertools.groupby(cells, lambda cell: (cell["data"], cell["augmentation"]))
    for (name, augmentation), group in groups:
        of_cell = list(group)
        row = [name, augmentation]
        for key in ("error", "nll", "gradients", "width", "seconds"):
            digits = {"error": 2, "nll": 3}.get(key, 0)
            row += [
                f"{fmean(cell[kind][key] for cell in of_cell):.{digits}f}"
                for kind in (SHARED, OWN)
            ]
        yield row


def _options(parser: argparse.ArgumentParser) -> None:
    common.add_data_folder(parser, "semeion", "mnist", "cifar10", "cifar100")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="folder for the trained networks",
    )


def main() -> None:
    """Measures, prints and writes the results."""
    options = common.arguments(__doc__, seeds=3, more=_options)
    common.warm_up()
    cells = measure(options)
    error, wrong = mean_and_error(differences(cells, "error"))
    gradients = fmean(
        cell[SHARED]["gradients"] / cell[OWN]["gradients"] for cell in cells
    )
    targets = [
        Target(
            "shared gates: points of test error more than with own ones (allowed: "
            f"{_ERRORS:g} standard errors)",
            error,
            _ERRORS * wrong,
        ),
        Target("shared gates: gradients over those with own ones", gradients, 1.1),
    ]
    pairs = [f"{key}, {kind}" for key in ("error, %", "NLL") for kind in (SHARED, OWN)]
    pairs += [
        f"{key}, {kind}"
        for key in ("gradients", "width", "seconds")
        for kind in (SHARED, OWN)
    ]
    common.write(
        options.out,
        "cells",
        title="Shared gates on the cells of the profile cpu",
        body=[
            ABOUT.format(seeds=options.seeds),
            common.table(["data", "augmentation", *pairs], _rows(cells)),
        ],
        targets=targets,
        settings={"explore": EXPLORE, "profile": "cpu"},
        measurements=cells,
    )


if __name__ == "__main__":
    main()
