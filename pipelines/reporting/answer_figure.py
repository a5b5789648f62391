"""The answer as a figure: test error, NLL and time against the best base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from pipelines import figure
from pipelines.reporting import answer
from pipelines.reporting.results import DEFAULT, Results
from pipelines.reporting.verdict import limit_of_time

if TYPE_CHECKING:
    from pipelines.reporting.answer import Answer
    from pipelines.reporting.comparison import Estimate

_BASE, _MARGIN = "#555555", "#e4e4e4"
# The value, the lower and the upper limit of its interval, on the scale of a panel.
_Point = tuple[float, float, float]


def draw(path: Path, results: Results) -> None:
    """Draws, in every cell, the modes against the best base of equal time.

    Args:
        path: Where to write the PNG.
        results: The results, with an answer in one cell at least.
    """
    modes = answer.modes(results)
    found = {mode: answer.known(results, mode) for mode in modes}
    cells = [
        cell
        for cell in results.groups()
        if any(cell == each.cell for mode in modes for each in found[mode])
    ]
    panels: tuple[tuple[str, float, Callable[[Answer], _Point | None]], ...] = (
        ("Test error: difference, points", 0.0, lambda each: _scaled(each.error, 100)),
        ("NLL: difference, %", 0.0, lambda each: _relative_nll(results, each)),
        ("Wall time / base", 1.0, lambda each: _scaled(each.time, 1)),
    )
    with figure.drawing(path, figsize=(11, 1.7 + 0.75 * len(cells))) as drawing:
        drawing.suptitle(
            "Ours against the best base of equal time: left of the line is better",
            x=0.01,
            ha="left",
            weight="bold",
        )
        columns = drawing.subplots(1, len(panels), width_ratios=(5, 3.4, 3))
        for axes, (title, base, point) in zip(columns, panels, strict=True):
            axes.set_title(title)
            values = [base]
            axes.axvline(base, color=_BASE, linewidth=1.4, zorder=1)
            for k, mode in enumerate(modes):
                shift = 0.34 * (k - (len(modes) - 1) / 2)
                at = {cells.index(each.cell) + shift: each for each in found[mode]}
                points = {y: point(each) for y, each in at.items()}
                _points(axes, points, figure.color(mode, modes))
                values += [each[0] for each in points.values() if each]
            # Wide intervals leave the panel, or their ends would hide the rest.
            air = 0.3 * (max(values) - min(values)) or 0.5
            axes.set_xlim(min(values) - air, max(values) + air)
            _rows(axes, len(cells))
        errors, nll, times = columns
        errors.set_yticks(
            range(len(cells)),
            ["\n".join(results.heading(*cell).rsplit(", ", 1)) for cell in cells],
        )
        for axes in (errors, nll):
            form = FuncFormatter(lambda x, _: f"{x:+g}" if x else "0")
            axes.xaxis.set_major_formatter(form)
        _margins(errors, cells)
        _limits(times, cells)
        _numbers(errors, results, found, cells)
        drawing.legend(
            handles=_legend(modes),
            loc="outside lower center",
            ncols=3,
            frameon=False,
        )


def _scaled(found: Estimate | None, scale: float) -> _Point | None:
    """An estimate on the scale of a panel; without an interval it is a point."""
    if found is None:
        return None
    low = found.value if found.low is None else found.low
    high = found.value if found.high is None else found.high
    return scale * found.value, scale * low, scale * high


def _relative_nll(results: Results, each: Answer) -> _Point | None:
    """The difference in NLL in % of the base's."""
    if each.nll_base is None:
        return None
    base = fmean(results.numbers(*each.cell, each.nll_base, "nll"))
    return _scaled(each.nll, 100 / base)


def _points(axes: Axes, points: Mapping[float, _Point | None], color: str) -> None:
    for y, point in points.items():
        if point is not None:
            value, low, high = point
            axes.plot([low, high], [y, y], color=color, linewidth=1.6, alpha=0.55)
            axes.plot(
                value,
                y,
                marker="o",
                markersize=8.5,
                color=color,
                markeredgecolor="white",
                zorder=3,
            )


def _rows(axes: Axes, n: int) -> None:
    """One row a cell, the first uppermost."""
    axes.set_ylim(n - 0.5, -0.5)
    axes.set_yticks(range(n), [""] * n)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    for y in range(1, n):
        axes.axhline(y - 0.5, color="#cccccc", linewidth=0.8, zorder=0.5)


def _margins(axes: Axes, cells: Sequence[tuple[str, str]]) -> None:
    low, high = axes.get_xlim()
    for y, (dataset, _) in enumerate(cells):
        margin = 100 * answer.margin(dataset)
        axes.fill_betweenx([y - 0.5, y + 0.5], -margin, margin, color=_MARGIN, zorder=0)
        low, high = min(low, -1.15 * margin), max(high, 1.15 * margin)
    axes.set_xlim(low, high)


def _limits(axes: Axes, cells: Sequence[tuple[str, str]]) -> None:
    """A tick where the default's time should end."""
    for y, (_, augmentation) in enumerate(cells):
        limit = limit_of_time(augmentation)
        axes.plot([limit] * 2, [y - 0.45, y + 0.45], color=_BASE, ls=":", lw=1.4)


def _numbers(
    axes: Axes,
    results: Results,
    found: Mapping[str, Sequence[Answer]],
    cells: Sequence[tuple[str, str]],
) -> None:
    """The test errors themselves, beside each row."""
    modes = list(found)
    for k, mode in enumerate(modes):
        for each in found[mode]:
            axes.annotate(
                answer.errors(results, each) + " %",
                (1.01, cells.index(each.cell) + 0.34 * (k - (len(modes) - 1) / 2)),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=9,
                color=figure.color(mode, modes),
            )


def _legend(modes: Sequence[str]) -> list[Line2D | Patch]:
    handles: list[Line2D | Patch] = [
        Line2D(
            [],
            [],
            marker="o",
            markersize=8,
            color=figure.color(mode, modes),
            label=f"{answer.MODES[mode][1].strip('`')}, with its 95 % interval",
        )
        for mode in modes
    ]
    handles.append(Line2D([], [], color=_BASE, lw=1.4, label="the base"))
    handles.append(Patch(color=_MARGIN, label="within the margin: no worse"))
    if DEFAULT in modes:
        label = "most time allowed to the default"
        handles.append(Line2D([], [], color=_BASE, ls=":", lw=1.4, label=label))
    return handles
