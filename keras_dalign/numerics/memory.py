"""Free memory and disk space, and errors for data that do not fit."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import NoReturn


def free_gib() -> float | None:
    """Memory available without swapping, in GiB; None if it is unknown."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 2**20
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, ValueError, OSError):
        return None


def check_memory(n_bytes: int, what: str) -> None:
    """Checks that an array fits in memory, before it is computed.

    Args:
        n_bytes: Its size in bytes.
        what: Its name, for the error.

    Raises:
        MemoryError: If it is larger than the free memory.
    """
    free = free_gib()
    if free is not None and n_bytes / 2**30 > free:
        raise MemoryError(
            f"{what} would take {n_bytes / 2**30:.3g} GiB of the {free:.3g} GiB that "
            "are free. Use fewer samples, or products (matvec, rmatvec) instead."
        )


def free_disk_gib() -> float:
    """Free space of the folder for temporary files, in GiB."""
    return shutil.disk_usage(tempfile.gettempdir()).free / 2**30


def raise_disk_full(gib: float, at_least: bool = False) -> NoReturn:
    """Raises the error for features that do not fit on the disk.

    Args:
        gib: Size of the features in GiB.
        at_least: Whether they may be larger.

    Raises:
        OSError: Always.
    """
    raise OSError(
        errno.ENOSPC,
        f"The features take {gib:.3g} GiB{' or more' if at_least else ''}, which the "
        f"disk has no room for. Received: {free_disk_gib():.3g} GiB free in "
        f"{tempfile.gettempdir()}. Free some space, or set the environment variable "
        "TMPDIR to a folder that has more",
    )
