"""The stages as commands: `python pipelines STAGE ...`, in the folder of a profile."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

STAGES = (
    "prepare",
    "explore",
    "train",
    "evaluate",
    "tune",
    "frontier",
    "report",
    "readme",
    "gate",
    "resume",
    "rerun",
    "quickstart",
    "reproduce",
    "study",
    "study_report",
)


def cli(arguments: Sequence[str] | None = None) -> None:
    """Runs a stage by name.

    Args:
        arguments: Its name, and its arguments; those of the process by default.

    Raises:
        SystemExit: If there is no such stage.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in STAGES:
        raise SystemExit(
            f"The first argument must be a stage: {', '.join(STAGES)}. Received: "
            f"{' '.join(given) or 'nothing'}"
        )
    importlib.import_module(f"pipelines.{given[0]}").cli(given[1:])


if __name__ == "__main__":
    # Run as a folder, which puts `pipelines` itself on the path, not what it lies in.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    cli()
