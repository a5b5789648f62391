"""Style and colours of all figures, and how they are written."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from PIL import Image

from pipelines import files

# Okabe and Ito's colours, distinguishable with colour blindness.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# A method has one colour in all figures of all profiles. Base training is grey.
_METHODS = {
    "base": "#8c8c8c",
    "base_bn": "#222222",
    "base_swa": "#5b6b7b",
    "base_temperature": "#8a6d5b",
    "base_short": "#b8b8b8",
    "base_long": "#4d4d4d",
    "dalign": COLORS[0],
    "dalign_better": COLORS[1],
    "letter": COLORS[2],
    "two_phase_random": COLORS[3],
    "solve": COLORS[4],
    "last_layer": COLORS[5],
}
# For methods that are not named above.
_OTHERS = ("#7a5c00", "#6a3d9a", "#8b1a1a", "#00686b")

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.labelcolor": "#222222",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.size": 10,
    "grid.color": "#e6e6e6",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


def color(method: str, methods: Sequence[str]) -> str:
    """The colour of a method.

    Args:
        method: Its name.
        methods: All methods of the grid, in their order.

    Returns:
        The colour, for matplotlib and CSS.
    """
    if method in _METHODS:
        return _METHODS[method]
    unknown = [each for each in methods if each not in _METHODS]
    return _OTHERS[unknown.index(method) % len(_OTHERS)]


@contextmanager
def drawing(path: Path, **settings: Any) -> Iterator[Figure]:
    """Gives a figure that is written if the block raises nothing.

    Args:
        path: Where to write the PNG. The same figure gives the same bytes.
        **settings: What `Figure` takes.

    Yields:
        The figure, empty.
    """
    with mpl.rc_context(STYLE):
        # A Figure without pyplot draws without a window system.
        figure = Figure(layout="constrained", **settings)
        yield figure
        write(figure, path)


def write(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG.

    Of 256 colours, which lines and bars can do with: a third of the bytes. They cover
    all that were drawn, as rare as these are.

    Args:
        figure: The figure.
        path: Where to write it. The same figure gives the same bytes.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=160, format="png")
    with Image.open(drawn) as image:
        few = image.convert("RGB").quantize(
            method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
        )
    with files.replacing(path) as temporary:
        few.save(temporary, format="png", optimize=True)
