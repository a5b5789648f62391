"""Curves of the studies: means over the seeds, one line for each group of rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes

from pipelines.figure import COLORS

if TYPE_CHECKING:
    from pipelines.studies.sample import Row


def mean_curves(
    axes: Axes,
    rows: Sequence[Row],
    *,
    x: str,
    y: str,
    by: tuple[str, ...],
    name: Callable[..., str],
    dashed: Callable[..., bool] | None = None,
) -> dict[tuple[Hashable, ...], str]:
    """Draws the mean over the seeds, and the range as a band.

    Args:
        axes: Where.
        rows: The rows of a study.
        x: Key of the abscissa.
        y: Key of the ordinate.
        by: Keys whose values make a group.
        name: What a group is called, given these values.
        dashed: Which groups are dashed; a dashed group has the colour of the group
            that differs in the last key only.

    Returns:
        The colour of each group.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    families = list(dict.fromkeys(key[:-1] if dashed else key for key in groups))
    colors = {}
    for key, members in groups.items():
        family = families.index(key[:-1] if dashed else key)
        color = COLORS[family % len(COLORS)]
        places = sorted({member[x] for member in members})
        values = [[m[y] for m in members if m[x] == place] for place in places]
        style = "--" if dashed and dashed(*key) else "-"
        axes.plot(
            places,
            [float(np.mean(each)) for each in values],
            style,
            color=color,
            label=name(*key),
            marker="o",
            markersize=3,
            linewidth=1.6,
        )
        axes.fill_between(
            places,
            [min(each) for each in values],
            [max(each) for each in values],
            color=color,
            alpha=0.12,
            linewidth=0,
        )
        colors[key] = color
    return colors
