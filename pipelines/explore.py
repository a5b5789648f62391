"""Stage 2: train the base model, for all methods that start from it.

Writes its weights and their running average at the epochs that `checkpoints` in the
parameters names, and the records by epoch. A killed run continues from its last epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines import datasets, exploration, files, repository
from pipelines.exploration import Job, warm_up
from pipelines.layout import Layout
from pipelines.locks import locked
from pipelines.params import EXPLORATION, Params, Run, load, parser


def main(
    dataset: str,
    augmentation: str,
    seed: int,
    *,
    params: Params | None = None,
    root: Path = Path(),
) -> Path:
    """Trains the base model of a seed.

    Args:
        dataset: Name of a prepared data set.
        augmentation: `"none"` or `"standard"`.
        seed: Seed of weights, shuffles and augmentation.
        params: The parameters; those of params.yaml by default.
        root: The folder of all files.

    Returns:
        The folder of its weights.
    """
    params, layout = params or load(), Layout(root)
    run = Run(dataset, augmentation, EXPLORATION, seed)
    data, _ = datasets.read(layout, dataset)
    job = Job.of(run, params, data)
    warm_up()
    backup = layout.backup(run)
    with locked(backup), files.replacing(layout.run(run)) as folder:
        explored = exploration.explore(
            job, folder, backup, job.train.checkpoints, average=True
        )
        # Wall times differ in every run, and the rest does not.
        none = {"seconds": 0.0, "average_seconds": 0.0}
        entries = [{**entry, **none} for entry in explored.epochs]
        files.write_json(folder / layout.history(run).name, {"epochs": entries})
    exploration.discard(backup)
    times = {
        "epochs": [entry["seconds"] for entry in explored.epochs],
        "average": [entry["average_seconds"] for entry in explored.epochs],
    }
    files.write_json(layout.timing(run), {**times, **repository.code()})
    return layout.run(run)


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`."""
    line = parser(__doc__, "dataset", "augmentation", "seed").parse_args(arguments)
    main(
        line.dataset,
        line.augmentation,
        line.seed,
        params=load(line.params),
        root=line.root,
    )


if __name__ == "__main__":
    cli()
