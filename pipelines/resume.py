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
    runs = [run for run in params.grid.runs() if not layout.metrics(run).is_file()]
    frontiers = _frontiers_left(params, layout)
    left = [each.dataset for each in (*runs, *frontiers)]
    for dataset in dict.fromkeys([*left, *_tunings_left(params, layout)]):
        if not layout.arrays(dataset).is_file():
            _dvc(root, "repro", f"prepare@{dataset}")
    for base in dict.fromkeys(run.exploration for run in (*runs, *frontiers)):
        cell = f"{base.dataset}-{base.augmentation}-{base.seed}"
        # Where no time was noted, DVC does not take it for done.
        noted = layout.timing(base).is_file()
        if noted and not layout.run(base).is_dir():
            _dvc(root, "repro", "--single-item", f"explore@{cell}")
        methods = [f"evaluate@{cell}-{name}" for name in params.grid.methods]
        _dvc(root, "repro", "--allow-missing", *methods)
    _dvc(root, "repro", "--allow-missing")


def _tunings_left(params: Params, layout: Layout) -> list[str]:
    """The data sets on which a recipe was not tried."""
    return [
        dataset
        for dataset in params.tune.datasets
        for augmentation in params.grid.augmentations
        for recipe in params.tune.recipes
        if not layout.tuning(dataset, augmentation, recipe).is_file()
    ]


def _frontiers_left(params: Params, layout: Layout) -> list[Run]:
    """The base trainings whose frontier was not measured."""
    return [
        Run(dataset, "none", EXPLORATION, seed)
        for dataset in params.frontier.datasets
        for seed in params.grid.seeds
        if not layout.frontier(dataset, seed).is_file()
    ]


def _dvc(folder: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=folder, check=True)


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`."""
    line = parser(__doc__).parse_args(arguments)
    main(params=load(line.params), root=line.root)


if __name__ == "__main__":
    cli()
