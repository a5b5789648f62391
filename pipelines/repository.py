"""Queries to git: the current commit, that of a file, and the code of a commit."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from pipelines.layout import PACKAGES, ROOT


def code() -> dict[str, Any]:
    """The commit, and whether the code was changed since; None outside of git."""
    changed = _git("status", "--porcelain", "--", *PACKAGES, "params.yaml")
    return {
        "commit": _text("rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
    }


def commit_of(path: Path) -> str | None:
    """The commit that a file comes from.

    Args:
        path: The file.

    Returns:
        The last commit that changed it, or, if it is not committed as it is, the one
        that it was made on; None outside of git.
    """
    name = str(path.resolve())
    state = _text("status", "--porcelain", "--ignored", "--", name)
    if state == "":
        return _text("log", "-1", "--format=%H", "--", name) or None
    return _text("rev-parse", "HEAD")


def tree(commit: str) -> dict[str, bytes] | None:
    """The code of a commit.

    Args:
        commit: Its name.

    Returns:
        As `closure.on_disk`; None outside of git, or if it has no such commit.
    """
    packed = None
    # What is not there, git refuses to pack: the library is older than the pipelines.
    held = (_text("ls-tree", "--name-only", commit, *PACKAGES) or "").split()
    if held:
        packed = _git("archive", "--format=tar", commit, *held)
    if packed is None:
        return None
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        members = [(each.name, archive.extractfile(each)) for each in archive]
        return {name: file.read() for name, file in members if file is not None}


def _text(*arguments: str) -> str | None:
    output = _git(*arguments)
    return None if output is None else output.decode().strip()


def _git(*arguments: str) -> bytes | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout
