"""When widening helps, and when it does not: images that come with two labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes

from pipelines.studies import sample
from pipelines.studies.curves import mean_curves

if TYPE_CHECKING:
    from pipelines.studies.sample import Row

TITLE = "When widening does not help"


def run(settings: Mapping[str, Any]) -> list[Row]:
    """Residual of initial networks on data with and without conflicts.

    A share of the images is repeated in place of others, with another label. No
    function of the images can give both; the part of the labels that is out of reach
    is known: what remains of `Y_l` when the labels of equal images are averaged.

    Args:
        settings: `n`, `widths`, `depth`, `shares` (of repeated images), `seeds`.

    Returns:
        A row for each share, width and seed, with the residual and its `floor`.
    """
    rows = []
    for share in settings["shares"]:
        for width in settings["widths"]:
            for seed in range(settings["seeds"]):
                x, y = with_conflicts(settings["n"], share, seed)
                model = sample.network(width, settings["depth"], seed)
                rows.append(
                    {
                        "share": share,
                        "width": width,
                        "seed": seed,
                        **sample.aligned(model, x, y),
                        "floor": floor(x, y),
                    }
                )
    return rows


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
