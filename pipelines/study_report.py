"""Stage 6: the figures of the studies of the mechanism."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from pipelines import files
from pipelines.figure import STYLE
from pipelines.layout import Layout
from pipelines.params import Params, load, parser

_PANELS = {"repeats": 1}


def main(*, params: Params | None = None, root: Path = Path()) -> list[Path]:
    """Draws the studies that the parameters name.

    Args:
        params: The parameters; those of params.yaml by default.
        root: The folder of all files.

    Returns:
        The paths of the figures.
    """
    params, layout = params or load(), Layout(root)
    return [draw(name, layout) for name in params.studies]


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
        with files.replacing(layout.study_figure(name)) as path:
            drawing.savefig(path, dpi=160, format="png", metadata={"Software": None})
    return layout.study_figure(name)


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`."""
    line = parser(__doc__).parse_args(arguments)
    for path in main(params=load(line.params), root=line.root):
        print(path)


if __name__ == "__main__":
    cli()
