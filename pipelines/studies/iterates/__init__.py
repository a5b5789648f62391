"""Iterates that are aligned converge; those that are not stall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from matplotlib.axes import Axes

import keras_dalign as kd
from pipelines.studies import sample
from pipelines.studies.claims import Claim
from pipelines.studies.curves import mean_curves
from pipelines.studies.sample import DIGITS, Row, by_seed
from pipelines.studies.settings import check, count, counts, number

TITLE = "Aligned iterates converge"
PANELS = 2

_SETTINGS = {
    "n": count(2, DIGITS),
    "widths": counts(1, 10**5),
    "two_phase_widths": counts(1, 10**5),
    "depth": count(1, 100),
    "steps": count(),
    "explore": count(),
    "moments": count(),
    "learning_rate": number(1e-12, 1e3),
    "seeds": count(1, 1000),
}


def cells(settings: Mapping[str, Any]) -> list[Row]:
    """A network for each seed, width and number of phases.

    Args:
        settings: `n`, `widths`, `two_phase_widths` (of those that are trained in two
            phases as well), `depth`, `steps`, `explore` (steps of exploration of the
            two-phase runs), `moments` (how many steps are measured), `learning_rate`,
            `seeds`.

    Returns:
        The cells.

    Raises:
        ValueError: If settings are missing, unknown or out of range.
    """
    check("iterates", settings, _SETTINGS)
    plans = [(width, 1) for width in settings["widths"]]
    plans += [(width, 2) for width in settings["two_phase_widths"]]
    return [
        {"width": width, "phases": phases, "seed": seed}
        for seed in range(settings["seeds"])
        for width, phases in plans
    ]


def measure(settings: Mapping[str, Any], cell: Row) -> list[Row]:
    """Loss and residual along the training on random labels.

    Args:
        settings: As for `cells`.
        cell: One of them.

    Returns:
        A row for each moment.
    """
    width, phases, seed = cell["width"], cell["phases"], cell["seed"]
    x, y = sample.digits(settings["n"], "random", seed)
    model = sample.network(width, settings["depth"], seed)
    optimizer: Any = keras.optimizers.Adam(settings["learning_rate"])
    if phases == 2:
        model = kd.align(model, n_samples=len(x), seed=seed)
        optimizer = kd.DAlign(
            optimizer, None, explore=settings["explore"], average_weights=0
        )
    measurements = _Measurements(x, y, settings["steps"], settings["moments"])
    sample.full_batch(
        model,
        x,
        y,
        optimizer=optimizer,
        epochs=settings["steps"],
        callbacks=[measurements],
    )
    name = f"width {width}{', two phases' if phases == 2 else ''}"
    return [{**cell, "network": name, **row} for row in measurements.rows]


def claims(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[Claim]:
    """The network whose iterates are aligned converges, the narrowest one stalls."""
    narrow, wide = min(settings["widths"]), max(settings["widths"])

    def last(key: str, width: int) -> list[float]:
        return by_seed(
            rows,
            key,
            max,
            lambda row: (
                row["width"] == width
                and row["phases"] == 1
                and row["step"] == settings["steps"]
            ),
        )

    return [
        Claim(
            "wide_residual",
            f"Width {wide}: the last iterate's residual is below 1e-6",
            last("residual", wide),
            high=1e-6,
        ),
        Claim(
            "wide_loss",
            f"Width {wide}: the last loss is below 1e-3",
            last("loss", wide),
            high=1e-3,
        ),
        Claim(
            "narrow_residual",
            f"Width {narrow}: the last iterate's residual is above 0.1",
            last("residual", narrow),
            low=0.1,
        ),
        Claim(
            "narrow_loss",
            f"Width {narrow}: the last loss is above 0.1",
            last("loss", narrow),
            low=0.1,
        ),
    ]


class _Measurements(keras.callbacks.Callback):
    """Measures loss and alignment at some steps, denser at the beginning."""

    def __init__(self, x: np.ndarray, y: np.ndarray, steps: int, moments: int) -> None:
        super().__init__()
        self.x, self.y = x, y
        self.moments = {round(step) for step in np.geomspace(1, steps, moments)}
        self.rows: list[Row] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """A step ends."""
        if epoch + 1 in self.moments:
            self.rows.append(
                {
                    "step": epoch + 1,
                    **sample.aligned(self.model, self.x, self.y),
                    "loss": sample.training_loss(self.model, self.x, self.y),
                }
            )


def draw(axes: Sequence[Axes], rows: Sequence[Row]) -> None:
    """Loss and residual against steps, side by side."""
    for panel, key, noun in zip(
        axes,
        ("loss", "residual"),
        ("training loss", "residual of alignment"),
        strict=True,
    ):
        mean_curves(panel, rows, x="step", y=key, by=("network",), name=str)
        panel.set_xscale("log")
        panel.set_title(f"random labels: {noun}")
        panel.set_xlabel("step")
        panel.set_ylabel(noun)
    axes[0].set_yscale("log")
