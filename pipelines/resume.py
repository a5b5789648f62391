"""Runs a profile cell by cell, and goes on where it was killed.

DVC takes stages in any order. Here all methods of one data set, augmentation and seed
follow each other, which makes their times comparable.

It also goes on in a clone that has the results of a profile, but neither data nor runs.
`dvc repro --allow-missing` leaves what is done as it is. But what is not done needs its
data, and the base training of its seed, which `--allow-missing` takes for done. So
these are made again before.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.layout import Layout
from pipelines.params import EXPLORATION, Params, Run, load, parser


def main(*, params: Params | None = None, root: Path = Path()) -> None:
    """Runs what is left of a profile.

    A base training that is made again on the same machine is the same, bit for bit. On
    another one it differs, and DVC runs all methods of its data set and seed again.

    Args:
        params: The parameters; those of params.yaml by default.
        root: The folder of the profile, in which DVC runs.

    Raises:
        subprocess.CalledProcessError: If DVC fails.
    """
    params, layout = params or load(), Layout(root)
    left = _left(params, layout)
    for dataset in dict.fromkeys(run.dataset for run in left):
        if not layout.arrays(dataset).is_file():
            _dvc(root, "repro", f"prepare@{dataset}")
    for base in dict.fromkeys(run.exploration for run in left):
        cell = f"{base.dataset}-{base.augmentation}-{base.seed}"
        # Where no time was noted, DVC does not take it for done.
        noted = layout.timing(base).is_file()
        if noted and not layout.run(base).is_dir():
            _dvc(root, "repro", "--single-item", f"explore@{cell}")
        if base in {run.exploration for run in params.grid.runs()}:
            methods = [f"evaluate@{cell}-{name}" for name in params.grid.methods]
            _dvc(root, "repro", "--allow-missing", *methods)
    _dvc(root, "repro", "--allow-missing")


def _left(params: Params, layout: Layout) -> list[Run]:
    """What has no results yet: runs of the grid, and as such tunings and frontiers."""
    grid, tune, frontier = params.grid, params.tune, params.frontier
    runs = [run for run in grid.runs() if not layout.metrics(run).is_file()]
    # A tuning needs the data alone, so its seed is one that has no base training.
    tunings = [
        Run(dataset, augmentation, EXPLORATION, -1)
        for dataset in tune.datasets
        for augmentation in grid.augmentations
        for recipe in tune.recipes
        if not layout.tuning(dataset, augmentation, recipe).is_file()
    ]
    frontiers = [
        Run(dataset, "none", EXPLORATION, seed)
        for dataset in frontier.datasets
        for seed in grid.seeds
        if not layout.frontier(dataset, seed).is_file()
    ]
    return [*runs, *tunings, *frontiers]


def _dvc(folder: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=folder, check=True)


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`."""
    line = parser(__doc__).parse_args(arguments)
    main(params=load(line.params), root=line.root)


if __name__ == "__main__":
    cli()
