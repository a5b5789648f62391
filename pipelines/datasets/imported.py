"""Data sets from a folder of files, for machines without internet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipelines import files
from pipelines.datasets.known import WHOLE, Known
from pipelines.datasets.samples import Samples

# Names the folder where no command line can, as for `dvc repro`.
VARIABLE = "KERAS_DALIGN_IMPORT"
FORMAT = (
    "NAME.npz with the arrays x_train, y_train, x_test and y_test, or x and y for "
    "data without a split; images uint8, labels integers from 0"
)


def file(folder: Path, name: str) -> Path:
    """The file of a data set.

    Args:
        folder: Folder of files.
        name: Name of the data set.

    Returns:
        Its path.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = folder / f"{name}.npz"
    if not path.is_file():
        there = sorted(each.name for each in folder.glob("*.npz"))
        raise FileNotFoundError(
            f"The import folder has no {path.name}. Received: {folder.resolve()}, with "
            f"{', '.join(there) or 'no npz file'}. It must hold {FORMAT}. Without "
            f"`--import-from` and {VARIABLE} the data set is downloaded."
        )
    return path


def read(path: Path, known: Known) -> Mapping[str, Samples]:
    """Reads a file.

    Args:
        path: See `file`.
        known: The complete data set.

    Returns:
        The samples by the parts of `known.classes`.

    Raises:
        ValueError: If the file is damaged, or holds something else.
    """
    whole = WHOLE in known.classes
    names = {part: "" if whole else f"_{part}" for part in known.classes}
    wanted = [axis + end for end in names.values() for axis in "xy"]
    arrays = _arrays(path, wanted)
    return {
        part: _samples(path, arrays[f"x{end}"], arrays[f"y{end}"], known)
        for part, end in names.items()
    }


def is_synthetic(path: Path) -> bool:
    """Whether a file marks its data as synthetic, by an array `synthetic` of True.

    Args:
        path: See `file`.

    Returns:
        False without such an array.
    """
    return bool(np.any(_arrays(path, [], ["synthetic"]).get("synthetic", False)))


def _arrays(
    path: Path, names: list[str], optional: list[str] | None = None
) -> dict[str, np.ndarray]:
    there: list[str] = []
    try:
        with path.open("rb") as opened:
            found = np.load(opened, allow_pickle=False)
            # A file of one array has no names.
            there = getattr(found, "files", there)
            if set(names) <= set(there):
                return {n: found[n] for n in [*names, *(optional or [])] if n in there}
    except files.DAMAGED_ARRAYS as error:
        raise ValueError(
            f"A damaged or truncated file. Received: {path}: {error}. Copy it again, "
            "and compare its checksum with the original's."
        ) from error
    raise ValueError(
        f"{path.name} must have the arrays {', '.join(names)}. Received: {path} with "
        f"{', '.join(there) or 'none'}"
    )


def _samples(path: Path, x: np.ndarray, y: np.ndarray, known: Known) -> Samples:
    if x.ndim == 3:
        x = x[..., np.newaxis]
    y = y.reshape(-1) if y.ndim == 2 and y.shape[1] == 1 else y
    if x.dtype != np.uint8 or x.shape[1:] != known.shape or not len(x):
        raise ValueError(
            f"Images of {known.title} must be uint8 of shape (n, "
            f"{', '.join(map(str, known.shape))}). Received: {path} with images of "
            f"type {x.dtype} and shape {x.shape}"
        )
    if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            f"There must be an integer label for each of {len(x)} images. Received: "
            f"{path} with labels of type {y.dtype} and shape {y.shape}"
        )
    if y.min() < 0 or y.max() >= known.n_classes:
        raise ValueError(
            f"{known.title} has {known.n_classes} classes, with labels from 0 to "
            f"{known.n_classes - 1}. Received: {path} with labels from {y.min()} to "
            f"{y.max()}"
        )
    return Samples(x, y.astype("int64"))
