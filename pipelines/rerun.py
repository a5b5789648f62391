"""Runs all of a profile again in one process, and records the results with DVC.

`dvc repro` starts a process for each stage, which imports the framework. Here it is
imported once. Afterwards `dvc repro` finds everything up to date.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from pipelines import closure, files, frontier, quickstart, report, tune
from pipelines.layout import Layout
from pipelines.params import Params, load, parser
from pipelines.resume import dvc, frontiers_left, tunings_left

# Stages whose code the results depend on.
_STAGES = ("prepare", "explore", "train", "evaluate", "tune", "frontier")


def main(*, params: Params | None = None, root: Path = Path()) -> None:
    """Runs all stages of a profile, and commits their results to DVC.

    Earlier runs and results are deleted first. If it is killed, the next call goes on
    with the runs that are missing, unless code or parameters have changed since.

    Args:
        params: The parameters; those of params.yaml by default.
        root: The folder of the profile, in which DVC runs.

    Raises:
        subprocess.CalledProcessError: If DVC fails.
    """
    params, layout = params or load(), Layout(root)
    state = _state(params)
    started = layout.rerun
    if not started.is_file() or files.read_json(started) != state:
        for folder in (layout.runs, *layout.measured):
            shutil.rmtree(folder, ignore_errors=True)
        files.write_json(started, state)
    quickstart.run(params, root, skip_evaluated=True)
    for dataset, augmentation, recipe in tunings_left(params, layout):
        keras.utils.clear_session(free_memory=False)
        tune.main(dataset, augmentation, recipe, params=params, root=root)
    for run in frontiers_left(params, layout):
        keras.utils.clear_session(free_memory=False)
        frontier.main(run.dataset, run.seed, params=params, root=root)
    report.main(params=params, root=root)
    # Without a target, DVC would commit the other profiles as well.
    dvc(root, "commit", "--force", "--quiet", "dvc.yaml")
    started.unlink()


def _state(params: Params) -> dict[str, Any]:
    """Code and parameters of the results, as JSON has them."""
    code = closure.digests(closure.on_disk(), [[stage] for stage in _STAGES])
    state: dict[str, Any] = json.loads(
        json.dumps({"code": code, "params": dataclasses.asdict(params)})
    )
    return state


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`."""
    line = parser(__doc__).parse_args(arguments)
    main(params=load(line.params), root=line.root)


if __name__ == "__main__":
    cli()
