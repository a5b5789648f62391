"""Numbers of samples that an error of 1/2 takes, and how they grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.studies.representations.heads import LINEAR
from pipelines.studies.sample import slope

if TYPE_CHECKING:
    from pipelines.studies.sample import Row

# The error that samples are counted for. Where nothing is learned it is 1.
HALF = 0.5


def crossing(sizes: Sequence[int], errors: Sequence[float]) -> float:
    """The number of samples at which the error is 1/2.

    Args:
        sizes: Numbers of samples, increasing, at least two.
        errors: The errors, of which at most the last is below 1/2.

    Returns:
        By a straight line through the last two in the logarithm of the number: between
        them, or, where the last error is above 1/2, beyond. If errors do not fall, the
        largest number, which is too small.
    """
    if len(sizes) < 2 or errors[-1] >= errors[-2]:
        return float(sizes[-1])
    part = (errors[-2] - HALF) / (errors[-2] - errors[-1])
    low, high = np.log(sizes[-2:])
    return float(np.exp(low + part * (high - low)))


def halves(rows: Sequence[Row]) -> list[Row]:
    """The numbers of samples at which errors are 1/2.

    Args:
        rows: Those of the study.

    Returns:
        A row for each head, input, dimension and seed, with `n` and whether it was
        `extrapolated`.
    """
    curves: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["kind"] == "samples" and row["head"] != LINEAR:
            key = (row["head"], row["input"], row["d"], row["seed"])
            curves.setdefault(key, []).append(row)
    found = []
    for (head, inputs, d, seed), curve in curves.items():
        curve.sort(key=lambda row: row["n"])
        errors = [row["error"] for row in curve]
        found.append(
            {
                "head": head,
                "input": inputs,
                "d": d,
                "seed": seed,
                "n": crossing([row["n"] for row in curve], errors),
                "extrapolated": errors[-1] >= HALF,
            }
        )
    return found


def exponents(rows: Sequence[Row], head: str, inputs: str) -> list[float]:
    """The slope of `log n(d)` in `log d`, one for each seed."""
    chosen = [r for r in halves(rows) if (r["head"], r["input"]) == (head, inputs)]
    return [
        slope(
            [row["d"] for row in chosen if row["seed"] == seed],
            [row["n"] for row in chosen if row["seed"] == seed],
        )
        for seed in sorted({row["seed"] for row in chosen})
    ]
