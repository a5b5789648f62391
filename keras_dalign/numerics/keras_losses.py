"""The convex loss for NumPy that computes the same as a Keras loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras

from keras_dalign.numerics.losses import (
    BinaryCrossEntropy,
    ConvexLoss,
    SoftmaxCrossEntropy,
    SquaredError,
)


def convex_loss(loss: Any) -> ConvexLoss:
    """The convex loss that a Keras model was compiled with.

    Args:
        loss: The `loss` that `model.compile` was given (also `model.loss`): one of
            `keras.losses.SparseCategoricalCrossentropy`, `CategoricalCrossentropy` and
            `BinaryCrossentropy`, each with `from_logits=True`, or `MeanSquaredError`,
            as an object, a Keras name such as `"mse"`, or a list or dict with this one
            entry. A `ConvexLoss` is returned as it is.

    Returns:
        The same loss for NumPy arrays, with the same reduction.

    Raises:
        ValueError: If the loss is another one, which may not be convex in the model's
            outputs, or has options that change its meaning (`ignore_class`, `axis`, no
            reduction).
    """
    if isinstance(loss, ConvexLoss):
        return loss
    given = loss
    loss = _single(loss)
    if isinstance(loss, (str, dict)):
        try:
            loss = keras.losses.get(loss)
        except (TypeError, ValueError):
            raise ValueError(_refusal("Keras does not know this loss", given)) from None
    for function, name in _CROSS_ENTROPY_FUNCTIONS.items():
        if loss is function:
            raise ValueError(_refusal(_takes_probabilities(name), given))
    if loss is keras.losses.mean_squared_error:
        return SquaredError()
    # The exact type: a subclass may compute another loss.
    kind = type(loss)
    if kind is keras.losses.MeanSquaredError:
        return SquaredError(reduction=loss.reduction)
    if kind not in _CROSS_ENTROPIES:
        raise ValueError(_refusal("this loss is not known to be convex in them", given))
    # The arguments of the loss function. The public config lacks some of them.
    options = dict(loss._fn_kwargs)  # noqa: SLF001
    if not options.pop("from_logits", False):
        raise ValueError(_refusal(_takes_probabilities(kind.__name__), given))
    smoothing = options.pop("label_smoothing", 0.0)
    if options.pop("axis", -1) not in {-1, 1}:
        raise ValueError(_refusal("its `axis` is not the last one", given))
    unknown = {name: value for name, value in options.items() if value is not None}
    if unknown:
        raise ValueError(_refusal(f"its options {unknown} are not supported", given))
    return _CROSS_ENTROPIES[kind](reduction=loss.reduction, label_smoothing=smoothing)


_CROSS_ENTROPIES: dict[type, Callable[..., ConvexLoss]] = {
    keras.losses.SparseCategoricalCrossentropy: SoftmaxCrossEntropy,
    keras.losses.CategoricalCrossentropy: functools.partial(
        SoftmaxCrossEntropy, sparse=False
    ),
    keras.losses.BinaryCrossentropy: BinaryCrossEntropy,
}

# Keras's loss functions, and their names, take probabilities.
_CROSS_ENTROPY_FUNCTIONS = {
    keras.losses.sparse_categorical_crossentropy: "SparseCategoricalCrossentropy",
    keras.losses.categorical_crossentropy: "CategoricalCrossentropy",
    keras.losses.binary_crossentropy: "BinaryCrossentropy",
}


def _single(loss: Any) -> Any:
    if isinstance(loss, dict) and "class_name" not in loss:
        loss = list(loss.values())
    if isinstance(loss, (list, tuple)):
        if len(loss) != 1:
            raise ValueError(
                "Models with several outputs or losses are not supported: one output "
                f"and one loss are needed. Received: loss={loss}"
            )
        (loss,) = loss
    return loss


def _takes_probabilities(name: str) -> str:
    return (
        f"`{name}` with from_logits=False takes probabilities (as does every loss "
        "given by name): remove the model's final softmax or sigmoid, and compile with "
        f"`keras.losses.{name}(from_logits=True)`"
    )


def _refusal(why: str, given: Any) -> str:
    return (
        "A loss that is convex in the model's outputs is needed: `keras.losses."
        "SparseCategoricalCrossentropy`, `CategoricalCrossentropy` or "
        "`BinaryCrossentropy` with from_logits=True, or `MeanSquaredError`; but "
        f"{why}. Received: loss={given!r}"
    )
