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
