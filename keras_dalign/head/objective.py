"""The training objective: its loss, its sample weights, and whether it is defined.

Certificates, forecasts and solvers all read it here, so they refer to the same one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_dalign.numerics.arguments import keras_model
from keras_dalign.numerics.keras_losses import convex_loss

if TYPE_CHECKING:
    from keras_dalign.numerics import Array
    from keras_dalign.numerics.losses import ConvexLoss


def loss_of(model: keras.Model, loss: Any = None) -> ConvexLoss:
    """The loss that was given, or the one that the model was compiled with.

    Args:
        model: The model. An aligned one that was not compiled has the loss of its base
            model.
        loss: A loss as in `keras.Model.compile`, or None.

    Returns:
        The convex loss.

    Raises:
        ValueError: If `model` is no model, there is no loss, or it is not convex in the
            model's outputs.
    """
    keras_model(model)
    for attribute in ("loss", "inherited_loss"):
        if loss is None:
            loss = getattr(model, attribute, None)
    if loss is None:
        raise ValueError(
            "The model has no loss: pass `loss`, or call "
            "`model.compile(loss=...)` first. Received: loss=None"
        )
    return convex_loss(loss)


def check_outputs(model: keras.Model, loss: ConvexLoss) -> None:
    """Checks that a model has one output, of logits where the loss takes them.

    Args:
        model: The model. The outputs of a subclassed one are unknown and not checked.
        loss: The loss.

    Raises:
        ValueError: If there are several outputs, or a softmax or sigmoid is the last
            layer and the loss is a cross-entropy.
    """
    check_single(len(getattr(model, "outputs", None) or [None]))
    layers = getattr(model, "layers", None)
    if not layers or loss.name == "squared error":
        return
    last = layers[-1]
    activation = getattr(last, "activation", None)
    squashing = (keras.activations.softmax, keras.activations.sigmoid)
    if isinstance(last, keras.layers.Softmax) or activation in squashing:
        raise ValueError(
            "The loss takes logits, but the model ends in a softmax or sigmoid. Remove "
            f"it, and keep from_logits=True. Received: last layer '{last.name}'"
        )


def check_single(n_outputs: int) -> None:
    """Checks that a model has one output.

    Args:
        n_outputs: Number of the model's outputs.

    Raises:
        ValueError: If it is not 1.
    """
    if n_outputs != 1:
        raise ValueError(
            "A model with one output is needed; make a model of the one that you want "
            f"to certify. Received: {n_outputs} outputs"
        )


def check_targets(y: Any) -> None:
    """Checks that there are targets.

    Args:
        y: The targets of some samples, or None.

    Raises:
        ValueError: If there are none.
    """
    if y is None:
        raise ValueError(
            "Targets are needed: pass `y`, or a stream of (x, y) batches. Received: "
            "y=None"
        )


def sample_weights(sample_weight: Any, n: int) -> Array:
    """Sample weights as a vector.

    Args:
        sample_weight: Weights, shape `(n,)` or `(n, 1)`, or None for ones.
        n: Number of samples.

    Returns:
        Weights `(n,)`, float64.

    Raises:
        ValueError: If they are of another shape, negative or not finite.
    """
    if sample_weight is None:
        return np.ones(n)
    weights = single_array(sample_weight, "sample_weight")
    if weights.shape not in ((n,), (n, 1)):
        raise ValueError(
            f"`sample_weight` must hold one weight per sample, shape ({n},). "
            f"Received: sample_weight.shape={weights.shape}"
        )
    weights = weights.reshape(n).astype(np.float64)
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(
            "`sample_weight` must be finite and at least 0, or the objective is not "
            f"convex. Received: {weights[~(np.isfinite(weights) & (weights >= 0))][0]}"
        )
    return weights


def checked_weights(sample_weight: Any, n: int) -> Array:
    """Sample weights as a vector, not all of them 0.

    Args:
        sample_weight: Weights, shape `(n,)` or `(n, 1)`, or None for ones.
        n: Number of samples.

    Returns:
        Weights `(n,)`, float64.

    Raises:
        ValueError: As `sample_weights` and `check_some_weight`.
    """
    weights = sample_weights(sample_weight, n)
    check_some_weight(n, float(weights.sum()))
    return weights


def check_some_weight(n: int, total_weight: float) -> None:
    """Checks that the objective is not empty.

    Args:
        n: Number of samples.
        total_weight: Sum of their weights.

    Raises:
        ValueError: If it is 0.
    """
    if total_weight <= 0:
        raise ValueError(
            "All of `sample_weight` are 0: there is nothing to certify. Received: "
            f"{n} samples of weight 0"
        )


def single_array(structure: Any, name: str) -> np.ndarray:
    """The one array in a structure.

    Args:
        structure: Arrays, as a stream or a user gives them.
        name: What they are, for the error.

    Returns:
        The array.

    Raises:
        ValueError: If there are several.
    """
    leaves = keras.tree.flatten(structure)
    if len(leaves) != 1:
        raise ValueError(
            f"`{name}` must be one array, for a model with one output. "
            f"Received: {len(leaves)} arrays"
        )
    return np.asarray(leaves[0])
