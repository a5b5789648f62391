"""Collects rows batch by batch into one array, in memory or in a file."""

from __future__ import annotations

import errno
import tempfile
from typing import Any

import numpy as np

from keras_dalign.numerics.memory import raise_disk_full


class RowStore:
    """Collects the batches of one array without a second copy of them.

    In memory, an array of a known number of rows is allocated once and filled. If the
    number is unknown, batches are kept and joined at the end; each is freed when it has
    been copied.

    On disk, batches are appended to a temporary file in the folder that `TMPDIR` names,
    and the array is a memory map of the file. The file has no name (on Windows, it has
    one until it is closed), so its space is freed as soon as nothing refers to the
    array, however the process ends.

    Args:
        n: Number of rows, or an upper bound, if it is known.
        on_disk: Whether the rows go to a file.
    """

    def __init__(self, n: int | None = None, on_disk: bool = False) -> None:
        self._n = n
        self._rows = 0
        self._array: np.ndarray | None = None
        self._parts: list[np.ndarray] = []
        self._file: Any = None
        if on_disk:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  (see close)

    def append(self, batch: np.ndarray) -> None:
        """Adds rows.

        Args:
            batch: Shape `(rows, ...)`; every batch has the same `...`.

        Raises:
            OSError: If the disk is full. The file is deleted then.
        """
        if self._file is not None:
            self._write(batch)
        elif self._n is None:
            self._parts.append(batch)
        else:
            if self._array is None:
                self._array = np.empty((self._n, *batch.shape[1:]), batch.dtype)
            self._array[self._rows : self._rows + len(batch)] = batch
        self._rows += len(batch)

    def _write(self, batch: np.ndarray) -> None:
        if not self._parts:
            # The shape and the dtype of a row.
            self._parts.append(np.empty_like(batch[:0]))
        left = np.ascontiguousarray(batch).data.cast("B")
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.close()
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            rows = self._n or self._rows + len(batch)
            gib = rows * (batch.nbytes / len(batch)) / 2**30
            raise_disk_full(gib, at_least=self._n is None)

    def close(self) -> None:
        """Closes the file; an array that maps it stays valid."""
        if self._file is not None:
            self._file.close()

    def array(self) -> np.ndarray:
        """Everything that was added.

        Returns:
            An array `(rows, ...)`, a `numpy.memmap` if it is on disk. No rows can be
            added afterwards.
        """
        if self._file is not None:
            like = self._parts[0]
            shape = (self._rows, *like.shape[1:])
            # Writable, as PyTorch warns of read-only arrays. Not a private map, which
            # counts as memory and fails where it is larger.
            array = np.memmap(self._file, like.dtype, mode="r+", shape=shape)
            self.close()
            return array
        if self._array is not None:
            return self._array[: self._rows]
        joined = np.empty(
            (self._rows, *self._parts[0].shape[1:]), np.result_type(*self._parts)
        )
        start = 0
        self._parts.reverse()
        while self._parts:
            part = self._parts.pop()
            joined[start : start + len(part)] = part
            start += len(part)
        return joined
