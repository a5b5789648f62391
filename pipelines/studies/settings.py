"""The settings of the studies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import files
from pipelines.mistakes import Mistakes
from pipelines.sections import is_integer, is_number

FILE = Path(__file__).resolve().parents[2] / "profiles" / "studies" / "params.yaml"

Studies = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Setting:
    """What a setting must be.

    Attributes:
        least: The least value.
        largest: The largest value.
        whole: Whether it must be an integer.
        several: Whether it must be a list of such values.
    """

    least: float
    largest: float
    whole: bool
    several: bool

    def fits(self, value: Any) -> bool:
        """Whether a value is as it must be."""
        if self.several != isinstance(value, (list, tuple)):
            return False
        values = value if self.several else [value]
        kind = is_integer if self.whole else is_number
        return len(values) > 0 and all(
            kind(each) and self.least <= each <= self.largest for each in values
        )

    def __str__(self) -> str:
        noun = "integer" if self.whole else "number"
        noun = f"a list of {noun}s" if self.several else f"one {noun}"
        return f"{noun} between {self.least:g} and {self.largest:g}"


# The settings of a study, or a section of them, by name.
Wanted = Mapping[str, "Setting | Wanted"]


def count(least: int = 1, largest: int = 10**6) -> Setting:
    """A setting that is an integer."""
    return Setting(least, largest, whole=True, several=False)


def counts(least: int = 1, largest: int = 10**6) -> Setting:
    """A setting that is a list of integers."""
    return Setting(least, largest, whole=True, several=True)


def number(least: float = 1e-15, largest: float = 1e6) -> Setting:
    """A setting that is a number."""
    return Setting(least, largest, whole=False, several=False)


def numbers(least: float = 1e-15, largest: float = 1e6) -> Setting:
    """A setting that is a list of numbers."""
    return Setting(least, largest, whole=False, several=True)


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


def check(study: str, settings: Mapping[str, Any], wanted: Wanted) -> None:
    """Checks the settings of a study before it computes anything.

    Args:
        study: Its name.
        settings: Its settings.
        wanted: What they must be.

    Raises:
        ValueError: If names are unknown or missing, or values are not as they must be.
            The message has all mistakes, each with the nearest right name.
    """
    mistakes = Mistakes(f"The study {study!r}")
    _check_section(f"studies.{study}", settings, wanted, mistakes)
    mistakes.raise_if_any()


def _check_section(
    where: str, settings: Any, wanted: Wanted, mistakes: Mistakes
) -> None:
    if not isinstance(settings, Mapping):
        mistakes.add(f"`{where}` must be a mapping. Received: {settings!r}")
        return
    mistakes.check_keys(where, settings, wanted)
    for name, value in settings.items():
        setting = wanted.get(name)
        if isinstance(setting, Mapping):
            _check_section(f"{where}.{name}", value, setting, mistakes)
        elif setting is not None and not setting.fits(value):
            mistakes.add(
                f"`{where}.{name}` must be {setting}. Received: {name}={value!r}"
            )
