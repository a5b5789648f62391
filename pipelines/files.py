"""Files that are written completely or not at all."""

from __future__ import annotations

import errno
import json
import lzma
import reprlib
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

# What NumPy raises for files of arrays that are damaged.
DAMAGED_ARRAYS = (
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
# What values of a wrong type raise where they are used.
WRONG_TYPES = (TypeError, AttributeError, KeyError, IndexError, OverflowError)

# That of libyaml refuses what is nested too deeply at once; PyYAML's own takes seconds.
_SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# Error numbers: the disk is full, or this user's quota is used up.
FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path that replaces `path` if the block raises nothing.

    Args:
        path: The file or folder to write. An old one is replaced as a whole.

    Yields:
        A path in the same folder, at which there is nothing yet.
    """
    with (
        explaining_a_full_disk(path.parent),
        # What a killed process leaves behind, Git and DVC ignore by this ending.
        tempfile.TemporaryDirectory(
            prefix=f".{path.name}.", suffix=".tmp", dir=path.parent
        ) as new,
    ):
        temporary = Path(new) / path.name
        yield temporary
        if path.is_dir():
            # Not removed in place: a process may be killed on the way.
            path.replace(Path(new) / f"{path.name}.old")
        temporary.replace(path)


@contextmanager
def explaining_a_full_disk(folder: Path) -> Iterator[None]:
    """Makes the folder, and explains the error if the disk gets full in the block.

    Args:
        folder: Where the block writes.

    Yields:
        Nothing.

    Raises:
        OSError: If the disk is full, or whatever else the block raises.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        number = _number(error)
        if number not in FULL_DISK:
            raise
        raise OSError(
            number,
            f"The disk is full: {error.strerror or error}. Nothing half-written was "
            "kept. Make room, and run the stage again",
            str(folder.resolve()),
        ) from error


def _number(error: BaseException) -> int | None:
    """The error number, which some libraries keep in the cause of what they raise."""
    each: BaseException | None = error
    while each is not None:
        if isinstance(each, OSError) and each.errno is not None:
            return each.errno
        each = each.__cause__
    return None


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a mapping as JSON, keys in their order.

    Raises:
        ValueError: If a number is NaN or infinite.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError as error:
        raise ValueError(
            f"Results must be finite. Received: NaN or infinity for {path}. The run "
            "has probably diverged: try a smaller learning rate."
        ) from error
    write_text(path, text + "\n")


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Reads what `write_json` wrote.

    Args:
        path: The file.
        *keys: Keys that it must have.

    Returns:
        The mapping.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else than a JSON object with these keys.
    """
    _check_exists(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Not a JSON file. Received: {path}: {error}") from error
    missing = set(keys) - set(value if isinstance(value, dict) else ())
    if missing or not isinstance(value, dict):
        raise ValueError(
            f"Expected a JSON object with the keys {', '.join(keys)}. Received: {path} "
            f"without {', '.join(sorted(missing)) or 'any'}. Run its stage again."
        )
    return value


def read_yaml(path: Path) -> dict[Any, Any]:
    """Reads a mapping from a YAML file; nothing in it is executed.

    Args:
        path: The file.

    Returns:
        The mapping.

    Raises:
        ValueError: If it holds something else.
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _SAFE_LOADER)  # noqa: S506
    except (ValueError, yaml.YAMLError, RecursionError, *WRONG_TYPES) as error:
        # Tags that do not fit their values fail inside of PyYAML.
        raise ValueError(f"Not a YAML file. Received: {path.name}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} must be a mapping. Received: {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value from a file as errors show it: short, however large or nested it is."""
    short = reprlib.Repr()
    short.maxlevel = 2
    short.maxstring = short.maxother = 80
    return short.repr(value)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays, uncompressed: the same arrays give the same bytes."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **dict(arrays))


def read_arrays(path: Path, *names: str) -> tuple[np.ndarray, ...]:
    """Reads arrays by name.

    Args:
        path: A file that `write_arrays` wrote.
        *names: Names of arrays in it.

    Returns:
        The arrays, in the order of `names`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or lacks an array.
    """
    _check_exists(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            missing = [name for name in names if name not in arrays]
            if not missing:
                return tuple(arrays[name] for name in names)
    except DAMAGED_ARRAYS as error:
        raise ValueError(
            f"A damaged file of arrays. Received: {path}: {error}. Delete it and run "
            "its stage again."
        ) from error
    raise ValueError(f"Arrays are missing. Received: {path} without {missing}")


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"A result of an earlier stage is missing: {path}. `dvc repro` runs all "
            "stages in their order."
        )
