"""The settings of the study, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.studies import settings as studies
from pipelines.studies.settings import count, counts, number, numbers

_SETTINGS: studies.Wanted = {
    "dimensions": counts(),
    "smallest": counts(),
    "largest": counts(),
    "step": number(1.01, 1e3),
    "ratio": number(),
    "validation": count(),
    "test": count(),
    "ridges": numbers(),
    "penalties": {"raw": numbers(), "neural": numbers()},
    "units": {"raw": count(), "neural": count(), "ungated": count()},
    "iterations": count(),
    "certificate": {
        "d": count(),
        "n": count(),
        "widths": counts(),
        "ungated": counts(),
        "penalty": number(),
        "iterations": count(),
    },
    "limits": {"d": count(), "sizes": counts()},
    "seeds": count(),
}


def check(settings: Mapping[str, Any]) -> None:
    """Checks the settings.

    Args:
        settings: See `cells`.

    Raises:
        ValueError: If keys are missing or unknown, or values are out of range.
    """
    studies.check("representations", settings, _SETTINGS)
    lengths = {len(settings[name]) for name in ("dimensions", "smallest", "largest")}
    if len(lengths) > 1 or len(set(settings["dimensions"])) < 2:
        raise ValueError(
            "`dimensions` must be two different ones or more, with a `smallest` and a "
            f"`largest` size for each. Received: {settings['dimensions']}, "
            f"{settings['smallest']}, {settings['largest']}"
        )
