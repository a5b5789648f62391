"""Data that are read several times, with a check that all passes are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_dalign.diagnostics.precision import widened
from keras_dalign.head import data

if TYPE_CHECKING:
    from keras_dalign.numerics import Array


class RereadData:
    """Batches of inputs; an error if a pass differs from the first one.

    Args:
        x: Inputs: arrays, or a stream that can be read again.
        batch_size: Samples per batch, for arrays.
        steps: Batches that make one pass, or None for all.
        model: The model, whose inputs the data must fit.

    Attributes:
        n: Number of samples, known after the first pass.
        n_hint: Number of samples of arrays, 0 for a stream.
        rows: Samples of the largest batch so far.
        wide: Whether batches are given in float64.

    Raises:
        ValueError: If `x` is a generator, which can be read once only, or does not fit
            the model.
    """

    def __init__(
        self, x: Any, batch_size: int, steps: int | None, model: keras.Model
    ) -> None:
        if isinstance(x, Iterator):
            raise ValueError(
                "`x` is read several times, which a generator does not allow. "
                f"Received: x of type {type(x).__name__}. Pass arrays, a "
                "`tf.data.Dataset` or a `keras.utils.PyDataset`, in the same order "
                "each time."
            )
        self._model = model
        self.n = 0
        self.n_hint = data.n_samples(x) if data.is_arrays(x) else 0
        self.wide = False
        self._x = x
        self._batch_size = batch_size
        self._steps = steps
        self._digests: list[bytes] | None = None
        self._first: Any = None
        self.rows = 0

    def first(self) -> Any:
        """The first batch."""
        if self._first is None:
            batch, _, _ = next(self._batches())
            self._check_finite(batch, 0)
            self._first = batch
        return self._widened(self._first)

    def __iter__(self) -> Iterator[tuple[slice, Any]]:
        start = 0
        digests: list[bytes] = []
        known = self._digests
        for batch, _, _ in self._batches():
            index = len(digests)
            digests.append(digest_of(keras.tree.flatten(batch)))
            if known is None:
                self._check_finite(batch, index)
            elif index >= len(known):
                raise self._changed(f"there are more than {index} batches now")
            elif digests[index] != known[index]:
                raise self._changed(f"batch {index} is not what it was")
            count = data.n_samples(batch)
            self.rows = max(self.rows, count)
            yield slice(start, start + count), self._widened(batch)
            start += count
        if known is not None and len(digests) != len(known):
            raise self._changed(
                f"there are {len(digests)} batches instead of {len(known)}"
            )
        self.n = start
        self._digests = digests

    def padded(self, batch: Any) -> Any:
        """The batch with its last sample repeated up to the size that is compiled."""
        return padded(batch, max(self.rows, data.n_samples(batch)))

    def zero_padded(self, array: Array, axis: int) -> Array:
        """Zeros for the samples that `padded` adds."""
        missing = self.rows - array.shape[axis]
        widths = [(0, missing if i == axis else 0) for i in range(array.ndim)]
        return np.pad(array, widths)

    def cut(self, outputs: Any, batch: Any) -> Any:
        """The outputs of a padded batch, without those of the padding."""
        n = data.n_samples(batch)
        return keras.tree.map_structure(lambda leaf: leaf[:n], outputs)

    def _batches(self) -> Iterator[data.Batch]:
        # Without `model`, which several processes may share: each reads its own data.
        for batch in data.batches(
            self._x, batch_size=self._batch_size, steps=self._steps
        ):
            data.check_inputs(self._model, batch[0])
            yield batch

    def _widened(self, batch: Any) -> Any:
        return keras.tree.map_structure(widened, batch) if self.wide else batch

    def _check_finite(self, batch: Any, index: int) -> None:
        for leaf in keras.tree.flatten(batch):
            values = widened(leaf)
            if values.dtype == np.float64 and not np.all(np.isfinite(values)):
                raise ValueError(
                    "The inputs `x` are not finite. Received: NaN or infinity in batch "
                    f"{index}. Remove or replace these samples."
                )

    def _changed(self, what: str) -> ValueError:
        return ValueError(
            f"The data changed between two passes over them: {what}. Received: x of "
            f"type {type(self._x).__name__}. Pass data that come in the same order, "
            "without augmentation, each time (for `tf.data`: no shuffle, or "
            "reshuffle_each_iteration=False)."
        )


def padded(batch: Any, rows: int) -> Any:
    """The batch with its last sample repeated up to `rows` samples."""
    n = data.n_samples(batch)
    if n == rows:
        return batch
    order = np.minimum(np.arange(rows), n - 1)
    return keras.tree.map_structure(lambda leaf: leaf[order], batch)


def digest_of(arrays: list[Any]) -> bytes:
    """A digest of the dtypes, shapes and bytes of arrays."""
    digest = hashlib.blake2b(digest_size=16)
    for array in map(np.ascontiguousarray, arrays):
        digest.update(f"{array.dtype}{array.shape}".encode())
        if array.dtype.hasobject:
            digest.update(repr(array.tolist()).encode())
        else:
            digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.digest()
