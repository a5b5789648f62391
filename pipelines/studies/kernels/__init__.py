"""Kernels that approximate wide networks or predict their training.

Random features of the tangent kernel (Zandieh, Han, Avron, Shoham, Kim, Shin, NeurIPS
2021), the kernel with a weight for each layer (Tan, Wu, Zhou, Huang 2023), orthogonal
initial weights (Huang, Du, Xu 2021) and recurrent networks (Alemohammad, Wang,
Balestriero, Baraniuk, ICLR 2021). Each comes with a distance that should fall like the
inverse root of a width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from pipelines.studies.claims import Claim
from pipelines.studies.curves import mean_curves
from pipelines.studies.kernels import (
    kernel_weights,
    layer_rates,
    network,
    random_features,
    recurrent,
)
from pipelines.studies.sample import DIGITS, Row, slope
from pipelines.studies.settings import check, count, counts, number, numbers

TITLE = "Kernels of wide networks"
PANELS = 4

_MEASURES = {
    "features": random_features.measure,
    "rates": layer_rates.measure,
    "search": kernel_weights.measure,
    "network": network.measure,
    "recurrent": recurrent.measure,
}
_SETTINGS = {
    "feature_samples": count(2, DIGITS),
    "feature_depths": counts(1, 10),
    "feature_dimensions": counts(2, 2**14),
    "feature_draws": count(1, 1000),
    "ridge": number(1e-12, 1e3),
    "network_samples": count(1, DIGITS),
    "network_depth": count(1, 10),
    "network_widths": counts(1, 2**14),
    "recurrent_widths": counts(1, 2**14),
    "outputs": count(1, 100),
    "rate_samples": count(1, DIGITS // 2),
    "rate_widths": counts(1, 2**14),
    # Gradient descent diverges beyond 2.
    "rate": number(1e-6, 1.999),
    "rate_steps": count(1, 10**6),
    "layer_rates": numbers(1e-6, 1e6),
    "search_samples": count(1, DIGITS),
    "search_tested": count(1, DIGITS),
    "search_width": count(1, 2**14),
    "search_depth": count(1, 10),
    "ridges": numbers(1e-12, 1e3),
    "seeds": count(1, 1000),
}
# Slopes of an error that falls like the root, as they were expected beforehand.
_ROOT = {"low": -0.65, "high": -0.35}


def cells(settings: Mapping[str, Any]) -> list[Row]:
    """For each seed: random features by depth, networks by width, and one search.

    Args:
        settings: Of random features: `feature_samples`, `feature_depths`,
            `feature_dimensions`, `feature_draws` and `ridge` (of the spectral error,
            over the kernel's mean eigenvalue). Of networks against their limits:
            `network_samples`, `network_depth`, `network_widths`, `recurrent_widths`,
            `outputs`. Of rates by layer: `rate_samples`, `rate_widths`, `rate_steps`,
            `rate` (over that at which the largest eigenvalue is gone in one step),
            `layer_rates` (one for each layer). Of the search for weights:
            `search_samples` (of the training and the validation draw), `search_tested`,
            `search_width`, `search_depth`, `ridges`. And `seeds`.

    Returns:
        The cells.

    Raises:
        ValueError: If a setting has a wrong name or is out of range.
    """
    check("kernels", settings, _SETTINGS)
    odd = [each for each in settings["feature_dimensions"] if each % 2]
    if odd:
        raise ValueError(
            "`feature_dimensions` must be even: a sketch has real and imaginary parts. "
            f"Received: {odd}"
        )
    drawn = 2 * settings["search_samples"] + settings["search_tested"]
    if drawn > DIGITS:
        raise ValueError(
            f"There are {DIGITS} digits. Received: {drawn} for training, validation "
            "and test of the search"
        )
    found: list[Row] = []
    for seed in range(settings["seeds"]):
        found += [
            {"kind": "features", "depth": depth, "seed": seed}
            for depth in settings["feature_depths"]
        ]
        found += [
            {"kind": "rates", "width": width, "seed": seed}
            for width in settings["rate_widths"]
        ]
        found += [
            {
                "kind": "network",
                "initializer": initializer,
                "width": width,
                "seed": seed,
            }
            for width in settings["network_widths"]
            for initializer in network.INITIALIZERS
        ]
        found += [
            {"kind": "recurrent", "width": width, "seed": seed}
            for width in settings["recurrent_widths"]
        ]
        found.append({"kind": "search", "seed": seed})
    return found


def measure(settings: Mapping[str, Any], cell: Row) -> list[Row]:
    """Measures one cell, by the module of its kind.

    Args:
        settings: As for `cells`.
        cell: One of them.

    Returns:
        The rows of that module.
    """
    return _MEASURES[cell["kind"]](settings, cell)


def claims(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[Claim]:
    """Errors fall like the root of the width; what leverage scores and weights gain."""
    fall = "has slope -0.65 to -0.35"
    found = [
        Claim(
            f"features_{depth}_{'_'.join(method.replace(',', '').split())}",
            f"Random features, hidden layers: {depth}, {method}: error against "
            f"dimension {fall}",
            _slopes(rows, "dimension", kind="features", depth=depth, method=method),
            **_ROOT,
        )
        for depth in settings["feature_depths"]
        for method in random_features.METHODS
    ]
    found += [
        Claim(
            f"leverage_{error}_{depth}",
            f"Leverage scores over plain, hidden layers: {depth}: ratio of the {norm} "
            "errors, geometric mean over the dimensions, is below 1",
            _ratios(
                rows,
                error,
                {"kind": "features", "depth": depth, "method": "leverage scores"},
                {"kind": "features", "depth": depth, "method": "plain"},
            ),
            high=1.0,
        )
        for depth in settings["feature_depths"]
        for error, norm in (("error", "Frobenius"), ("spectral", "spectral"))
    ]
    widest = {"kind": "rates", "width": max(settings["rate_widths"])}
    found += [
        Claim(
            "rates",
            "Prediction of training with rates by layer: error against width has slope "
            "-0.35 or less",
            _slopes(rows, "width", kind="rates"),
            high=-0.35,
        ),
        Claim(
            "rates_weighted",
            "The same at the largest width: error of the weighted kernel over that of "
            "the unweighted one is below 0.5",
            [row["error"] / row["unweighted"] for row in _only(rows, **widest)],
            high=0.5,
        ),
    ]
    found += [
        Claim(
            f"network_{initializer}",
            f"Networks, {initializer} weights: distance from the limit against width "
            f"{fall}",
            _slopes(rows, "width", kind="network", initializer=initializer),
            **_ROOT,
        )
        for initializer in network.INITIALIZERS
    ]
    found += [
        Claim(
            f"recurrent_{lengths}",
            f"Recurrent networks, {lengths} lengths: distance from the limit against "
            f"width {fall}",
            _slopes(rows, "width", kind="recurrent", lengths=lengths),
            **_ROOT,
        )
        for lengths in recurrent.LENGTHS
    ]
    found += [
        Claim(
            f"search_{error}",
            f"Searched over equal weights of the layers: ratio of the {noun} is below "
            "1",
            _ratios(
                rows,
                error,
                {"kind": "search", "weights": "searched"},
                {"kind": "search", "weights": "equal"},
            ),
            high=1.0,
        )
        for error, noun in (
            ("validation", "squared errors on the validation draw"),
            ("test", "squared errors on the test draw"),
        )
    ]
    return found


def _only(rows: Sequence[Row], **values: Any) -> list[Row]:
    """The rows with these values, in the order of their seeds."""
    chosen = [
        row
        for row in rows
        if all(row.get(key) == value for key, value in values.items())
    ]
    return sorted(chosen, key=lambda row: row["seed"])


def _slopes(rows: Sequence[Row], x: str, **values: Any) -> list[float]:
    """The slope of each seed's errors over `x`, in log-log."""
    chosen = _only(rows, **values)
    return [
        slope([row[x] for row in own], [row["error"] for row in own])
        for _, group in groupby(chosen, key=itemgetter("seed"))
        for own in [list(group)]
    ]


def _ratios(
    rows: Sequence[Row], key: str, above: Mapping[str, Any], below: Mapping[str, Any]
) -> list[float]:
    """For each seed, the geometric mean of the ratio of some rows to others."""
    logarithms: dict[int, list[float]] = {}
    for one, other in zip(_only(rows, **above), _only(rows, **below), strict=True):
        logarithms.setdefault(one["seed"], []).append(math.log(one[key] / other[key]))
    return [math.exp(float(np.mean(each))) for each in logarithms.values()]


def draw(axes: Sequence[Axes], rows: Sequence[Row]) -> None:
    """Errors against dimension or width, with the slope -1/2 dotted."""
    features = [row for row in rows if row["kind"] == "features"]
    deepest = max(row["depth"] for row in features)
    mean_curves(
        axes[0],
        features,
        x="dimension",
        y="error",
        by=("method", "depth"),
        name=lambda method, depth: f"{method}, hidden layers: {depth}",
        dashed=lambda _method, depth: depth != deepest,
    )
    mean_curves(
        axes[1],
        [
            {**row, "kernel": kernel, "error": row[key]}
            for row in _only(rows, kind="rates")
            for kernel, key in (("weighted", "error"), ("unweighted", "unweighted"))
        ],
        x="width",
        y="error",
        by=("kernel",),
        name=lambda kernel: f"{kernel} kernel",
    )
    mean_curves(
        axes[2],
        _only(rows, kind="network"),
        x="width",
        y="error",
        by=("initializer",),
        name=lambda initializer: f"{initializer} weights",
    )
    mean_curves(
        axes[3],
        _only(rows, kind="recurrent"),
        x="width",
        y="error",
        by=("lengths",),
        name=lambda lengths: f"{lengths} lengths",
    )
    for panel, title, x, y in zip(
        axes,
        (
            "random features of the tangent kernel",
            "training with rates by layer",
            "initial weights",
            "recurrent networks",
        ),
        ("features per layer", "width", "width", "width"),
        (
            "relative error of the kernel",
            "error of the prediction / change of the outputs",
            "relative distance from the limit kernel",
            "relative distance from the limit kernel",
        ),
        strict=True,
    ):
        line = panel.lines[0]
        ends = np.asarray(line.get_xdata())[[0, -1]]
        start = float(np.asarray(line.get_ydata())[0])
        root = start * (ends / ends[0]) ** -0.5
        panel.plot(ends, root, ":", color="#666666", label="slope -1/2")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_title(title)
        panel.set_xlabel(x)
        panel.set_ylabel(y)
    for panel in axes[1:]:
        panel.legend(frameon=False)
