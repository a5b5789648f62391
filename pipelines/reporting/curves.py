"""Learning curves: training loss and test error against epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pipelines import figure
from pipelines.reporting import tables
from pipelines.reporting.results import BASES, Result, Results


def draw(path: Path, results: Results, dataset: str, augmentation: str) -> None:
    """Draws the median over the seeds and the band from the least to the largest.

    The median, because some seeds' solver ends orders of magnitude below the others'.
    Dots are the final model's numbers, which differ from the last point of a curve:
    Keras's loss of an epoch is a mean over its steps, in training mode.

    Args:
        path: Where to write the PNG.
        results: The results.
        dataset: Name of the data set.
        augmentation: Name of the augmentation.
    """
    finished = results.finished(dataset, augmentation)
    with figure.drawing(path, figsize=(10, 4.6)) as drawing:
        left, right = drawing.subplots(1, 2)
        left.set_yscale("log", nonpositive="mask")
        left.set_title("Training loss")
        right.set_title("Test error, %")
        drawing.suptitle(
            tables.heading(results, dataset, augmentation),
            x=0.01,
            ha="left",
            weight="bold",
        )
        for method, runs in finished.items():
            style = _style(results, method)
            for axes, name in ((left, "train_loss"), (right, "error_rate")):
                _band(axes, *series(runs, name), style)
                _end(axes, runs, name, style["color"])
        _limit(right, list(finished.values()))
        for axes in (left, right):
            axes.set_xlabel("epoch, or iteration of the solver")
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            _mark_switches(axes, finished)
        seeds = len(results.params.grid.seeds)
        drawing.legend(
            *left.get_legend_handles_labels(),
            title=f"median and range over {seeds} seed{'s' * (seeds > 1)}; "
            "dots: the final models, in inference mode",
            loc="outside lower center",
            ncols=min(3, len(finished)),
            frameon=False,
        )


def series(runs: Sequence[Result], name: str) -> tuple[np.ndarray, np.ndarray]:
    """A curve of all seeds at all epochs that one of them has.

    A seed that ended earlier, as the solver may, keeps its last value.

    Args:
        runs: The results of a method.
        name: `"train_loss"` or `"error_rate"` (of the test data).

    Returns:
        The epochs, shape `(epochs,)`, and the values, shape `(seeds, epochs)`.
    """
    curves = [each.metrics["curves"] for each in runs]
    on_test = name == "error_rate"
    x, y = ("test_epoch", "test_error_rate") if on_test else ("epoch", "train_loss")
    epochs = np.unique(np.concatenate([curve[x] for curve in curves]))
    # Between epochs at which it is known, the last value stands, as at the end.
    values = [
        np.asarray(curve[y], float)[
            np.maximum(np.searchsorted(curve[x], epochs, side="right") - 1, 0)
        ]
        for curve in curves
    ]
    return epochs, np.array(values)


def _style(results: Results, method: str) -> dict[str, Any]:
    style: dict[str, Any] = {
        "color": figure.color(method, results.params.grid.methods),
        "label": results.params.label(method),
    }
    if method in BASES:
        # On top: two-phase runs may lie under the base while they explore.
        style |= {"linestyle": (0, (4, 2)), "zorder": 3}
    return style


def _band(
    axes: Axes, epochs: np.ndarray, values: np.ndarray, style: Mapping[str, Any]
) -> None:
    scale = 1 if axes.get_yscale() == "log" else 100
    axes.plot(epochs, scale * np.median(values, axis=0), linewidth=1.7, **style)
    axes.fill_between(
        epochs,
        scale * values.min(axis=0),
        scale * values.max(axis=0),
        color=style["color"],
        alpha=0.12,
        linewidth=0,
    )


def _end(axes: Axes, runs: Sequence[Result], name: str, color: str) -> None:
    """A dot for the median of the final models."""
    epochs, _ = series(runs, name)
    scale = 1 if axes.get_yscale() == "log" else 100
    median = np.median([each.number(name) for each in runs])
    axes.plot(
        epochs[-1],
        scale * median,
        marker="o",
        markersize=5.5,
        color=color,
        markeredgecolor="white",
        markeredgewidth=0.8,
        zorder=4,
        clip_on=False,
    )


def _limit(axes: Axes, methods: Sequence[Sequence[Result]]) -> None:
    """The first epochs, at which nothing is learned yet, would hide the rest."""
    late: list[float] = []
    for runs in methods:
        epochs, values = series(runs, "error_rate")
        late += values[:, epochs >= epochs[-1] / 3].ravel().tolist()
        late += [each.number("error_rate") for each in runs]
    low, high = min(late), float(np.quantile(late, 0.97))
    # Some air above, in which the inscriptions are.
    margin = max(0.15 * (high - low), 0.001)
    axes.set_ylim(100 * max(low - margin, 0), 100 * (high + 2 * margin))


def _mark_switches(axes: Axes, finished: Mapping[str, Sequence[Result]]) -> None:
    """A dotted line wherever runs go from exploration to exploitation."""
    switches: dict[float, int] = {}
    for runs in finished.values():
        for each in runs:
            curve = each.metrics["curves"]
            phase = np.asarray(curve["phase"])
            if phase.max(initial=0) > 0:
                first = int(np.argmax(phase > 0))
                at = float(curve["epoch"][first]) - 0.5
                switches[at] = switches.get(at, 0) + 1
    for switch in switches:
        axes.axvline(switch, color="#999999", linestyle=":", linewidth=1.2, zorder=1)
    if not switches:
        return
    # One inscription is enough: where most runs switch.
    switch = max(switches, key=lambda at: (switches[at], -at))
    for text, shift, side in (("explore", -4, "right"), ("exploit", 4, "left")):
        axes.annotate(
            text,
            xy=(switch, 1),
            xycoords=("data", "axes fraction"),
            xytext=(shift, -3),
            textcoords="offset points",
            horizontalalignment=side,
            verticalalignment="top",
            color="#666666",
            fontsize=9,
        )
