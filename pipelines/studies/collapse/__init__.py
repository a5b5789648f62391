"""Trained features lose rank; the head's rank and condition at late switches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from matplotlib.axes import Axes

import keras_dalign as kd
from pipelines.studies import sample
from pipelines.studies.claims import Claim
from pipelines.studies.curves import mean_curves
from pipelines.studies.sample import DIGITS, Row, by_seed, effective_rank
from pipelines.studies.settings import check, count, counts, number, numbers

TITLE = "Features lose rank"
PANELS = 2

_SETTINGS = {
    "n": count(2, DIGITS),
    "width": count(1, 10**5),
    "depth": count(1, 100),
    "switches": counts(),
    "noises": numbers(0.0, 1e6),
    "batch_size": count(1, DIGITS),
    "learning_rate": number(1e-12, 1e3),
    "seeds": count(1, 1000),
}


def cells(settings: Mapping[str, Any]) -> list[Row]:
    """A two-phase run for each seed, kind of gates and switch.

    Args:
        settings: `n`, `width`, `depth`, `switches` (epochs of exploration), `noises`
            (for learned gates), `batch_size`, `learning_rate`, `seeds`.

    Returns:
        The cells.

    Raises:
        ValueError: If settings are missing, unknown or out of range.
    """
    check("collapse", settings, _SETTINGS)
    kinds = [("random", 0.0), *(("learned", noise) for noise in settings["noises"])]
    return [
        {"gates": gates, "noise": noise, "seed": seed, "switch": switch}
        for seed in range(settings["seeds"])
        for gates, noise in kinds
        for switch in settings["switches"]
    ]


def measure(settings: Mapping[str, Any], cell: Row) -> list[Row]:
    """Rank of the features, and rank and conditioning of the head, at the switch.

    Args:
        settings: As for `cells`.
        cell: One of them.

    Returns:
        One row: the features' `effective_rank`, and `rank`, `sigma_min` and
        `sigma_max` of the head.

    Raises:
        RuntimeError: If the run ended before its switch.
    """
    x, y = sample.digits(settings["n"], "true", cell["seed"])
    base = sample.network(settings["width"], settings["depth"], cell["seed"])
    model = kd.align(base, n_samples=len(x), gates=cell["gates"], seed=cell["seed"])
    adam = keras.optimizers.Adam(settings["learning_rate"])
    model.compile(
        optimizer=kd.DAlign(
            adam,
            None,
            explore=cell["switch"],
            noise=cell["noise"],
            average_weights=0,
        ),
        loss=sample.loss(),
    )
    # One epoch of exploitation, so that the switch is made.
    model.fit(
        x, y, epochs=cell["switch"] + 1, batch_size=settings["batch_size"], verbose=0
    )
    report = model.switch_report
    if report is None or report.rank is None:
        raise RuntimeError("The model did not reach its rank check.")
    found = report.rank
    return [
        {
            **cell,
            "effective_rank": effective_rank(model.trunk.predict(x, verbose=0)),
            "rank": found.rank,
            "n": found.rows_checked,
            "sigma_min": found.sigma_min,
            "sigma_max": found.sigma_max,
        }
    ]


def claims(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[Claim]:
    """Features and conditioning fall with training, and the head keeps its rank."""
    first, last = min(settings["switches"]), max(settings["switches"])
    random = [
        {**row, "condition": row["sigma_min"] / row["sigma_max"]}
        for row in rows
        if row["gates"] == "random"
    ]

    def ratio(key: str) -> list[float]:
        early = by_seed(random, key, max, lambda row: row["switch"] == first)
        late = by_seed(random, key, max, lambda row: row["switch"] == last)
        return [b / a for a, b in zip(early, late, strict=True)]

    missing = [{**row, "missing": row["n"] - row["rank"]} for row in rows]
    return [
        Claim(
            "effective_rank",
            f"Random gates: the features' effective rank after {last} epochs is below "
            f"0.7 of that after {first}",
            ratio("effective_rank"),
            high=0.7,
        ),
        Claim(
            "conditioning",
            f"Random gates: sigma_min / sigma_max of the head after {last} epochs is "
            f"below 0.5 of that after {first}",
            ratio("condition"),
            high=0.5,
        ),
        Claim(
            "rank",
            "All gates and switches: the head lacks no rank",
            by_seed(missing, "missing", max, lambda _row: True),
            high=0,
        ),
    ]


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
