"""The samples of a phase as they were given to `fit`, and checks of them."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras.src.trainers.data_adapters.array_slicing import train_validation_split
from keras.src.trainers.data_adapters.data_adapter_utils import (
    class_weight_to_sample_weights,
)

from keras_dalign.head import data
from keras_dalign.head.objective import single_array
from keras_dalign.head.streams import nonempty
from keras_dalign.numerics.arguments import number, shown

if TYPE_CHECKING:
    from keras_dalign.head.alignment_head import AlignmentHead
    from keras_dalign.numerics.losses import ConvexLoss
    from keras_dalign.training.aligned_model import AlignedModel

# Names of the arguments that hold other data than `x`, `y` and `sample_weight`.
VALIDATION_DATA, EXPLOIT = "validation_data", "exploit_data"

# Labels are checked in blocks of rows, as the check makes an array `(rows, classes)`.
_CHECKED_AT_ONCE = 8192
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingData:
    """Arrays or a stream.

    Attributes:
        x: Inputs, or the stream.
        y: Targets, for arrays.
        sample_weight: Weights `(n,)`, for arrays.
        steps: Batches in a pass over the stream, or None for all of them.
        name: The argument that holds them; empty for `x`, `y` and `sample_weight`.
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

    def n_batches(self, batch_size: int) -> int | None:
        """Number of batches in a pass.

        Args:
            batch_size: Samples in a batch of arrays.

        Returns:
            The number, or None if it is unknown.
        """
        if self.steps is not None:
            return self.steps
        if self.n is not None:
            return math.ceil(self.n / batch_size)
        try:
            return len(self.x)
        except TypeError:
            return None

    def check(self, model: AlignedModel, loss: ConvexLoss) -> None:
        """Checks that arrays fit the model and its loss; streams are not read.

        Args:
            model: The model.
            loss: Its loss.

        Raises:
            ValueError: If arrays are empty, non-finite or of the wrong shape or kind,
                if targets are missing, do not fit the loss, or make it overflow
                float32.
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
            rows = y[start : start + _CHECKED_AT_ONCE]
            targets = loss.targets(rows, model.head.units)
            with np.errstate(over="ignore"):
                largest = loss.value(np.zeros_like(targets), targets).max(initial=0.0)
            if largest * len(rows) > _FLOAT32_MAX:
                raise ValueError(
                    f"The targets `y`{of} are so large that the loss overflows "
                    "float32. Scale them, for example to a standard deviation of 1. "
                    f"Received: targets up to {np.abs(targets).max():g}, with a loss "
                    f"of {largest:g} at outputs of 0"
                )

    def nonempty(self) -> TrainingData:
        """The same data, after a check that an iterator has a batch."""
        x = nonempty(self.x, f"`{self.name or 'x'}`")
        return self if x is self.x else dataclasses.replace(self, x=x)

    def check_number(self, head: AlignmentHead) -> None:
        """Checks the number of samples against the head's; streams are not read.

        Args:
            head: The head.

        Raises:
            ValueError: If arrays hold more samples than the head was made for.
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
    """Interprets an argument that holds data.

    Args:
        name: Name of the argument.
        given: `(x, y)` or `(x, y, sample_weight)` of arrays, or a stream.
        steps: Batches in a pass over the stream, or None for all of them.
        steps_name: The argument that `steps` comes from, or None if there is none.

    Returns:
        The data, unchecked.

    Raises:
        ValueError: If it is neither such a tuple nor a stream.
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


def split_for_validation(
    x: Any, y: Any, sample_weight: Any, validation_split: float, exploit_data: Any
) -> tuple[Any, Any, Any, Any]:
    """Splits off the samples for validation, as Keras does.

    Args:
        x: Inputs.
        y: Targets.
        sample_weight: Sample weights, or None.
        validation_split: The share of the samples that is split off.
        exploit_data: The data of exploitation, if they differ.

    Returns:
        Inputs, targets and weights for training, and a tuple of those for validation.

    Raises:
        ValueError: If `x` is a stream, or there are data of exploitation.
    """
    if not data.is_arrays(x):
        raise ValueError(
            "`validation_split` needs arrays. Received: validation_split="
            f"{validation_split} with x of type {type(x).__name__}. Pass "
            "validation_data."
        )
    if exploit_data is not None:
        raise ValueError(
            "`validation_split` does not split `exploit_data`, which may hold the "
            "samples that are split off. Received: both, validation_split="
            f"{validation_split}. Pass validation_data."
        )
    (x, y, sample_weight), validation_data = train_validation_split(
        (x, y, sample_weight), validation_split=validation_split
    )
    return x, y, sample_weight, validation_data


def check_class_weight(class_weight: Any, sample_weight: Any) -> None:
    """Checks the weights of classes.

    Args:
        class_weight: A dict from classes to weights, or None.
        sample_weight: The sample weights that were given with it, or None.

    Raises:
        ValueError: If it is no such dict, or both are given.
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


def class_weighted(
    y: Any, sample_weight: Any, class_weight: dict[int, float] | None
) -> Any:
    """The sample weights, or the weights of the samples' classes.

    Args:
        y: Labels of the samples.
        sample_weight: Their weights, or None.
        class_weight: Weights by class, or None.

    Returns:
        Weights `(n,)`, or None.

    Raises:
        ValueError: If both are given.
    """
    if not class_weight:
        return sample_weight
    if sample_weight is not None:
        raise ValueError(
            "`class_weight` and the sample weights of a stream cannot be given "
            f"both. Received: class_weight={shown(class_weight)} beside them. "
            "Leave `class_weight` out."
        )
    return class_weight_to_sample_weights(y, class_weight)
