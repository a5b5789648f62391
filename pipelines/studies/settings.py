"""The settings of the studies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).resolve().parents[2] / "profiles" / "studies" / "params.yaml"

Studies = Mapping[str, Mapping[str, Any]]


def load(path: Path = FILE) -> Studies:
    """Reads the settings of the studies, by name."""
    studies: Studies = yaml.safe_load(path.read_text(encoding="utf-8"))["studies"]
    return studies


def check(
    study: str,
    settings: Mapping[str, Any],
    bounds: Mapping[str, tuple[float, float]],
) -> None:
    """Checks the settings of a study before it computes anything.

    Args:
        study: Its name.
        settings: Its settings: numbers, or lists of numbers.
        bounds: The least and the largest value of each, by name.

    Raises:
        ValueError: If a name is unknown or missing, a list is empty, or a value is no
            number within its bounds.
    """
    unknown, missing = sorted({*settings} - {*bounds}), sorted({*bounds} - {*settings})
    if unknown or missing:
        raise ValueError(
            f"The study '{study}' has the settings {sorted(bounds)}. Received: unknown "
            f"{unknown}, missing {missing}"
        )
    for name, (least, largest) in bounds.items():
        given = settings[name]
        values = given if isinstance(given, (list, tuple)) else [given]
        numbers = all(
            isinstance(value, (int, float)) and not isinstance(value, bool)
            for value in values
        )
        if not (values and numbers and all(least <= v <= largest for v in values)):
            raise ValueError(
                f"`{name}` of the study '{study}' must be between {least:g} and "
                f"{largest:g}. Received: {name}={given!r}"
            )
