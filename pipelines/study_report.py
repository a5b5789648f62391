"""Figures and claims of the studies, and which code they were made with."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from pipelines import files, origins, repository
from pipelines.figure import STYLE, write
from pipelines.layout import Layout
from pipelines.studies.settings import FILE, Studies, load


def main(*, studies: Studies | None = None, root: Path = Path()) -> list[Path]:
    """Draws all studies, and writes the numbers that their claims rest on.

    Args:
        studies: Their settings; those of `profiles/studies/params.yaml` by default.
        root: The folder of all files.

    Returns:
        The paths of the figures.
    """
    studies, layout = studies or load(), Layout(root)
    made = {name: [repository.commit_of(layout.study(name))] for name in studies}
    origins.record(layout.code, made, stages(studies))
    write_overview(studies, layout)
    files.write_json(layout.study_metrics, metrics(studies, layout))
    return [draw(name, layout) for name in studies]


def write_overview(studies: Studies, layout: Layout) -> None:
    """Writes what has changed in the code since the studies were made."""
    files.write_text(layout.overview, overview(studies, layout))


def overview(studies: Studies, layout: Layout) -> str:
    """Which code the studies were made with, for the README.

    Args:
        studies: Their settings.
        layout: Where the files are.

    Returns:
        A paragraph.
    """
    found = origins.read(layout.code, stages(studies))
    if found is None:
        return "Code: not recorded.\n"
    return f"Code: {'; '.join(found.commits())}. {found.sentence}\n"


def metrics(studies: Studies, layout: Layout) -> dict[str, Any]:
    """What the claims of the studies rest on.

    Args:
        studies: Their settings.
        layout: Where the files are.

    Returns:
        By study and claim: its statement, the mean over the seeds with an interval, and
        whether the claim was seen.
    """
    found = {}
    for name in studies:
        study = importlib.import_module(f"pipelines.studies.{name}")
        record = files.read_json(layout.study(name), "rows", "settings")
        claims = study.claims(record["rows"], record["settings"])
        found[name] = {claim.name: claim.metrics() for claim in claims}
    return found


def stages(studies: Studies) -> list[list[str]]:
    """The words of the commands that make the studies."""
    return [["study", name] for name in studies]


def draw(name: str, layout: Layout) -> Path:
    """Draws one study.

    Args:
        name: Its name.
        layout: Where the files are.

    Returns:
        The path of the figure.
    """
    study = importlib.import_module(f"pipelines.studies.{name}")
    rows, panels = files.read_json(layout.study(name), "rows")["rows"], study.PANELS
    with mpl.rc_context(STYLE):
        drawing = Figure(figsize=(5.2 * panels, 4.6), layout="constrained")
        axes = list(drawing.subplots(1, panels, squeeze=False)[0])
        study.draw(axes, rows)
        drawing.suptitle(study.TITLE, x=0.01, ha="left", weight="bold")
        drawing.legend(
            *axes[0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=min(3, len(axes[0].lines)),
            frameon=False,
        )
        write(drawing, layout.study_figure(name))
    return layout.study_figure(name)


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`."""
    line = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    line.add_argument("--root", type=Path, default=Path(), help="folder of results")
    line.add_argument("--params", type=Path, default=FILE)
    given = line.parse_args(arguments)
    for path in main(studies=load(given.params), root=given.root):
        print(path)


if __name__ == "__main__":
    cli()
