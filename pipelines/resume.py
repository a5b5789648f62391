"""Runs what is left of a profile, one data set, augmentation and seed after another.

DVC runs stages in any order. Here all methods of one data set, augmentation and seed
run directly one after another, which makes their times comparable.

It also works in a clone that has the results of a profile, but neither data nor runs.
`dvc repro --allow-missing` runs only what is left. But a run needs its data and the
base training of its seed, and `--allow-missing` counts missing ones as done. So these
are made again first.
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
    frontiers = frontiers_left(params, layout)
    left = [each.dataset for each in (*runs, *frontiers)]
    tuned = [dataset for dataset, *_ in tunings_left(params, layout)]
    for dataset in dict.fromkeys([*left, *tuned]):
        if not layout.arrays(dataset).is_file():
            dvc(root, "repro", f"prepare@{dataset}")
    for base in dict.fromkeys(run.exploration for run in (*runs, *frontiers)):
        cell = f"{base.dataset}-{base.augmentation}-{base.seed}"
        # Without a noted time, it is not done for DVC either.
        noted = layout.timing(base).is_file()
        if noted and not layout.run(base).is_dir():
            dvc(root, "repro", "--single-item", f"explore@{cell}")
        methods = [f"evaluate@{cell}-{name}" for name in params.grid.methods]
        dvc(root, "repro", "--allow-missing", *methods)
    dvc(root, "repro", "--allow-missing")


def tunings_left(params: Params, layout: Layout) -> list[tuple[str, str, str]]:
    """The data set, augmentation and recipe of each tuning without results."""
    return [
        (dataset, augmentation, recipe)
        for dataset in params.tune.datasets
        for augmentation in params.grid.augmentations
        for recipe in params.tune.recipes
        if not layout.tuning(dataset, augmentation, recipe).is_file()
    ]


def frontiers_left(params: Params, layout: Layout) -> list[Run]:
    """The base trainings whose frontier was not measured."""
    return [
        Run(dataset, "none", EXPLORATION, seed)
        for dataset in params.frontier.datasets
        for seed in params.grid.seeds
        if not layout.frontier(dataset, seed).is_file()
    ]


def dvc(folder: Path, *arguments: str) -> None:
    """Runs DVC in a folder.

    Args:
        folder: The folder.
        *arguments: Its arguments.

    Raises:
        subprocess.CalledProcessError: If DVC fails.
    """
    subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=folder, check=True)


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`."""
    line = parser(__doc__).parse_args(arguments)
    main(params=load(line.params), root=line.root)


if __name__ == "__main__":
    cli()
