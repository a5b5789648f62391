"""The samples of a phase, as `fit` was given them, and checked."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_dalign.head import data

if TYPE_CHECKING:
    from keras_dalign.head.alignment_head import AlignmentHead
    from keras_dalign.numerics.losses import ConvexLoss

# Labels become one row of floats per class while they are checked.
_CHECKED_AT_ONCE = 8192


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingData:
    """Arrays or a stream.

    Attributes:
        x: Inputs, or the stream.
        y: Targets, for arrays.
        sample_weight: Weights `(n,)`, for arrays.
        steps: Batches in a pass over the stream, or None for all of them.
    """

    x: Any
    y: Any = None
    sample_weight: Any = None
    steps: int | None = None

    @property
    def is_array(self) -> bool:
        """Whether these are arrays."""
        return data.is_arrays(self.x)

    @property
    def n(self) -> int | None:
        """Number of samples; None for a stream."""
        return data.n_samples(self.x) if self.is_array else None

    def check(self, head: AlignmentHead, loss: ConvexLoss) -> None:
        """Looks for what the head or its loss cannot take; streams are not read.

        Args:
            head: The head.
            loss: Its loss.

        Raises:
            ValueError: If arrays are empty, non-finite or more than the head was made
                for, if targets are missing, or do not fit the loss.
        """
        n = self.n
        if n is None:
            return
        if head.n_samples is not None and n > head.n_samples:
            raise ValueError(
                "The alignment head was made for fewer samples than `fit` was given. "
                f"Received: {n} samples, n_samples={head.n_samples}. Call "
                f"keras_dalign.align(model, n_samples={n})."
            )
        for leaf in keras.tree.flatten(self.x):
            values = keras.ops.convert_to_numpy(leaf)
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise ValueError(
                    "The inputs must be finite. Received: x with NaN or infinity in "
                    f"{int((~np.isfinite(values)).sum())} of {values.size} entries"
                )
        if self.y is None:
            raise ValueError("Training needs targets. Received: y=None")
        y = keras.ops.convert_to_numpy(self.y)
        for start in range(0, n, _CHECKED_AT_ONCE):
            loss.targets(y[start : start + _CHECKED_AT_ONCE], head.units)


def exploit_data(given: Any) -> TrainingData:
    """The samples given for exploitation.

    Args:
        given: `(x, y)` or `(x, y, sample_weight)` of arrays, or a stream.

    Returns:
        The data.

    Raises:
        ValueError: If it is neither, or a stream that does not end.
    """
    is_tuple = isinstance(given, (list, tuple))
    if is_tuple and len(given) in {2, 3} and data.is_arrays(given[0]):
        return TrainingData(*given)
    if is_tuple or data.is_arrays(given):
        length = f" of {len(given)}" if is_tuple else ""
        raise ValueError(
            "`exploit_data` must be `(x, y)` or `(x, y, sample_weight)` of arrays, or "
            f"a stream of batches. Received: {type(given).__name__}{length}"
        )
    # Refuses what is no stream, or has no end, before anything is trained.
    data.batches(given)
    return TrainingData(given)
