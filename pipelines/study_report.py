"""The figures of the studies of the mechanism."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from pipelines import files
from pipelines.figure import STYLE, write
from pipelines.layout import Layout
from pipelines.study import FILE, Studies, load

_PANELS = {"repeats": 1}


def main(*, studies: Studies | None = None, root: Path = Path()) -> list[Path]:
    """Draws all studies.

    Args:
        studies: Their settings; those of `profiles/studies/params.yaml` by default.
        root: The folder of all files.

    Returns:
        The paths of the figures.
    """
    return [draw(name, Layout(root)) for name in studies or load()]


def draw(name: str, layout: Layout) -> Path:
    """Draws one study.

    Args:
        name: Its name.
        layout: Where the files are.

    Returns:
        The path of the figure.
    """
    study = importlib.import_module(f"pipelines.studies.{name}")
    rows = files.read_json(layout.study(name), "rows")["rows"]
    panels = _PANELS.get(name, 2)
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
