"""The figure of the study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes

from pipelines.studies.curves import mean_curves
from pipelines.studies.representations.heads import LINEAR, NEURAL, PAIRS
from pipelines.studies.representations.sizes import HALF, halves

if TYPE_CHECKING:
    from pipelines.studies.sample import Row


def _name(head: str, inputs: str) -> str:
    return f"{head}, on {'the representation' if inputs == NEURAL else 'raw inputs'}"


def draw(axes: Sequence[Axes], rows: Sequence[Row]) -> None:
    """Error against samples, samples against dimension, gaps against units."""
    errors, sizes, gaps = axes
    # One order of the heads, so that a head has one colour in all panels.
    order = list(PAIRS)
    known = [(row["head"], row.get("input")) in PAIRS for row in rows]
    rows = [
        *(row for row, drawn in zip(rows, known, strict=True) if not drawn),
        *sorted(
            (row for row, drawn in zip(rows, known, strict=True) if drawn),
            key=lambda row: order.index((row["head"], row["input"])),
        ),
    ]
    curves = [r for r in rows if r["kind"] == "samples" and r["head"] != LINEAR]
    dimensions = sorted({row["d"] for row in curves})
    middle = dimensions[len(dimensions) // 2]
    mean_curves(
        errors,
        [row for row in curves if row["d"] == middle],
        x="n",
        y="error",
        by=("head", "input"),
        name=_name,
    )
    errors.axhline(HALF, color="0.6", linestyle=":", linewidth=1)
    errors.set_xscale("log")
    errors.set_xlabel("training samples")
    errors.set_ylabel("test error / variance of the target")
    errors.set_title(f"error, {middle} inputs")
    points = halves(rows)
    colors = mean_curves(sizes, points, x="d", y="n", by=("head", "input"), name=_name)
    for pair, exponent in PAIRS.items():
        chosen = [r for r in points if (r["head"], r["input"]) == pair]
        start = np.exp(
            np.mean([np.log(r["n"]) for r in chosen if r["d"] == dimensions[0]])
        )
        line = [start * (d / dimensions[0]) ** exponent for d in dimensions]
        sizes.plot(dimensions, line, ":", color=colors[pair], linewidth=1)
    sizes.set_xscale("log", base=2)
    sizes.set_yscale("log")
    sizes.set_xticks(dimensions, [str(d) for d in dimensions])
    sizes.minorticks_off()
    sizes.set_xlabel("number of inputs d")
    sizes.set_ylabel("samples for an error of 1/2")
    sizes.set_title("samples against dimension (dotted: theory)")
    mean_curves(
        gaps,
        [row for row in rows if row["kind"] == "certificate"],
        x="width",
        y="relative",
        by=("head",),
        name=str,
    )
    for curve, band in zip(gaps.lines, gaps.collections, strict=True):
        color = colors[str(curve.get_label()), NEURAL]
        curve.set_color(color)
        band.set_facecolor(color)
    gaps.set_xscale("log", base=2)
    gaps.set_yscale("log")
    gaps.set_xlabel("units of the quadratic head")
    gaps.set_ylabel("certified gap / objective")
    gaps.set_title("distance from the global minimum, at most")
    gaps.legend(frameon=False)
