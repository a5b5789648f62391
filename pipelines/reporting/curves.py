"""Learning curves: training loss and test error against wall time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from pipelines import figure
from pipelines.reporting.results import BASES, DEFAULT, TIME_REFERENCE, Result, Results


def draw(path: Path, results: Results, dataset: str, augmentation: str) -> None:
    """Draws the median over the seeds and the band from the least to the largest.

    The median, because some seeds' solver ends orders of magnitude below the others'.
    A run of the solver has no epochs after the switch: a straight segment leads from
    the end of its exploration to its final model. Dots are the final models' numbers,
    which differ from the last point of a curve: Keras's loss of an epoch is a mean over
    its steps, in training mode.

    Args:
        path: Where to write the PNG.
        results: The results; what has no wall times is left out.
        dataset: Name of the data set.
        augmentation: Name of the augmentation.
    """
    timed = {
        method: runs
        for method, runs in results.finished(dataset, augmentation).items()
        if results.numbers(dataset, augmentation, method, "seconds")
    }
    with figure.drawing(path, figsize=(10, 5)) as drawing:
        left, right = drawing.subplots(1, 2)
        left.set_yscale("log", nonpositive="mask")
        left.set_title("Training loss")
        right.set_title("Test error, %")
        drawing.suptitle(
            results.heading(dataset, augmentation), x=0.01, ha="left", weight="bold"
        )
        for method, runs in timed.items():
            style = _style(results, method)
            # Methods that only change the trained base share its curve.
            own = method == TIME_REFERENCE or not _shared(timed, method)
            for axes, name in ((left, "train_loss"), (right, "error_rate")):
                _draw(axes, runs, name, style, own=own)
        _limit(right, list(timed.values()))
        for axes in (left, right):
            axes.set_xlabel("wall time, seconds")
            axes.set_xlim(left=0)
        seeds = len(results.params.grid.seeds)
        drawing.legend(
            *left.get_legend_handles_labels(),
            title=f"median and range over {seeds} seed{'s' * (seeds > 1)}; "
            "thick: the solver; dots: the final models, in inference mode",
            loc="outside lower center",
            ncols=min(3, len(timed)),
            fontsize=9,
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
    # Between measured epochs, and at the end, the last value is repeated.
    values = [
        np.asarray(curve[y], float)[
            np.maximum(np.searchsorted(curve[x], epochs, side="right") - 1, 0)
        ]
        for curve in curves
    ]
    return epochs, np.array(values)


def seconds(run: Result, epochs: np.ndarray) -> np.ndarray:
    """The wall times at which epochs ended, spread evenly over each phase.

    Args:
        run: A result with its wall time.
        epochs: Numbers of epochs, from 1, shape `(epochs,)`.

    Returns:
        Seconds since the start, shape `(epochs,)`.
    """
    phases = np.asarray(run.metrics["curves"]["phase"])
    explored, exploited = int((phases == 0).sum()), int((phases > 0).sum())
    # A run without recorded phases is one.
    explore = run.phase("explore") or run.seconds or 0.0
    switch, exploit = run.phase("switch") or 0.0, run.phase("exploit") or 0.0
    if not exploited:
        return explore / explored * epochs
    # The switch takes no epoch: it lies between two of them.
    begin = np.where(epochs > explored, explore + switch, 0.0)
    length = np.where(epochs > explored, exploit / exploited, explore / explored)
    return begin + length * np.where(epochs > explored, epochs - explored, epochs)


def _style(results: Results, method: str) -> dict[str, Any]:
    style: dict[str, Any] = {
        "color": figure.color(method, results.params.grid.methods),
        "label": results.params.label(method),
        "linewidth": 2.2 if method == DEFAULT else 1.5,
    }
    if method in BASES:
        # On top: two-phase runs may lie under the base while they explore.
        style |= {"linestyle": (0, (4, 2)), "zorder": 3}
    return style


def _shared(timed: Mapping[str, Sequence[Result]], method: str) -> bool:
    """Whether a base was made from the training that another base is."""
    curves = [
        [each.metrics["curves"] for each in timed.get(name, [])]
        for name in (TIME_REFERENCE, method)
    ]
    return method in BASES and curves[0] == curves[1]


def _draw(
    axes: Axes,
    runs: Sequence[Result],
    name: str,
    style: Mapping[str, Any],
    *,
    own: bool,
) -> None:
    """The curve with its band, and the final models as a dot that it leads to."""
    scale = 1 if axes.get_yscale() == "log" else 100
    epochs, values = series(runs, name)
    times = np.mean([seconds(each, epochs) for each in runs], axis=0)
    median = np.median(values, axis=0)
    end = float(np.mean([each.seconds for each in runs]))
    final = float(np.median([each.number(name) for each in runs]))
    color = style["color"]
    if own:
        axes.plot(times, scale * median, **style)
        low, high = scale * values.min(axis=0), scale * values.max(axis=0)
        axes.fill_between(times, low, high, color=color, alpha=0.12, linewidth=0)
    if _solved(runs):
        axes.plot(
            [times[-1], end],
            [scale * median[-1], scale * final],
            color=color,
            linewidth=3,
            alpha=0.8,
            solid_capstyle="round",
            zorder=3.5,
        )
    axes.plot(
        end,
        scale * final,
        marker="o",
        markersize=6.5,
        color=color,
        markeredgecolor="white",
        markeredgewidth=0.8,
        zorder=4,
        clip_on=False,
        linestyle="none",
        label=None if own else style["label"],
    )


def _solved(runs: Sequence[Result]) -> bool:
    """Whether the runs exploit without epochs, that is by the solver."""
    return all(
        each.phase("exploit") and not any(each.metrics["curves"]["phase"])
        for each in runs
    )


def _limit(axes: Axes, methods: Sequence[Sequence[Result]]) -> None:
    """The first epochs, at which nothing is learned yet, would hide the rest."""
    late: list[float] = []
    for runs in methods:
        epochs, values = series(runs, "error_rate")
        late += values[:, epochs >= epochs[-1] / 3].ravel().tolist()
        late += [each.number("error_rate") for each in runs]
    low, high = min(late), float(np.quantile(late, 0.97))
    margin = max(0.1 * (high - low), 0.001)
    axes.set_ylim(100 * max(low - margin, 0), 100 * (high + margin))
