"""The file semeion.data of the UCI repository: a digit of 16 x 16 pixels a line."""

from __future__ import annotations

import hashlib

import numpy as np

from pipelines.datasets.samples import Samples

URL = "https://archive.ics.uci.edu/ml/machine-learning-databases/semeion/semeion.data"
# SHA-256 of the table, row by row in uint8: 256 pixels, then 10 one-hot labels.
TABLE_SHA256 = "21be29a795c8319e951c7d26ca0f0ed7c44b8c193debedea22c6eeb74ba475ed"
_ROWS, _PIXELS, _CLASSES = 1593, 256, 10


def parse(text: str) -> np.ndarray:
    """Reads the file.

    Args:
        text: Lines of 266 numbers, each 0 or 1, with or without decimals.

    Returns:
        The table, uint8, shape `(lines, 266)`.

    Raises:
        ValueError: If a line is something else.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = [float(each) for each in line.split()]
        except ValueError as error:
            raise ValueError(
                f"Not a line of semeion.data. Received: line {number}: {error}"
            ) from error
        labels = row[_PIXELS:]
        if len(row) != _PIXELS + _CLASSES or set(row) - {0, 1} or sum(labels) != 1:
            raise ValueError(
                f"A line of semeion.data has {_PIXELS} pixels and {_CLASSES} labels, "
                f"0 or 1, one label of them 1. Received: line {number} with {len(row)} "
                f"numbers, labels {labels[:_CLASSES]}"
            )
        rows.append(row)
    return np.array(rows, "uint8").reshape(-1, _PIXELS + _CLASSES)


def check_table(table: np.ndarray) -> None:
    """Checks that the table is the one that was published.

    Args:
        table: What `parse` returns.

    Raises:
        ValueError: If it differs.
    """
    found = hashlib.sha256(np.ascontiguousarray(table).data).hexdigest()
    if found != TABLE_SHA256:
        raise ValueError(
            f"semeion.data must have {_ROWS} lines and sha256 {TABLE_SHA256} as a "
            f"table. Received: {len(table)} lines, sha256 {found}. Download it again."
        )


def samples(table: np.ndarray) -> Samples:
    """Images and labels of the table.

    Args:
        table: Shape `(n, 266)`.

    Returns:
        Images `(n, 16, 16, 1)` of pixels 0 and 1, and labels `(n,)`.
    """
    images = table[:, :_PIXELS].reshape(-1, 16, 16, 1)
    return Samples(images, table[:, _PIXELS:].argmax(axis=1).astype("int64"))
