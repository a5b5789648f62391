"""When widening helps, and when it does not: images that come with two labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from pipelines.studies import sample
from pipelines.studies.claims import Claim
from pipelines.studies.curves import mean_curves
from pipelines.studies.sample import DIGITS, Row, by_seed
from pipelines.studies.settings import check, count, counts, numbers

TITLE = "When widening does not help"
PANELS = 1

_SETTINGS = {
    "n": count(2, DIGITS),
    "widths": counts(1, 10**5),
    "depth": count(1, 100),
    "shares": numbers(0.0, 0.5),
    "seeds": count(1, 1000),
}


def cells(settings: Mapping[str, Any]) -> list[Row]:
    """A network for each share of repeated images, width and seed.

    Args:
        settings: `n`, `widths`, `depth`, `shares` (of repeated images), `seeds`.

    Returns:
        The cells.

    Raises:
        ValueError: If settings are missing, unknown or out of range.
    """
    check("repeats", settings, _SETTINGS)
    return [
        {"share": share, "width": width, "seed": seed}
        for share in settings["shares"]
        for width in settings["widths"]
        for seed in range(settings["seeds"])
    ]


def measure(settings: Mapping[str, Any], cell: Row) -> list[Row]:
    """Residual of an initial network on data with and without conflicts.

    A share of the images is repeated in place of others, with another label. No
    function of the images can give both. The least residual is known: the norm of `Y_l`
    minus its means over equal images, relative to that of `Y_l`.

    Args:
        settings: As for `cells`.
        cell: One of them.

    Returns:
        One row, with the residual and its `floor`.
    """
    x, y = with_conflicts(settings["n"], cell["share"], cell["seed"])
    model = sample.network(cell["width"], settings["depth"], cell["seed"])
    return [{**cell, **sample.aligned(model, x, y), "floor": floor(x, y)}]


def claims(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[Claim]:
    """Wide networks reach the floor that the conflicts set."""
    wide = max(settings["widths"])
    above = [{**row, "above": row["residual"] - row["floor"]} for row in rows]
    return [
        Claim(
            "floor",
            f"Width {wide}: the residual is the floor of the data, to 1e-6",
            by_seed(above, "above", max, lambda row: row["width"] == wide),
            low=-1e-6,
            high=1e-6,
        )
    ]


def with_conflicts(n: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Digits of which a share repeats earlier ones, with the next label."""
    x, y = sample.digits(n, "true", seed)
    repeated = round(share * n)
    if repeated:
        x[n - repeated :] = x[:repeated]
        y[n - repeated :] = (y[:repeated] + 1) % 10
    return x, y


def floor(x: np.ndarray, y: np.ndarray) -> float:
    """The residual that no function of the inputs can go below."""
    targets = 2.0 * np.eye(10)[y] - 1.0
    _, groups = np.unique(x, axis=0, return_inverse=True)
    groups = groups.ravel()
    means = np.zeros((groups.max() + 1, 10))
    np.add.at(means, groups, targets)
    means /= np.bincount(groups)[:, None]
    rest = np.linalg.norm(targets - means[groups])
    return float(rest / np.linalg.norm(targets))


def draw(axes: Sequence[Axes], rows: Sequence[Row]) -> None:
    """Residual against width, with the floors dotted."""
    (panel,) = axes
    lines = mean_curves(
        panel,
        rows,
        x="width",
        y="residual",
        by=("share",),
        name=lambda share: f"{share:.0%} of the images with two labels",
    )
    for (share,), color in lines.items():
        floors = [row["floor"] for row in rows if row["share"] == share]
        panel.axhline(float(np.mean(floors)), color=color, linestyle=":", linewidth=1)
    panel.set_xscale("log", base=2)
    panel.set_title("images with conflicting labels (dotted: floor)")
    panel.set_xlabel("width")
    panel.set_ylabel("residual of alignment")
