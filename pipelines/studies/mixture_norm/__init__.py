"""Mixture normalisation against batch normalisation, by the updates that they take.

Mahdi Kalayeh and Mubarak Shah (IEEE TPAMI 2019) report that convolutional networks take
31 to 47 % fewer updates with it. One component is batch normalisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from matplotlib.axes import Axes

from pipelines.studies import sample
from pipelines.studies.claims import Claim
from pipelines.studies.curves import mean_curves
from pipelines.studies.mixture_norm.network import KINDS, Errors, adapt, network
from pipelines.studies.sample import DIGITS
from pipelines.studies.settings import check, count, counts, number, numbers

if TYPE_CHECKING:
    from pipelines.studies.sample import Row

TITLE = "Mixture normalisation"
PANELS = 2

_SETTINGS = {
    "n": count(1, DIGITS),
    "validation": count(1, DIGITS),
    "test": count(1, DIGITS),
    "components": counts(1, 100),
    "learning_rates": numbers(1e-6, 1e3),
    "batch_size": count(1, DIGITS),
    "epochs": count(1, 10**4),
    "every": count(1, 10**6),
    "target": number(0, 1),
    "seeds": count(1, 1000),
}


def cells(settings: Mapping[str, Any]) -> list[Row]:
    """A run for each network, number of components, learning rate and seed.

    Args:
        settings: `n`, `validation` and `test` (samples of each draw), `components` (the
            first of which is 1), `learning_rates`, `batch_size`, `epochs`, `every`
            (updates from one measurement to the next), `target` (the share of wrong
            digits that is to be reached), `seeds`.

    Returns:
        The cells.

    Raises:
        ValueError: If a setting has a wrong name or is out of range.
    """
    check("mixture_norm", settings, _SETTINGS)
    drawn = sum(settings[key] for key in ("n", "validation", "test"))
    if drawn > DIGITS:
        raise ValueError(
            f"There are {DIGITS} digits. Received: {drawn} for training, validation "
            "and test"
        )
    if settings["components"][0] != 1:
        raise ValueError(
            "The first of `components` must be 1, batch normalisation, which the "
            "others are compared with. Received: "
            f"components={settings['components']}"
        )
    return [
        {"network": kind, "components": components, "learning_rate": rate, "seed": seed}
        for kind in KINDS
        for seed in range(settings["seeds"])
        for components in settings["components"]
        for rate in settings["learning_rates"]
    ]


def measure(settings: Mapping[str, Any], cell: Row) -> list[Row]:
    """Errors on the validation and the test draw over one training.

    Args:
        settings: As for `cells`.
        cell: One of them.

    Returns:
        A row for each measurement, with `updates` and the shares of wrong digits.
    """
    seed, sizes = cell["seed"], [settings[key] for key in ("n", "validation", "test")]
    x, y = sample.digits(sum(sizes), "true", seed)
    places = np.cumsum(sizes)[:-1]
    images, labels = np.split(x.reshape(-1, 8, 8, 1), places), np.split(y, places)
    model = network(cell["network"], cell["components"], seed)
    adapt(model, images[0][: settings["batch_size"]], seed)
    sgd = keras.optimizers.SGD(cell["learning_rate"], momentum=0.9)
    model.compile(sgd, sample.loss())
    errors = Errors(
        {"validation": (images[1], labels[1]), "test": (images[2], labels[2])},
        settings["every"],
    )
    model.fit(
        images[0],
        labels[0],
        batch_size=settings["batch_size"],
        epochs=settings["epochs"],
        callbacks=[errors],
        verbose=0,
    )
    return [{**cell, **row} for row in errors.rows]


def best(rows: Sequence[Row]) -> list[Row]:
    """The rows of the learning rate with the least mean validation error.

    The mean is over all measurements and seeds: small for what is fast and ends low.

    Args:
        rows: Those of one network and number of components.

    Returns:
        Some of them.
    """
    rates = sorted({row["learning_rate"] for row in rows})
    means = [
        np.mean([row["validation"] for row in rows if row["learning_rate"] == rate])
        for rate in rates
    ]
    rate = rates[int(np.argmin(means))]
    return [row for row in rows if row["learning_rate"] == rate]


def updates_to(rows: Sequence[Row], target: float) -> dict[int, int]:
    """The update at which the test error first reached the target, by seed.

    Args:
        rows: Of one network, number of components and learning rate.
        target: The error.

    Returns:
        Updates; of a run that never reached it, all that it made.
    """
    found = {}
    for seed in sorted({row["seed"] for row in rows}):
        own = [row for row in rows if row["seed"] == seed]
        reached = [row["updates"] for row in own if row["test"] <= target]
        found[seed] = min(reached, default=max(row["updates"] for row in own))
    return found


def claims(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[Claim]:
    """Fewer updates, and no larger error at the end, than batch normalisation."""
    found, target = [], settings["target"]
    for kind in KINDS:
        chosen = {
            components: best(_only(rows, network=kind, components=components))
            for components in settings["components"]
        }
        reached = {key: updates_to(own, target) for key, own in chosen.items()}
        last = {key: _last(own) for key, own in chosen.items()}
        for components in settings["components"][1:]:
            found += [
                Claim(
                    f"updates_{kind}_{components}",
                    f"{kind.capitalize()} network, {components} components over 1: "
                    f"ratio of the updates to a test error of {target:.0%} is below 1",
                    [
                        reached[components][seed] / updates
                        for seed, updates in reached[1].items()
                    ],
                    high=1.0,
                ),
                Claim(
                    f"error_{kind}_{components}",
                    f"{kind.capitalize()} network, {components} components: test error "
                    "at the end, less that of 1, is at most 0.005",
                    [last[components][seed] - error for seed, error in last[1].items()],
                    high=0.005,
                ),
            ]
    return found


def _only(rows: Sequence[Row], **values: Any) -> list[Row]:
    return [
        row for row in rows if all(row[key] == each for key, each in values.items())
    ]


def _last(rows: Sequence[Row]) -> dict[int, float]:
    """The test error at the end, by seed."""
    end = max(row["updates"] for row in rows)
    return {row["seed"]: row["test"] for row in _only(rows, updates=end)}


def draw(axes: Sequence[Axes], rows: Sequence[Row]) -> None:
    """Test error against updates, at the chosen learning rates."""
    for panel, kind in zip(axes, KINDS, strict=True):
        chosen = []
        for components in sorted({row["components"] for row in rows}):
            chosen += best(_only(rows, network=kind, components=components))
        mean_curves(
            panel,
            chosen,
            x="updates",
            y="test",
            by=("components",),
            name=lambda components: (
                "1 component: batch normalisation"
                if components == 1
                else f"{components} components"
            ),
        )
        panel.set_yscale("log")
        panel.set_title(f"{kind} network, each at its best learning rate")
        panel.set_xlabel("updates")
        panel.set_ylabel("share of test digits that are wrong")
