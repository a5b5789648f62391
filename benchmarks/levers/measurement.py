"""Measures all variants on cells of the profile, and keeps what was measured."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

import keras_dalign as kd
from benchmarks.cells import PARAMS
from benchmarks.levers.heads import Measured, finished
from benchmarks.levers.trunks import LOSS, Trunks
from benchmarks.levers.variants import BASE_MODEL, DEFAULT, VARIANTS
from pipelines import datasets, files, prepare
from pipelines.exploration import Job
from pipelines.layout import Layout
from pipelines.optimizers import optimizer
from pipelines.params import Params, Run, load


def read(
    folder: Path, name: str, params: Params, cache: Path
) -> tuple[datasets.Dataset, str]:
    """A data set of the profile, as `pipelines.prepare` makes it, and its hash."""
    size = params.prepare[name]
    root = cache / f"{name}-{size.n_train}-{size.n_test}-{size.split_seed}"
    layout = Layout(root)
    if not layout.description(name).exists():
        prepare.main(name, params=params, root=root, import_from=folder)
    data, description = datasets.read(layout, name)
    return data, description["sha256"]


def _digest(*values: Any) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def measure(
    options: argparse.Namespace, cells: Sequence[tuple[str, str]]
) -> list[Measured]:
    """Measures all variants on some cells.

    Args:
        options: `data`, `cache` and `seeds`.
        cells: Names of data set and augmentation.

    Returns:
        For each cell and seed `data`, `augmentation`, `seed`, and for each variant,
        by name, the result of `finished`.
    """
    params = load(PARAMS)
    found: list[Measured] = []
    for name, of_data in itertools.groupby(cells, lambda cell: cell[0]):
        data, sha256 = read(options.data, name, params, options.cache)
        for (_, augmentation), seed in itertools.product(of_data, range(options.seeds)):
            job = Job.of(Run(name, augmentation, "levers", seed), params, data)
            if not found:
                warm_up(job)
            how = (job.train.model, job.train.epochs, job.train.batch_size, job.augment)
            key = _digest(dataclasses.asdict(job.recipe), how, sha256)
            begin = time.perf_counter()
            rows = _rows(job, options.cache / f"{job.run.name}-{key}")
            found.append(
                {"data": name, "augmentation": augmentation, "seed": seed, **rows}
            )
            errors = ", ".join(
                f"{row} {rows[row]['error']:.2f} %" for row in (BASE_MODEL, DEFAULT)
            )
            spent = time.perf_counter() - begin
            print(f"{job.run.name}: {errors} ({spent:.0f} s)", flush=True)
            keras.utils.clear_session()
    return found


def warm_up(job: Job) -> None:
    """Trains one step and solves once, so that no result includes the first calls."""
    model, size = job.base(), job.train.batch_size
    model.compile(optimizer(job.recipe, job.steps, 1), LOSS)
    x, y = job.data.x_train[:size], job.data.y_train[:size]
    model.fit(x, y, batch_size=size, verbose=0)
    kd.solve(kd.align(model, n_samples=len(x)), x, y, verbose=0)


def _rows(job: Job, folder: Path) -> dict[str, Measured]:
    """The results of all variants, by name: measured now, or read from the cache."""
    trunks, rows = Trunks(job, folder), {}
    for name, variant in VARIANTS.items():
        if variant.passes and job.augment is None:
            continue
        path = folder / f"row-{_digest(dataclasses.asdict(variant))}.json"
        if not path.exists():
            files.write_json(path, finished(job, variant, trunks))
        rows[name] = files.read_json(path, "error", "nll", "seconds")
    return rows
