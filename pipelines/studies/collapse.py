"""Trained features lose rank; what a late switch and the noise make of the head."""

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

TITLE = "Features lose rank"


def run(settings: Mapping[str, Any]) -> list[Row]:
    """Rank of the features, and rank and conditioning of the head, at each switch.

    Args:
        settings: `n`, `width`, `depth`, `switches` (epochs of exploration), `noises`
            (for learned gates), `batch_size`, `learning_rate`, `seeds`.

    Returns:
        A row for each seed, kind of gates (with its noise) and switch: the features'
        `effective_rank` (the exponential of the entropy of their centred singular
        values' squares), and `rank`, `sigma_min` and `sigma_max` of the head.

    Raises:
        RuntimeError: If a run ended before its switch.
    """
    kinds = [("random", 0.0), *(("learned", noise) for noise in settings["noises"])]
    rows = []
    for seed in range(settings["seeds"]):
        x, y = sample.digits(settings["n"], "true", seed)
        for gates, noise in kinds:
            for switch in settings["switches"]:
                base = sample.network(settings["width"], settings["depth"], seed)
                model = kd.align(base, n_samples=len(x), gates=gates, seed=seed)
                adam = keras.optimizers.Adam(settings["learning_rate"])
                model.compile(
                    optimizer=kd.DAlign(
                        adam, None, explore=switch, noise=noise, average_weights=0
                    ),
                    loss=sample.loss(),
                )
                # One epoch of exploitation, so that the switch is made.
                model.fit(
                    x,
                    y,
                    epochs=switch + 1,
                    batch_size=settings["batch_size"],
                    verbose=0,
                )
                report = model.switch_report
                if report is None or report.rank is None:
                    raise RuntimeError("The model did not reach its rank check.")
                found = report.rank
                rows.append(
                    {
                        "gates": gates,
                        "noise": noise,
                        "seed": seed,
                        "switch": switch,
                        "effective_rank": effective_rank(
                            model.trunk.predict(x, verbose=0)
                        ),
                        "rank": found.rank,
                        "n": found.rows_checked,
                        "sigma_min": found.sigma_min,
                        "sigma_max": found.sigma_max,
                    }
                )
    return rows


def effective_rank(features: np.ndarray) -> float:
    """The exponential of the entropy of the normalised squared singular values."""
    centred = features.astype("float64") - features.mean(axis=0, dtype="float64")
    squares = np.linalg.svd(centred, compute_uv=False) ** 2
    shares = squares[squares > 0] / squares.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def draw(axes: Sequence[Axes], rows: Sequence[Row]) -> None:
    """Effective rank of the features, and the head's conditioning, at each switch."""

    def name(gates: str, noise: float) -> str:
        return f"{gates} gates" + (f", noise {noise:g}" if gates == "learned" else "")

    for panel, key, noun in zip(
        axes,
        ("effective_rank", "conditioning"),
        ("effective rank of the features", "sigma_min / sigma_max of the head"),
        strict=True,
    ):
        ratios = [
            {**row, "conditioning": row["sigma_min"] / row["sigma_max"]} for row in rows
        ]
        mean_curves(panel, ratios, x="switch", y=key, by=("gates", "noise"), name=name)
        panel.set_xscale("log")
        panel.set_xlabel("epochs before the switch")
        panel.set_ylabel(noun)
        panel.set_title(noun)
    axes[1].set_yscale("log")
