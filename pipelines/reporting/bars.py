"""Test error, NLL and wall time of all methods, one panel for each data set."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from pipelines import figure
from pipelines.reporting import comparison
from pipelines.reporting.results import NOT_RECORDED, NOT_RUN, PHASES, Results

_COLUMNS = 3
# From light to dark blue, with the switch, which is short, set off.
_PHASES = {"explore": "#a9c9e2", "switch": "#e69f00", "exploit": "#0072b2"}


def draw_errors(path: Path, results: Results) -> None:
    """Test error with its standard deviation, and every seed as a small dot.

    Args:
        path: Where to write the PNG.
        results: The results.
    """
    _draw_seeds(path, results, "error_rate", "Test error, %")


def draw_nll(path: Path, results: Results) -> None:
    """Test NLL with its standard deviation, and every seed as a small dot.

    Args:
        path: Where to write the PNG.
        results: The results.
    """
    _draw_seeds(path, results, "nll", "NLL of the test labels")


def _draw_seeds(path: Path, results: Results, name: str, title: str) -> None:
    _panels(
        path,
        results,
        functools.partial(_seeds, name=name),
        f"{title}: mean and standard deviation; small dots are seeds.\n"
        f'The band is the mean of "{results.params.label(results.reference)}" ± '
        "one standard error",
    )


def draw_times(path: Path, results: Results) -> None:
    """Wall time by phase, and its ratio to the base's.

    Args:
        path: Where to write the PNG.
        results: The results.
    """
    handles = [Patch(color=_PHASES[name], label=name) for name in PHASES]
    handles[0].set_label("explore, or all of base training")
    _panels(
        path,
        results,
        _times,
        "Wall time in seconds, mean over the seeds, and its ratio to the base's",
        handles,
    )


def _panels(
    path: Path,
    results: Results,
    draw: Callable[[Axes, Results, str, str], None],
    title: str,
    handles: list[Patch] | None = None,
) -> None:
    grid = results.params.grid
    methods = grid.methods
    # A data set of which nothing was run has no panel; with several augmentations, a
    # row is a data set.
    groups = [
        (dataset, augmentation)
        for dataset in grid.datasets
        if any(results.finished(dataset, each) for each in grid.augmentations)
        for augmentation in grid.augmentations
    ]
    several = len(grid.augmentations) > 1
    columns = len(grid.augmentations) if several else min(_COLUMNS, len(groups))
    rows = math.ceil(len(groups) / columns)
    size = (max(7.5, 1.6 + 3.4 * columns), 0.9 + rows * (0.75 + 0.3 * len(methods)))
    with figure.drawing(path, figsize=size) as drawing:
        drawing.suptitle(title, x=0.01, ha="left", fontsize=10, color="#444444")
        panels = drawing.subplots(rows, columns, squeeze=False)
        for index, axes in enumerate(panels.flat):
            if index >= len(groups):
                axes.set_axis_off()
                continue
            # The first method is the uppermost.
            axes.set_ylim(len(methods) - 0.5, -0.5)
            axes.set_yticks(
                range(len(methods)),
                [results.params.label(each) for each in methods]
                if index % columns == 0
                else [""] * len(methods),
            )
            axes.tick_params(axis="y", length=0)
            axes.grid(visible=False, axis="y")
            draw(axes, results, *groups[index])
            heading = results.heading(*groups[index]).rsplit(", ", 1)
            axes.set_title("\n".join(heading), fontsize=9.5)
            if not results.finished(*groups[index]):
                axes.set_xticks([])
            for place, method in enumerate(methods):
                if not results.of(*groups[index], method):
                    _say(axes, place, NOT_RUN)
        if handles:
            drawing.legend(
                handles=handles, loc="outside lower center", ncols=3, frameon=False
            )


def _seeds(
    axes: Axes, results: Results, dataset: str, augmentation: str, *, name: str
) -> None:
    methods = results.params.grid.methods
    for method in results.finished(dataset, augmentation):
        place = methods.index(method)
        color = figure.color(method, methods)
        values = results.numbers(dataset, augmentation, method, name)
        if not values:
            _say(axes, place, NOT_RECORDED)
            continue
        scaled = [100 * each if name == "error_rate" else each for each in values]
        found = comparison.spread(scaled)
        axes.plot(scaled, [place] * len(scaled), ".", color=color, alpha=0.35, ms=5)
        axes.errorbar(
            found.mean,
            place,
            xerr=found.std,
            fmt="o",
            color=color,
            markersize=6,
            capsize=3,
            linewidth=1.6,
        )
        if method == results.reference:
            half = (found.std or 0.0) / math.sqrt(found.n)
            axes.axvline(found.mean, color=color, linewidth=0.8, alpha=0.6, zorder=0)
            axes.axvspan(
                found.mean - half, found.mean + half, color=color, alpha=0.08, zorder=0
            )


def _times(axes: Axes, results: Results, dataset: str, augmentation: str) -> None:
    methods = results.params.grid.methods
    for method, runs in results.finished(dataset, augmentation).items():
        place, start = methods.index(method), 0.0
        for name in PHASES:
            seconds = [each.phase(name) for each in runs]
            known = [each for each in seconds if each is not None]
            if len(known) < len(seconds):
                continue
            width = comparison.spread(known).mean
            axes.barh(place, width, 0.62, left=start, color=_PHASES[name])
            start += width
        totals = [each.seconds for each in runs]
        if not start and None not in totals:
            # Without phases, as recorded of a run that is one.
            start = comparison.spread([each for each in totals if each]).mean
            axes.barh(place, start, 0.62, color=_PHASES["explore"])
        found = results.time_ratio(dataset, augmentation, method)
        axes.annotate(
            NOT_RECORDED if not start else f"{found.value:.2f}" if found else "",
            (start, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color="#444444",
        )
    axes.margins(x=0.16)
    axes.set_xlim(left=0)


def _say(axes: Axes, place: int, text: str) -> None:
    axes.annotate(
        text,
        (0.02, place),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=8.5,
        color="#999999",
        style="italic",
    )
