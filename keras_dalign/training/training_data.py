"""The samples of a phase, as `fit` was given them, and checked."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_dalign.head import data
from keras_dalign.head.objective import single_array
from keras_dalign.numerics.arguments import number, shown

if TYPE_CHECKING:
    from keras_dalign.head.alignment_head import AlignmentHead
    from keras_dalign.numerics.losses import ConvexLoss
    from keras_dalign.training.aligned_model import AlignedModel

# Names of the arguments that hold data of their own.
VALIDATION_DATA, EXPLOIT = "validation_data", "exploit_data"

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
        name: The argument that holds them, if they are no arguments themselves.
        steps_name: The argument that `steps` comes from, or None if there is none.
    """

    x: Any
    y: Any = None
    sample_weight: Any = None
    steps: int | None = None
    name: str = ""
    steps_name: str | None = "steps_per_epoch"

    @property
    def is_array(self) -> bool:
        """Whether these are arrays."""
        return data.is_arrays(self.x)

    @property
    def n(self) -> int | None:
        """Number of samples; None for a stream."""
        return data.n_samples(self.x) if self.is_array else None

    def check(self, model: AlignedModel, loss: ConvexLoss) -> None:
        """Looks for what the model or its loss cannot take; streams are not read.

        Args:
            model: The model.
            loss: Its loss.

        Raises:
            ValueError: If arrays are empty, non-finite or of the wrong shape or kind,
                if targets are missing, or do not fit the loss.
        """
        data.check_data(
            self.x,
            self.y,
            self.sample_weight,
            steps=self.steps,
            steps_name=self.steps_name,
            model=model,
            name=self.name,
        )
        n = self.n
        if n is None:
            return
        of = f" of `{self.name}`" if self.name else ""
        if self.y is None:
            raise ValueError(f"Training needs targets `y`{of}. Received: y=None")
        for leaf in keras.tree.flatten(self.x):
            values = keras.ops.convert_to_numpy(leaf)
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise ValueError(
                    f"The inputs `x`{of} must be finite. Received: x with NaN or "
                    f"infinity in {int((~np.isfinite(values)).sum())} of {values.size} "
                    "entries"
                )
        labels = keras.tree.map_structure(keras.ops.convert_to_numpy, self.y)
        y = single_array(labels, "y")
        for start in range(0, n, _CHECKED_AT_ONCE):
            loss.targets(y[start : start + _CHECKED_AT_ONCE], model.head.units)

    def begun(self) -> TrainingData:
        """The same data, of which an iterator is known to have a batch."""
        x = data.begun(self.x, f"`{self.name or 'x'}`")
        return self if x is self.x else dataclasses.replace(self, x=x)

    def check_number(self, head: AlignmentHead) -> None:
        """Checks that a head is made for so many samples; streams are not read.

        Args:
            head: The head.

        Raises:
            ValueError: If arrays hold more.
        """
        n = self.n
        if n is not None and head.n_samples is not None and n > head.n_samples:
            raise ValueError(
                "The alignment head was made for fewer samples than `x` has. "
                f"Received: {n} samples, n_samples={head.n_samples}. Call "
                f"keras_dalign.align(model, n_samples={n})."
            )


def given_as(
    name: str, given: Any, steps: int | None = None, steps_name: str | None = None
) -> TrainingData:
    """Samples that one argument holds.

    Args:
        name: The argument.
        given: `(x, y)` or `(x, y, sample_weight)` of arrays, or a stream.
        steps: Batches in a pass over the stream, or None for all of them.
        steps_name: The argument that `steps` comes from, or None if there is none.

    Returns:
        The data, not checked yet.

    Raises:
        ValueError: If it is neither.
    """
    is_tuple = isinstance(given, (list, tuple))
    if is_tuple and len(given) in {2, 3} and data.is_arrays(given[0]):
        weight = given[2] if len(given) == 3 else None
        return TrainingData(given[0], given[1], weight, name=name)
    if is_tuple or data.is_arrays(given):
        kind = type(given).__name__
        raise ValueError(
            f"`{name}` must be `(x, y)` or `(x, y, sample_weight)` of arrays, or a "
            "stream of batches; convert lists of numbers with `np.asarray`. Received: "
            f"{f'{kind} of {len(given)}' if is_tuple else shown(given)}"
        )
    return TrainingData(given, steps=steps, name=name, steps_name=steps_name)


def check_class_weight(class_weight: Any, sample_weight: Any) -> None:
    """Checks the weights of classes.

    Args:
        class_weight: A dict from classes to weights, or None.
        sample_weight: The weights of the samples beside it.

    Raises:
        ValueError: If it is another thing, or both are given.
    """
    if class_weight is None:
        return
    if not isinstance(class_weight, dict):
        raise ValueError(
            "`class_weight` must be a dict from class indices to weights, such as "
            "{0: 1.0, 1: 2.5}; dict(enumerate(weights)) makes one of a list. Received: "
            f"class_weight={shown(class_weight)}"
        )
    for label, weight in class_weight.items():
        if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
            raise ValueError(
                "The keys of `class_weight` must be class indices, ints from 0. "
                f"Received: the key {shown(label)}"
            )
        number(
            f"class_weight[{label}]", weight, "a non-negative number", lambda v: v >= 0
        )
    if sample_weight is not None:
        raise ValueError(
            "`class_weight` and `sample_weight` cannot be given both. Received: "
            f"class_weight={shown(class_weight)}, "
            f"sample_weight={shown(sample_weight)}. Multiply the sample weights by "
            "those of their classes, and leave `class_weight` out."
        )
