"""Saved files that are written whole, or not at all."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole_file(
    filepath: Any, suffix: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[Any]:
    """Gives a temporary path, and moves the file to `filepath` when it is written.

    Gives `filepath` itself where Keras asks before it overwrites, writes several files,
    or writes to another place than a local file.

    Args:
        filepath: Where the user wants the file.
        suffix: How the name of a single file ends.
        args: Further positional arguments of Keras's function.
        kwargs: Its keyword arguments.

    Yields:
        The path to write to.
    """
    overwrites = not args and kwargs.get("overwrite", True)
    single = not kwargs.get("max_shard_size") and kwargs.get("zipped") in {None, True}
    local = str(filepath).endswith(suffix) and "://" not in str(filepath)
    if not (overwrites and single and local):
        yield filepath
        return
    path = Path(filepath)
    with tempfile.TemporaryDirectory(
        prefix=f".{path.name}.", suffix=".tmp", dir=path.parent
    ) as folder:
        partial = Path(folder) / path.name
        yield partial
        partial.replace(path)
