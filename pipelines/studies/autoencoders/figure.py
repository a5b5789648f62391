"""The figure of the study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes

from pipelines.studies.autoencoders.labels import NAMES
from pipelines.studies.curves import mean_curves

if TYPE_CHECKING:
    from pipelines.studies.sample import Row


def draw(axes: Sequence[Axes], rows: Sequence[Row]) -> None:
    """Least widths, the stalled run, limits, and unseen inputs."""
    widths, stall, limits, unseen = axes
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    mean_curves(
        widths,
        [row for row in kinds["least"] if row["least"]],
        x="n",
        y="least",
        by=("trained",),
        name=NAMES.__getitem__,
    )
    widths.set_xscale("log", base=2)
    widths.set_yscale("log", base=2)
    widths.set_title("how wide is wide enough?")
    widths.set_xlabel("training samples")
    widths.set_ylabel("least width that fits")

    shown = [
        {**row, "curve": curve, "value": max(row[key], 1e-16), "place": row["step"] + 1}
        for curve, key in (("loss", "loss"), ("residual of alignment", "residual"))
        for row in kinds["stall"]
    ]
    mean_curves(
        stall,
        shown,
        x="place",
        y="value",
        by=("width", "curve"),
        name=lambda width, curve: f"width {width}, {curve}",
        dashed=lambda _width, curve: curve != "loss",
    )
    stall.set_xscale("log")
    stall.set_yscale("log")
    stall.set_title("encoder alone: aligned at birth, and later?")
    stall.set_xlabel("step of gradient descent + 1")
    stall.set_ylabel("loss over its initial value, or residual")
    stall.legend(frameon=False, fontsize="small")

    lines = mean_curves(
        limits,
        kinds["limit"],
        x="width",
        y="distance",
        by=("trained",),
        name=NAMES.__getitem__,
    )
    for (trained,), color in lines.items():
        own = [row for row in kinds["limit"] if row["trained"] == trained]
        first = min(row["width"] for row in own)
        places = sorted({row["width"] for row in own})
        start = [row["distance"] for row in own if row["width"] == first]
        mean = math.fsum(start) / len(start)
        heights = [mean * math.sqrt(first / place) for place in places]
        limits.plot(places, heights, ":", color=color)
    limits.set_xscale("log", base=2)
    limits.set_yscale("log")
    limits.set_title("tangent kernel at birth (dotted: slope -1/2)")
    limits.set_xlabel("width")
    limits.set_ylabel("relative distance to the limit kernel")
    limits.legend(frameon=False, fontsize="small")

    errors = [
        {**row, "which": f"{NAMES[row['trained']]}, trained", "value": row["unseen"]}
        for row in kinds["unseen"]
    ]
    errors += [
        {**row, "which": "tied, at birth", "value": row["unseen_at_birth"]}
        for row in kinds["unseen"]
        if row["trained"] == "tied"
    ]
    mean_curves(unseen, errors, x="width", y="value", by=("which",), name=str)
    unseen.set_xscale("log", base=2)
    unseen.set_yscale("log")
    unseen.set_title("reconstruction of unseen digits")
    unseen.set_xlabel("width")
    unseen.set_ylabel("squared error over the norm's square")
    unseen.legend(frameon=False, fontsize="small")
