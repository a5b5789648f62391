"""Stage 3: finish a run by its method, and write its outputs on the data.

The run's folder gets the logits on training and test data, the records by epoch, the
certificate and the provenance. Wall times, which differ in every run, go to a separate
file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras_dalign as kd
from pipelines import datasets, files, methods, provenance, repository
from pipelines.exploration import Exploration, Job, objective, warm_up
from pipelines.layout import Layout
from pipelines.locks import locked
from pipelines.params import Params, Run, load, parser, pick
from pipelines.recording import curves

if TYPE_CHECKING:
    from pipelines.methods import Trained


def main(
    dataset: str,
    augmentation: str,
    method: str,
    seed: int,
    *,
    params: Params | None = None,
    root: Path = Path(),
) -> Path:
    """Finishes one run.

    All methods of a seed start at the same weights and see the same shuffles.

    Args:
        dataset: Name of a prepared data set.
        augmentation: `"none"` or `"standard"`.
        method: Name of a method.
        seed: Seed of weights, shuffles and augmentation.
        params: The parameters; those of params.yaml by default.
        root: The folder of all files.

    Returns:
        The run's folder.
    """
    params, layout = params or load(), Layout(root)
    run = Run(dataset, augmentation, method, seed)
    settings = pick("method", params.methods, method)
    data, description = datasets.read(layout, dataset)
    job = Job.of(run, params, data)
    warm_up()
    with locked(layout.backup(run)):
        trained = methods.finish(
            job,
            settings,
            lambda: Exploration.read(job, layout),
            layout.backup(run),
        )
        made_with = {
            "dataset": dataset,
            "augmentation": augmentation,
            "method": method,
            "seed": seed,
            **datasets.cited(description),
            **provenance.environment(),
        }
        _write(layout, run, job, trained, made_with)
    return layout.run(run)


def _write(
    layout: Layout, run: Run, job: Job, trained: Trained, made_with: dict[str, Any]
) -> None:
    model, data = trained.model, job.data
    certificate = kd.certify(
        model,
        data.x_train,
        data.y_train,
        loss=objective()["loss"],
        l2=trained.l2 or None,
    )
    logits = {
        "train": model.predict(data.x_train, batch_size=256, verbose=0),
        "test": model.predict(data.x_test, batch_size=256, verbose=0),
    }
    history = {
        "curves": curves(trained.epochs),
        "parameters": trained.parameters,
        "l2": trained.l2,
        "temperature": trained.temperature,
        "switch": trained.switch,
    }
    with files.replacing(layout.run(run)) as folder:
        folder.mkdir()
        files.write_arrays(folder / layout.logits(run).name, logits)
        files.write_json(folder / layout.history(run).name, history)
        files.write_json(folder / layout.certificate(run).name, certificate.to_dict())
        files.write_json(folder / layout.provenance(run).name, made_with)
    times = {
        "seconds": sum(trained.phases.values()),
        "phases": trained.phases,
        **repository.code(),
    }
    files.write_json(layout.timing(run), times)


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`."""
    names = ("dataset", "augmentation", "method", "seed")
    line = parser(__doc__, *names).parse_args(arguments)
    main(
        line.dataset,
        line.augmentation,
        line.method,
        line.seed,
        params=load(line.params),
        root=line.root,
    )


if __name__ == "__main__":
    cli()
