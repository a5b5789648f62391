"""The loss of a base model, as a loss of the aligned model's logits."""

from __future__ import annotations

from typing import Any

import keras

from keras_dalign import compat
from keras_dalign.numerics.keras_losses import convex_loss

# Losses of the probabilities that these nonlinearities give.
_FROM_LOGITS = {
    "softmax": (
        keras.losses.SparseCategoricalCrossentropy,
        keras.losses.CategoricalCrossentropy,
    ),
    "sigmoid": (keras.losses.BinaryCrossentropy,),
}
# The same losses as functions.
_FUNCTIONS = {
    keras.losses.SparseCategoricalCrossentropy: (
        keras.losses.sparse_categorical_crossentropy
    ),
    keras.losses.CategoricalCrossentropy: keras.losses.categorical_crossentropy,
    keras.losses.BinaryCrossentropy: keras.losses.binary_crossentropy,
}


def loss_of_logits(
    loss: Any, dropped: tuple[str, ...] | None
) -> keras.losses.Loss | None:
    """Turns the loss that a model was compiled with into a loss of logits.

    Args:
        loss: The loss, as in `keras.Model.compile`.
        dropped: The nonlinearities that were removed behind the logits; None if unknown
            operations were.

    Returns:
        The loss itself if nothing was removed. The same loss with `from_logits=True` if
        exactly the nonlinearity was removed that its probabilities need. None in all
        other cases, and if the loss is not convex.
    """
    try:
        loss = keras.losses.get(_single_loss(loss))
    except (TypeError, ValueError):
        return None
    if loss is None or dropped is None:
        return None
    if not dropped:
        return loss if _is_convex(loss) else None
    for kind in _FROM_LOGITS.get("".join(dropped), ()):
        if type(loss) is kind:
            options = compat.loss_options(loss)
            if options["from_logits"]:
                return None
            options["from_logits"] = True
            rebuilt = kind(**options, reduction=loss.reduction, name=loss.name)
        elif loss is _FUNCTIONS[kind]:
            rebuilt = kind(from_logits=True)
        else:
            continue
        return rebuilt if _is_convex(rebuilt) else None
    return None


def _single_loss(loss: Any) -> Any:
    """The one loss in a list or dict of losses, None if there are several."""
    if isinstance(loss, dict) and "class_name" not in loss:
        loss = list(loss.values())
    if isinstance(loss, (list, tuple)):
        return loss[0] if len(loss) == 1 else None
    return loss


def _is_convex(loss: Any) -> bool:
    try:
        convex_loss(loss)
    except ValueError:
        return False
    return True
