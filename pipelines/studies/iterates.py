"""Iterates that are aligned converge; those that are not stall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from matplotlib.axes import Axes

import keras_dalign as kd
from pipelines.studies import sample
from pipelines.studies.curves import mean_curves

if TYPE_CHECKING:
    from pipelines.studies.sample import Row

TITLE = "Aligned iterates converge"


def run(settings: Mapping[str, Any]) -> list[Row]:
    """Loss and residual along the training on random labels.

    Args:
        settings: `n`, `widths`, `two_phase_widths` (of those that are trained in two
            phases as well), `depth`, `steps`, `explore` (steps of exploration of the
            two-phase runs), `moments` (how many are looked at), `learning_rate`,
            `seeds`.

    Returns:
        A row for each network and moment.
    """
    rows = []
    for seed in range(settings["seeds"]):
        x, y = sample.digits(settings["n"], "random", seed)
        plans = [(width, False) for width in settings["widths"]]
        plans += [(width, True) for width in settings["two_phase_widths"]]
        for width, two_phases in plans:
            model = sample.network(width, settings["depth"], seed)
            optimizer: Any = keras.optimizers.Adam(settings["learning_rate"])
            if two_phases:
                model = kd.align(model, n_samples=len(x), seed=seed)
                optimizer = kd.DAlign(
                    optimizer, None, explore=settings["explore"], average_weights=0
                )
            name = f"width {width}{', two phases' if two_phases else ''}"
            look = _Look(x, y, settings["steps"], settings["moments"])
            sample.full_batch(
                model,
                x,
                y,
                optimizer=optimizer,
                epochs=settings["steps"],
                callbacks=[look],
            )
            rows += [{"network": name, "seed": seed, **row} for row in look.rows]
    return rows


class _Look(keras.callbacks.Callback):
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
