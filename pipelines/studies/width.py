"""Alignment against width and depth, for labels that follow the images and others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from matplotlib.axes import Axes

from pipelines.studies import sample
from pipelines.studies.curves import mean_curves
from pipelines.studies.sample import LABELS, Row

TITLE = "Alignment against width"


def run(settings: Mapping[str, Any]) -> list[Row]:
    """Residual and rank of all parameters, before and after training.

    Args:
        settings: `n`, `widths`, `depths`, `epochs`, `learning_rate`, `seeds`.

    Returns:
        A row for each depth, width, seed, kind of labels and moment (`"initial"` or
        `"trained"`, on these labels).
    """
    rows = []
    for depth in settings["depths"]:
        for width in settings["widths"]:
            for seed in range(settings["seeds"]):
                for labels in LABELS:
                    x, y = sample.digits(settings["n"], labels, seed)
                    model = sample.network(width, depth, seed)
                    known = {
                        "depth": depth,
                        "width": width,
                        "seed": seed,
                        "labels": labels,
                    }
                    rows.append(
                        {
                            **known,
                            "when": "initial",
                            **sample.aligned(model, x, y),
                            "loss": sample.training_loss(model, x, y),
                        }
                    )
                    sample.full_batch(
                        model,
                        x,
                        y,
                        optimizer=keras.optimizers.Adam(settings["learning_rate"]),
                        epochs=settings["epochs"],
                    )
                    rows.append(
                        {
                            **known,
                            "when": "trained",
                            **sample.aligned(model, x, y),
                            "loss": sample.training_loss(model, x, y),
                        }
                    )
    return rows


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
