"""The search for the base model's best recipe, on held-out training samples.

A recipe trains the base model. Its error is measured on held-out training samples, with
re-estimated batch-norm statistics. Test data are not used. For large data sets,
`tune.samples` limits the number of samples. `train.DATASET.recipes` in the parameters
has to name the best of `tune.recipes`, which all methods use.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import datasets, exploration, files, methods, provenance, repository
from pipelines.datasets import Samples, sampling
from pipelines.evaluate import error_rate
from pipelines.exploration import Job, warm_up
from pipelines.held_out import held_out
from pipelines.layout import Layout
from pipelines.params import Params, load, parser, pick

if TYPE_CHECKING:
    from pipelines.datasets import Dataset
    from pipelines.params import Tuning

# What is measured for each recipe; the best one is the best for the first of them.
_METHODS = ("base_bn", "base")


def main(
    dataset: str,
    augmentation: str,
    recipe: str,
    *,
    params: Params | None = None,
    root: Path = Path(),
) -> Path:
    """Tries a recipe.

    Args:
        dataset: Name of a prepared data set.
        augmentation: `"none"` or `"standard"`.
        recipe: Name of a recipe.
        params: The parameters; those of params.yaml by default.
        root: The folder of all files.

    Returns:
        The path of the errors.
    """
    params, layout = params or load(), Layout(root)
    tuning, settings = params.tune, pick("recipe", params.recipes, recipe)
    whole, description = datasets.read(layout, dataset)
    train = dataclasses.replace(
        pick("data set (under `train`)", params.train, dataset), checkpoints=(1.0,)
    )
    run = tuning.run(dataset, augmentation, recipe)
    data = held_out(_part(whole, tuning), tuning.validation, tuning.seed)
    warm_up()
    path = layout.tuning(dataset, augmentation, recipe)
    files.write_json(
        path,
        {
            "validation": tuning.validation,
            "samples": len(data.y_train) + len(data.y_test),
            "seed": tuning.seed,
            "errors": _errors(Job(run, data, train, settings), params),
            "provenance": {
                **datasets.cited(description),
                **provenance.environment(),
            },
        },
    )
    # DVC does not hash this file, so it may name the commit.
    files.write_json(layout.timing(run), repository.code())
    return path


def _part(data: Dataset, tuning: Tuning) -> Dataset:
    """The training samples to tune on, drawn by class."""
    wanted = tuning.samples
    if wanted is None or wanted >= len(data.y_train):
        return data
    if wanted < data.n_classes:
        raise ValueError(
            "`tune.samples` must be one for each class at least, or null for all "
            f"samples. Received: {wanted} for {data.n_classes} classes"
        )
    drawn = sampling.draw(Samples(data.x_train, data.y_train), wanted, tuning.seed)
    return dataclasses.replace(data, x_train=drawn.x, y_train=drawn.y)


def _errors(job: Job, params: Params) -> dict[str, float]:
    """The errors on held-out samples of one recipe."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        explored = exploration.explore(
            job, path / "weights", shares=job.train.checkpoints
        )
        found = {}
        for method in _METHODS:
            settings: dict[str, Any] = dict(params.methods[method])
            trained = methods.finish(job, settings, lambda: explored, path / "run")
            logits = trained.model.predict(job.data.x_test, batch_size=256, verbose=0)
            found[method] = error_rate(logits, job.data.y_test)
    return found


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`."""
    line = parser(__doc__, "dataset", "augmentation", "recipe").parse_args(arguments)
    main(
        line.dataset,
        line.augmentation,
        line.recipe,
        params=load(line.params),
        root=line.root,
    )


if __name__ == "__main__":
    cli()
