"""Autoencoders of two layers: their least width, and the effect of tied weights.

`u(x) = c A relu(W^T x)`, trained by gradient descent on half the squared error: the
encoder `W` alone, the decoder `A` alone, both jointly, or tied, `A = W`. Source: T. V.
Nguyen, R. K. W. Wong and C. Hegde, "Benefits of Jointly Training Autoencoders: An
Improved Neural Tangent Kernel Analysis", IEEE Transactions on Information Theory, 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pipelines.studies.autoencoders import measurements
from pipelines.studies.autoencoders.expectations import claims
from pipelines.studies.autoencoders.figure import draw
from pipelines.studies.autoencoders.labels import WITH_LIMIT
from pipelines.studies.autoencoders.network import TRAINED
from pipelines.studies.sample import DIGITS
from pipelines.studies.settings import check, count, counts, number

if TYPE_CHECKING:
    from pipelines.studies.sample import Row

__all__ = ["PANELS", "TITLE", "cells", "claims", "draw", "measure"]

TITLE = "Autoencoders of two layers"
PANELS = 4

_SETTINGS = {
    "samples": counts(2, DIGITS),
    "widths": counts(),
    "steps": count(),
    "tolerance": number(1e-15, 0.99),
    "limit_samples": count(2, DIGITS),
    "limit_widths": counts(),
    "rate_samples": count(2),
    "rate_width": count(),
    "stall_samples": count(2, DIGITS),
    "stall_widths": counts(),
    "stall_steps": count(),
    "stall_moments": count(2),
    "tied_samples": count(2, DIGITS),
    "tied_widths": counts(),
    "tied_steps": count(),
    "unseen": count(1, DIGITS),
    "seeds": count(),
}


def cells(settings: Mapping[str, Any]) -> list[Row]:
    """Runs of five kinds; see `measurements` for each.

    Args:
        settings: `samples` (numbers of digits), `widths` (to search for the least),
            `steps` of gradient descent, `tolerance` (of the initial loss, that counts
            as fitted); `limit_samples`, `limit_widths`; `rate_samples`, `rate_width`;
            `stall_samples`, `stall_widths`, `stall_steps`, `stall_moments`;
            `tied_samples`, `tied_widths`, `tied_steps`, `unseen` (digits that are not
            trained on); `seeds`.

    Returns:
        The cells.

    Raises:
        ValueError: If settings are missing, unknown or out of range.
    """
    check("autoencoders", settings, _SETTINGS)
    if len(set(settings["limit_widths"])) < 2:
        raise ValueError(
            "`limit_widths` must be two different widths or more, for a slope. "
            f"Received: limit_widths={settings['limit_widths']}"
        )
    seeds = range(settings["seeds"])
    return [
        *(
            {"kind": "least", "trained": trained, "n": n, "seed": seed}
            for n in settings["samples"]
            for trained in TRAINED
            for seed in seeds
        ),
        *(
            {"kind": "limit", "trained": trained, "width": width, "seed": seed}
            for trained in WITH_LIMIT
            for width in settings["limit_widths"]
            for seed in seeds
        ),
        *(
            {"kind": "rate", "trained": trained, "seed": seed}
            for trained in WITH_LIMIT
            for seed in seeds
        ),
        *(
            {"kind": "stall", "width": width, "seed": seed}
            for width in settings["stall_widths"]
            for seed in seeds
        ),
        *(
            {"kind": "unseen", "trained": trained, "width": width, "seed": seed}
            for trained in ("encoder", "joint", "tied")
            for width in settings["tied_widths"]
            for seed in seeds
        ),
    ]


def measure(settings: Mapping[str, Any], cell: Row) -> list[Row]:
    """Computes one cell.

    Args:
        settings: As for `cells`.
        cell: One of them.

    Returns:
        Its rows, which repeat it.
    """
    run: Callable[..., list[Row]] = getattr(measurements, cell["kind"])
    return [{**cell, **row} for row in run(settings, cell)]
