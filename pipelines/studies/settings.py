"""The settings of the studies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines import files

FILE = Path(__file__).resolve().parents[2] / "profiles" / "studies" / "params.yaml"

Studies = Mapping[str, Mapping[str, Any]]


def load(path: Path = FILE) -> Studies:
    """Reads the settings of the studies.

    Args:
        path: The file.

    Returns:
        The settings by name.

    Raises:
        ValueError: If the file is damaged, or has no mapping of mappings.
    """
    studies = files.read_yaml(path).get("studies")
    if not isinstance(studies, dict) or not all(
        isinstance(each, dict) for each in studies.values()
    ):
        raise ValueError(
            f"{path.name} must have `studies`, with a mapping for each. Received: "
            f"studies={files.shown(studies)}"
        )
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
                f"{largest:g}. Received: {name}={files.shown(given)}"
            )
