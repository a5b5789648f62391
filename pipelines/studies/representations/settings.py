"""The settings of the study, checked before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Numbers of something, or lists of such; positive numbers, or lists of such.
_COUNTS = {
    "dimensions",
    "smallest",
    "largest",
    "validation",
    "test",
    "iterations",
    "seeds",
}
_POSITIVE = {"step", "ratio", "ridges"}
_BY_INPUT = {"raw", "neural"}
_CERTIFICATE = {"d", "n", "widths", "ungated", "penalty", "iterations"}
_LIMITS = {"d", "sizes"}
_KEYS = _COUNTS | _POSITIVE | {"penalties", "units", "certificate", "limits"}


def check(settings: Mapping[str, Any]) -> None:
    """Checks the settings.

    Args:
        settings: See `cells`.

    Raises:
        ValueError: If a key is missing or unknown, or a value is out of its range.
    """
    _check_keys("settings", settings, _KEYS)
    _check_keys("penalties", settings["penalties"], _BY_INPUT)
    _check_keys("units", settings["units"], _BY_INPUT | {"ungated"})
    _check_keys("certificate", settings["certificate"], _CERTIFICATE)
    _check_keys("limits", settings["limits"], _LIMITS)
    for name in _COUNTS:
        _check(name, settings[name], count=True)
    for name in _POSITIVE:
        _check(name, settings[name], count=False)
    for name, penalties in settings["penalties"].items():
        _check(f"penalties of {name} inputs", penalties, count=False)
    for name, units in settings["units"].items():
        _check(f"units of {name} heads", units, count=True)
    for section in ("certificate", "limits"):
        for name, value in settings[section].items():
            _check(f"{section}: {name}", value, count=name != "penalty")
    if settings["step"] <= 1:
        raise ValueError(
            "`step`, the ratio of sizes that follow each other, must be above 1. "
            f"Received: step={settings['step']}"
        )
    lengths = {len(settings[name]) for name in ("dimensions", "smallest", "largest")}
    if len(lengths) > 1 or len(set(settings["dimensions"])) < 2:
        raise ValueError(
            "`dimensions` must be two different ones or more, with a `smallest` and a "
            f"`largest` size for each. Received: {settings['dimensions']}, "
            f"{settings['smallest']}, {settings['largest']}"
        )


def _check_keys(name: str, given: Any, wanted: set[str]) -> None:
    if not isinstance(given, Mapping) or set(given) != wanted:
        keys = sorted(given) if isinstance(given, Mapping) else given
        raise ValueError(
            f"The {name} of the study `representations` must have the keys "
            f"{sorted(wanted)}. Received: {keys}"
        )


def _check(name: str, value: Any, *, count: bool) -> None:
    for each in value if isinstance(value, list) and value else [value]:
        good = isinstance(each, (int, float)) and not isinstance(each, bool)
        good = good and math.isfinite(each) and each > 0
        if not good or (count and not isinstance(each, int)):
            raise ValueError(
                f"`{name}` must be {'a positive int' if count else 'positive'}, or a "
                f"list of such. Received: {value}"
            )
