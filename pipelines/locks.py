"""A lock for each run, so that only one process at a time writes its files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Locks a run for this process.

    The lock ends with the block, and with the process, however it ends.

    Args:
        path: A path that belongs to the run alone; `.lock` is added to it.

    Yields:
        Nothing.

    Raises:
        RuntimeError: If another process has the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RuntimeError(
            f"Another process works on this run. Received: {path.stem}. Wait for it, "
            "or work in another clone: several can share one DVC cache."
        ) from error
    try:
        yield
    finally:
        lock.release()
