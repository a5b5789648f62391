"""Learning curves: training loss and test error against epochs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Curves = Mapping[str, Sequence[float]]

# Okabe and Ito's colours, which the colour-blind can tell apart; the first method, the
# base, is grey, dashed and on top: two-phase runs may lie under it while exploring.
COLORS = ("#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
STYLE = {
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


def draw(
    path: Path,
    title: str,
    curves: Mapping[str, Sequence[Curves]],
    label: Callable[[str], str],
) -> None:
    """Draws the mean over the seeds and the band from the least to the largest.

    Args:
        path: Where to write the PNG.
        title: The name of the data set.
        curves: For each method, the `train_loss`, `error_rate` and `phase` by epoch of
            each seed.
        label: What a method is called.
    """
    with mpl.rc_context(STYLE):
        # A Figure of its own draws without a window system.
        drawing = Figure(figsize=(10, 4.2), layout="constrained")
        left, right = drawing.subplots(1, 2)
        left.set_yscale("log")
        left.set_title(f"{title}: training loss (mean over the epoch)")
        right.set_title(f"{title}: test error, %")
        for index, (method, seeds) in enumerate(curves.items()):
            color = COLORS[index % len(COLORS)]
            style: dict[str, Any] = {"color": color, "label": label(method)}
            if index == 0:
                style |= {"linestyle": (0, (4, 2)), "zorder": 3}
            _band(left, _by_seed(seeds, "train_loss"), style)
            _band(right, 100 * _by_seed(seeds, "error_rate"), style)
        errors = np.concatenate(
            [100 * _by_seed(seeds, "error_rate") for seeds in curves.values()]
        )
        # The first epochs, at which nothing is learned yet, would hide the rest.
        right.set_ylim(0, 1.1 * max(errors[:, errors.shape[1] // 8 :].max(), 1))
        for axes in (left, right):
            axes.set_xlabel("epoch")
            axes.set_xlim(1, max(errors.shape[1], 2))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            _mark_switches(axes, curves)
        drawing.legend(
            *left.get_legend_handles_labels(),
            title=f"mean and range over {max(map(len, curves.values()))} seeds",
            loc="outside lower center",
            ncols=len(curves),
            frameon=False,
        )
        # Without the version of matplotlib, which would only be noise in a diff.
        drawing.savefig(path, dpi=160, format="png", metadata={"Software": None})


def _by_seed(seeds: Sequence[Curves], name: str) -> np.ndarray:
    """One series of all seeds, shape `(seeds, epochs)`."""
    return np.array([seed[name] for seed in seeds])


def _band(axes: Axes, values: np.ndarray, style: Mapping[str, Any]) -> None:
    epochs = np.arange(1, values.shape[1] + 1)
    axes.plot(epochs, values.mean(axis=0), linewidth=1.8, **style)
    axes.fill_between(
        epochs,
        values.min(axis=0),
        values.max(axis=0),
        color=style["color"],
        alpha=0.15,
        linewidth=0,
    )


def _mark_switches(axes: Axes, curves: Mapping[str, Sequence[Curves]]) -> None:
    """A dotted line wherever a run goes from exploration to exploitation."""
    switches = {
        int(np.argmax(np.asarray(seed["phase"]) > 0)) + 0.5
        for seeds in curves.values()
        for seed in seeds
        if max(seed["phase"]) > 0
    }
    for switch in switches:
        axes.axvline(switch, color="#888888", linestyle=":", linewidth=1.2)
        for text, shift, side in (("explore", -4, "right"), ("exploit", 4, "left")):
            axes.annotate(
                text,
                xy=(switch, 1),
                xycoords=("data", "axes fraction"),
                xytext=(shift, -4),
                textcoords="offset points",
                horizontalalignment=side,
                verticalalignment="top",
                color="#666666",
                fontsize=9,
            )
