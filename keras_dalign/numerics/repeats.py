"""Samples with identical inputs, which no function of the inputs can distinguish.

Inputs are compared by digests of their content, so a data set that does not fit in
memory is grouped in one pass. Memory grows with the number of distinct inputs, not with
their size. The same digests, in order, also check whether two passes over the data saw
the same samples.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from keras_dalign.numerics import Array, Indices
    from keras_dalign.numerics.losses import ConvexLoss

# Conflicts listed, and samples listed for each conflict.
_MAX_LISTED = 20

_DIGEST_SIZE = 16


def digests(x: Any) -> list[bytes]:
    """A 128-bit digest of each sample's content, all input arrays together.

    Samples have the same digest if and only if their arrays agree in dtype, shape and
    value; -0.0 equals 0.0. Collisions have a probability of `n^2 / 2^129`.

    Args:
        x: An array or a nested structure of arrays, each of shape `(n, ...)`.

    Returns:
        `n` digests of 16 bytes.

    Raises:
        ValueError: If an array is not numeric, or not finite.
    """
    leaves = [_canonical(leaf) for leaf in keras.tree.flatten(x)]
    # Arrays of different shapes or dtypes may have the same bytes.
    header = ";".join(f"{leaf.dtype.name}{leaf.shape[1:]}" for leaf in leaves)
    rows = [leaf.reshape(len(leaf), -1).view(np.uint8) for leaf in leaves]
    start = hashlib.blake2b(header.encode(), digest_size=_DIGEST_SIZE)
    found = []
    for i in range(len(rows[0])):
        digest = start.copy()
        for row in rows:
            digest.update(row[i])
        found.append(digest.digest())
    return found


class Repeats:
    """The distinct inputs, the targets that each came with, and their weights.

    It is filled batch by batch. It stores one entry for each distinct pair of input and
    target, and each distinct target once. For class labels its size per sample does not
    grow with the number of classes.
    """

    def __init__(self) -> None:
        self._inputs: dict[bytes, int] = {}
        self._targets: dict[bytes, int] = {}
        self._pairs: dict[tuple[int, int], int] = {}
        self._weights: list[float] = []
        # Position in the data of the first sample of each pair with a positive weight.
        self._first: list[int] = []

    @property
    def n_distinct(self) -> int:
        """Number of distinct inputs so far."""
        return len(self._inputs)

    def add(
        self, digests: list[bytes], targets: Array, weights: Array, start: int
    ) -> None:
        """Adds a batch.

        Args:
            digests: The `n` digests of the batch's inputs, from `digests`.
            targets: From `ConvexLoss.targets`, shape `(n, C)`.
            weights: Sample weights, at least 0, shape `(n,)`.
            start: Position in the data of the batch's first sample.
        """
        targets = targets + 0.0  # -0.0 and 0.0 are one target.
        for i, digest in enumerate(digests):
            row = targets[i].tobytes()
            pair = (
                self._inputs.setdefault(digest, len(self._inputs)),
                self._targets.setdefault(row, len(self._targets)),
            )
            weight = float(weights[i])
            known = self._pairs.get(pair)
            if known is not None:
                self._weights[known] += weight
            elif weight > 0:
                self._pairs[pair] = len(self._pairs)
                self._weights.append(weight)
                self._first.append(start + i)

    def groups(self, digests: list[bytes]) -> Indices:
        """The group numbers of inputs that were added.

        Args:
            digests: The `n` digests of inputs that were added.

        Returns:
            Numbers in `0..n_distinct - 1`, shape `(n,)`: equal for identical inputs.
        """
        return np.array([self._inputs[digest] for digest in digests], dtype=np.intp)

    def lower_bound(self, loss: ConvexLoss) -> float:
        """Infimum over all functions of the inputs of the weighted sum of losses.

        Args:
            loss: The loss whose targets were added.

        Returns:
            The infimum, not yet divided by `loss.normalizer`; 0 without any weight.
        """
        if not self._pairs:
            return 0.0
        inputs, targets = self._pair_arrays()
        weights = np.array(self._weights)
        table = np.frombuffer(b"".join(self._targets)).reshape(len(self._targets), -1)
        several = self._several(inputs)[inputs]
        # For an input with one target, the bound is that target's own infimum. This
        # avoids an array of the targets of the whole data set.
        singles = np.arange(len(table))
        alone = loss.lower_bound(table, np.ones(len(table)), singles, len(table))
        bound = float(weights[~several] @ alone[targets[~several]])
        if several.any():
            groups, members = np.unique(inputs[several], return_inverse=True)
            bound += float(
                loss.lower_bound(
                    table[targets[several]], weights[several], members, len(groups)
                ).sum()
            )
        return bound + 0.0  # A sum of empty entropies may be -0.0.

    def digest(self) -> str:
        """A 128-bit digest of the samples: inputs, targets and weights, in any order.

        Samples of weight 0 are left out, and a sample of weight 2 is a sample twice.

        Returns:
            32 hexadecimal digits.
        """
        inputs = list(self._inputs)
        targets = [_digest(row) for row in self._targets]
        samples = sorted(
            inputs[i] + targets[j] + np.float64(weight).tobytes()
            for (i, j), weight in zip(self._pairs, self._weights, strict=True)
        )
        return _digest(b"".join(samples)).hex()

    def conflicts(self) -> tuple[int, tuple[tuple[int, ...], ...]]:
        """Distinct inputs with two or more targets, among samples of positive weight.

        Returns:
            Their number, and for the first 20 of them the positions in the data of the
            first sample of each target, at most 20.
        """
        inputs, _ = self._pair_arrays()
        conflicting = np.flatnonzero(self._several(inputs))
        first = np.array(self._first)
        listed = tuple(
            tuple(int(i) for i in first[inputs == group][:_MAX_LISTED])
            for group in conflicting[:_MAX_LISTED]
        )
        return len(conflicting), listed

    def _pair_arrays(self) -> tuple[Indices, Indices]:
        pairs = np.array(list(self._pairs), dtype=np.intp).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def _several(self, inputs: Indices) -> npt.NDArray[np.bool_]:
        """Which inputs have several targets, shape `(n_distinct,)`."""
        return np.bincount(inputs, minlength=self.n_distinct) > 1


class PassRecord:
    """A digest of the samples of one pass over the data, and of their order.

    Code that makes several passes compares each later pass with the record of the
    first. Otherwise a shuffled or augmented stream would silently mix up the samples.
    """

    def __init__(self) -> None:
        self.n = 0
        self._ordered = hashlib.blake2b(digest_size=_DIGEST_SIZE)
        self._unordered = 0

    def add(self, digests: list[bytes], *columns: npt.ArrayLike | None) -> None:
        """Adds a batch.

        Args:
            digests: The `n` digests of the batch's inputs, from `digests`.
            *columns: Other arrays that must be the same in every pass, such as targets
                and weights, each of shape `(n, ...)`, or None.
        """
        arrays = [np.asarray(column) for column in columns if column is not None]
        for i, sample in enumerate(digests):
            parts = [sample, *(array[i].tobytes() for array in arrays)]
            whole = _digest(b"".join(parts))
            self._ordered.update(whole)
            self._unordered += int.from_bytes(whole, "little")
        self._unordered %= 1 << (8 * _DIGEST_SIZE)
        self.n += len(digests)

    def check_same(self, later: PassRecord) -> None:
        """Compares a later pass over the data with this one.

        Args:
            later: The record of the later pass, of the same columns.

        Raises:
            ValueError: If its samples differ in number, in content or in order.
        """
        advice = (
            "Every pass must give the same samples in the same order: pass arrays, or "
            "switch off the stream's shuffling, augmentation and dropping of batches."
        )
        if self.n != later.n:
            raise ValueError(
                f"The data changed in size between two passes. {advice} Received: "
                f"{self.n} samples, then {later.n}"
            )
        if self._unordered != later._unordered:
            raise ValueError(
                f"The data changed in content between two passes. {advice} Received: "
                f"{self.n} samples, some of which differ"
            )
        if self._ordered.digest() != later._ordered.digest():
            raise ValueError(
                f"The data changed in order between two passes. {advice} Received: "
                f"the same {self.n} samples, in another order"
            )


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_SIZE).digest()


def _canonical(leaf: Any) -> np.ndarray:
    """The same finite numbers, with equal bytes for equal values."""
    leaf = np.asarray(leaf)
    if leaf.dtype.kind in "OSTUMm":
        raise ValueError(
            "Inputs `x` must be numeric arrays; encode strings and objects first. "
            f"Received: inputs of dtype {leaf.dtype}"
        )
    if leaf.dtype.kind in "biu":
        return np.ascontiguousarray(leaf)
    if not np.isfinite(leaf).all():
        raise ValueError(
            "Inputs `x` must be finite: remove or repair the samples with missing "
            "values. "
            f"Received: NaN or infinite inputs of dtype {leaf.dtype}"
        )
    return np.ascontiguousarray(leaf + leaf.dtype.type(0))  # -0.0 becomes 0.0.
