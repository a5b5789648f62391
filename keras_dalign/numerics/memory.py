"""Memory and disk: how much is free, and whether something fits."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import NoReturn


def free_gib() -> float | None:
    """Memory that can be had without swapping, or None where nobody tells."""
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
    """Checks that something fits, before it is begun.

    Args:
        n_bytes: What it would take.
        what: Its name, for the message.

    Raises:
        MemoryError: If it takes more than what is free.
    """
    free = free_gib()
    if free is not None and n_bytes / 2**30 > free:
        raise MemoryError(
            f"{what} would take {n_bytes / 2**30:.3g} GiB of the {free:.3g} GiB that "
            "are free. Use fewer samples, or products (matvec, rmatvec) instead."
        )


def free_disk_gib() -> float:
    """What the folder for temporary files has room for."""
    return shutil.disk_usage(tempfile.gettempdir()).free / 2**30


def raise_disk_full(gib: float, at_least: bool = False) -> NoReturn:
    """Refuses what does not fit on the disk.

    Args:
        gib: What the features take, in GiB.
        at_least: Whether they may take more.

    Raises:
        OSError: In any case.
    """
    raise OSError(
        errno.ENOSPC,
        f"The features take {gib:.3g} GiB{' or more' if at_least else ''}, which the "
        f"disk has no room for. Received: {free_disk_gib():.3g} GiB free in "
        f"{tempfile.gettempdir()}. Free some space, or set the environment variable "
        "TMPDIR to a folder that has more",
    )
