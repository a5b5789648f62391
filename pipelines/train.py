"""Stage 2: train one run of the grid, and keep what it says about the data.

Writes, into the run's folder, the logits on training and test data, the history, the
certificate and the provenance; and, apart from them, the wall time of `fit`, which
differs in every run.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

import keras_dalign as kd
from pipelines import base_models, datasets, files, methods, provenance
from pipelines.layout import Layout
from pipelines.params import Params, Run, TrainParams, load, parser, pick

if TYPE_CHECKING:
    from pipelines.datasets import Dataset


def main(
    dataset: str,
    method: str,
    seed: int,
    *,
    params: Params | None = None,
    root: Path = Path(),
) -> Path:
    """Trains one run.

    All methods of a seed start at the same weights and see the same shuffles.

    Args:
        dataset: Name of a prepared data set.
        method: Name of a method.
        seed: Seed of weights and shuffles.
        params: The parameters; those of params.yaml by default.
        root: The folder of all files.

    Returns:
        The run's folder.
    """
    params, layout = params or load(), Layout(root)
    run = Run(dataset, method, seed)
    train = pick("data set (under `train`)", params.train, dataset)
    settings = pick("method", params.methods, method)
    data, description = datasets.read(layout, dataset)

    warm_up()
    keras.utils.set_random_seed(seed)
    base = base_models.build(train.model, data.x_train.shape[1:], data.n_classes)
    model = methods.compiled(
        base, settings, train, n_samples=len(data.x_train), seed=seed
    )
    keras.utils.set_random_seed(seed)
    history, seconds = fit(model, data, train)

    x, y = data.x_train, data.y_train
    certificate = kd.certify(model, x, y)
    logits = {
        "train": model.predict(x, batch_size=256, verbose=0),
        "test": model.predict(data.x_test, batch_size=256, verbose=0),
    }
    made_with = {
        "dataset": dataset,
        "method": method,
        "seed": seed,
        "synthetic": description["synthetic"],
        "data_sha256": description["sha256"],
        **provenance.environment(),
    }
    with files.replacing(layout.run(run)) as folder:
        folder.mkdir()
        files.write_arrays(folder / layout.logits(run).name, logits)
        files.write_json(folder / layout.history(run).name, history)
        files.write_json(folder / layout.certificate(run).name, certificate.to_dict())
        files.write_json(folder / layout.provenance(run).name, made_with)
    files.write_json(layout.timing(run), {"seconds": seconds, **provenance.code()})
    return layout.run(run)


def fit(
    model: keras.Model, data: Dataset, train: TrainParams
) -> tuple[dict[str, list[float]], float]:
    """Fits a compiled model, with the test error after every epoch.

    Args:
        model: The model.
        data: The data.
        train: Base training.

    Returns:
        The history by epoch (with `phase` for every model: 0 while exploring), and
        the wall time of `fit` in seconds.
    """
    begin = time.perf_counter()
    history: dict[str, Any] = model.fit(
        data.x_train,
        data.y_train,
        validation_data=(data.x_test, data.y_test),
        epochs=train.epochs,
        batch_size=train.batch_size,
        verbose=0,
    ).history
    seconds = time.perf_counter() - begin
    curves = {name: [float(v) for v in values] for name, values in history.items()}
    curves.setdefault("phase", [0.0] * train.epochs)
    return curves, seconds


@functools.cache
def warm_up() -> None:
    """Fits a throwaway model, so that no run pays for the framework's first step."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer="adam", loss=loss, metrics=["accuracy"])
    x, y = np.zeros((4, 4), "float32"), np.zeros(4, "int64")
    model.fit(x, y, validation_data=(x, y), batch_size=2, verbose=0)


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`."""
    line = parser(__doc__, "dataset", "method", "seed").parse_args(arguments)
    main(line.dataset, line.method, line.seed, params=load(line.params), root=line.root)


if __name__ == "__main__":
    cli()
