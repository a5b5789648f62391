"""Alignment against width and depth, for labels that follow the images and others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from matplotlib.axes import Axes

from pipelines.studies import sample
from pipelines.studies.claims import Claim
from pipelines.studies.curves import mean_curves
from pipelines.studies.sample import DIGITS, LABELS, Row, by_seed
from pipelines.studies.settings import check, count, counts, number

TITLE = "Alignment against width"
PANELS = 2

_SETTINGS = {
    "n": count(2, DIGITS),
    "widths": counts(1, 10**5),
    "depths": counts(1, 100),
    "epochs": count(),
    "learning_rate": number(1e-12, 1e3),
    "seeds": count(1, 1000),
}


def cells(settings: Mapping[str, Any]) -> list[Row]:
    """A network for each depth, width, seed and kind of labels.

    Args:
        settings: `n`, `widths`, `depths`, `epochs`, `learning_rate`, `seeds`.

    Returns:
        The cells.

    Raises:
        ValueError: If settings are missing, unknown or out of range.
    """
    check("width", settings, _SETTINGS)
    return [
        {"depth": depth, "width": width, "seed": seed, "labels": labels}
        for depth in settings["depths"]
        for width in settings["widths"]
        for seed in range(settings["seeds"])
        for labels in LABELS
    ]


def measure(settings: Mapping[str, Any], cell: Row) -> list[Row]:
    """Residual and rank of all parameters, before and after training.

    Args:
        settings: As for `cells`.
        cell: One of them.

    Returns:
        A row for each moment: `"initial"`, and `"trained"` on these labels.
    """
    x, y = sample.digits(settings["n"], cell["labels"], cell["seed"])
    model = sample.network(cell["width"], cell["depth"], cell["seed"])
    rows = []
    for when in ("initial", "trained"):
        if when == "trained":
            sample.full_batch(
                model,
                x,
                y,
                optimizer=keras.optimizers.Adam(settings["learning_rate"]),
                epochs=settings["epochs"],
            )
        rows.append(
            {
                **cell,
                "when": when,
                **sample.aligned(model, x, y),
                "loss": sample.training_loss(model, x, y),
            }
        )
    return rows


def claims(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[Claim]:
    """Narrow networks are not aligned with random labels, wide ones with any."""
    narrow, wide = min(settings["widths"]), max(settings["widths"])

    def largest(width: int, labels: Sequence[str]) -> list[float]:
        return by_seed(
            rows,
            "residual",
            max,
            lambda row: (
                row["width"] == width
                and row["labels"] in labels
                and row["when"] == "initial"
            ),
        )

    return [
        Claim(
            "narrow",
            f"Width {narrow}, untrained: the residual of random labels is above 0.1",
            largest(narrow, ["random"]),
            low=0.1,
        ),
        Claim(
            "wide",
            f"Width {wide}, untrained: the residual of any labels is below 1e-6",
            largest(wide, LABELS),
            high=1e-6,
        ),
    ]


def draw(axes: Sequence[Axes], rows: Sequence[Row]) -> None:
    """Residual against width: a panel for the initial network, one after training."""
    deepest = max(row["depth"] for row in rows)
    for panel, when in zip(axes, ("initial", "trained"), strict=True):
        chosen = [row for row in rows if row["when"] == when]
        mean_curves(
            panel,
            chosen,
            x="width",
            y="residual",
            by=("labels", "depth"),
            name=lambda labels, depth: f"{labels} labels, depth {depth}",
            dashed=lambda _labels, depth: depth != deepest,
        )
        panel.set_xscale("log", base=2)
        panel.set_title(f"{when} network")
        panel.set_xlabel("width")
        panel.set_ylabel("residual of alignment")
