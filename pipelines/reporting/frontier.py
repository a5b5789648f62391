"""Test error and wall time against the share of epochs that is explored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes

from pipelines import figure
from pipelines.reporting import comparison

if TYPE_CHECKING:
    from pipelines.reporting.results import Results

_PANELS = (
    ("error_rate", "Test error, %", 100.0),
    ("train_loss", "Training loss", 1.0),
    ("seconds", "Wall time, seconds", 1.0),
)


def draw(path: Path, results: Results, dataset: str) -> None:
    """Draws mean and standard deviation over seeds, with the bases as lines.

    Args:
        path: Where to write the PNG.
        results: The results, which have a frontier of this data set.
        dataset: Name of the data set.
    """
    found = results.frontier[dataset]
    method = results.params.frontier.method
    methods = results.params.grid.methods
    with figure.drawing(path, figsize=(10, 3.9)) as drawing:
        panels = drawing.subplots(1, len(_PANELS))
        drawing.suptitle(
            f"{results.title(dataset)}: how much to explore",
            x=0.01,
            ha="left",
            weight="bold",
        )
        for axes, (name, title, scale) in zip(panels, _PANELS, strict=True):
            axes.set_title(title)
            axes.set_xlabel("share of epochs explored")
            axes.set_xlim(0, 1.04)
            if name == "train_loss":
                axes.set_yscale("log", nonpositive="mask")
            # First, for a lone line leaves a logarithmic axis without a range.
            _points(
                axes,
                by_share(found["points"], name, scale),
                figure.color(method, methods) if method in methods else "#0072b2",
                results.params.label(method),
            )
            for base in ("base", "base_bn"):
                rows = found.get(base) or []
                if rows:
                    color = figure.color(base, methods)
                    label = results.params.label(base)
                    _line(
                        axes, [scale * float(row[name]) for row in rows], color, label
                    )
            if name == "seconds":
                axes.set_ylim(bottom=0)
        seeds = len({row["seed"] for row in found["points"]})
        drawing.legend(
            *panels[0].get_legend_handles_labels(),
            title=f"mean ± standard deviation, {seeds} seed{'s' * (seeds > 1)}; "
            "at 1, exploitation comes after the whole base training",
            loc="outside lower center",
            ncols=3,
            frameon=False,
        )


def by_share(
    points: Sequence[Mapping[str, Any]], name: str, scale: float = 1.0
) -> dict[float, list[float]]:
    """A number of all seeds by the share that is explored.

    Args:
        points: Rows with `explore` and the number.
        name: Name of the number.
        scale: What it is multiplied by.

    Returns:
        The numbers by share, shares in increasing order.
    """
    found: dict[float, list[float]] = {}
    for row in sorted(points, key=lambda each: (each["explore"], each["seed"])):
        found.setdefault(float(row["explore"]), []).append(scale * float(row[name]))
    return found


def _line(axes: Axes, values: Sequence[float], color: str, label: str) -> None:
    found = comparison.spread(values)
    axes.axhline(
        found.mean, color=color, linestyle=(0, (4, 2)), linewidth=1.5, label=label
    )
    if found.std:
        axes.axhspan(
            found.mean - found.std,
            found.mean + found.std,
            color=color,
            alpha=0.08,
            linewidth=0,
        )


def _points(
    axes: Axes, values: Mapping[float, Sequence[float]], color: str, label: str
) -> None:
    spreads = {share: comparison.spread(each) for share, each in values.items()}
    axes.errorbar(
        list(spreads),
        [each.mean for each in spreads.values()],
        yerr=[each.std or 0.0 for each in spreads.values()],
        color=color,
        marker="o",
        markersize=5,
        capsize=2.5,
        linewidth=1.7,
        label=label,
    )
