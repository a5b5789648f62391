"""Labels and targets as matrices: checks, one-hot codes and distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from keras_dalign.numerics import Array

# Soft labels may come in low precision. A row whose sum differs from 1 by at most this
# much counts as a rounded distribution. Losses and lower bounds are exact for the row
# as given.
ROW_SUM_TOLERANCE = 1e-3


def finite_float64(y: Any, noun: str) -> Array:
    """Checks labels or targets.

    Args:
        y: Labels or targets, an array of any shape.
        noun: What they are, for the error: "labels" or "targets".

    Returns:
        The same values in float64.

    Raises:
        ValueError: If they are not real numbers, or not finite.
    """
    array = np.asarray(y)
    # `astype` would parse strings as numbers, and drop imaginary parts with a warning.
    if array.dtype.kind in "cOSUMm":
        raise ValueError(
            f"The {noun} `y` must be real numbers; encode names as integers first, and "
            f"give objects a dtype. Received: {noun} of dtype {array.dtype}"
        )
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0][0]) if array.ndim else 0
        raise ValueError(
            f"The {noun} `y` must be finite: remove or repair the samples with missing "
            f"values. Received: {array[~np.isfinite(array)][0]} in row {row}"
        )
    return array


def as_matrix(labels: Array, n_outputs: int, noun: str) -> Array:
    """Checks the shape of labels that have one value per output.

    Args:
        labels: Shape `(n, C)`, or `(n,)` for a single output.
        n_outputs: Number of the model's outputs, `C`.
        noun: What they are, for the error; a capital first.

    Returns:
        The labels, shape `(n, C)`.

    Raises:
        ValueError: If the shape is another one.
    """
    if labels.ndim == 1 and n_outputs == 1:
        labels = labels[:, None]
    if labels.ndim != 2 or labels.shape[1] != n_outputs:
        also = " or (n,)" if n_outputs == 1 else ""
        raise ValueError(
            f"{noun} `y` must have shape (n, {n_outputs}){also}, as the model has "
            f"{n_outputs} outputs. Received: shape {labels.shape}"
        )
    return labels


def check_unit_interval(labels: Array) -> None:
    """Checks that all labels are between 0 and 1.

    Args:
        labels: An array of any shape.

    Raises:
        ValueError: If a label is outside.
    """
    valid = (labels >= 0) & (labels <= 1)
    if not valid.all():
        raise ValueError(
            "Labels `y` of a cross-entropy must be between 0 and 1; map labels such as "
            f"-1 and 1 to 0 and 1 first. Received: label {labels[~valid][0]:g}"
        )


def one_hot(labels: Array, n_outputs: int) -> Array:
    """Class indices as one-hot rows.

    Args:
        labels: Class indices, shape `(n,)` or `(n, 1)`.
        n_outputs: Number of classes, `C`.

    Returns:
        Shape `(n, C)`.

    Raises:
        ValueError: If the shape is another one, or a label is not an integer from 0 to
            `C - 1`.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise ValueError(
            "Sparse labels `y` must have shape (n,) or (n, 1). For one-hot labels "
            "use `keras.losses.CategoricalCrossentropy(from_logits=True)`. "
            f"Received: labels.shape={labels.shape}"
        )
    valid = (labels >= 0) & (labels < n_outputs) & (labels == np.floor(labels))
    if not valid.all():
        raise ValueError(
            f"Sparse labels `y` must be integers from 0 to {n_outputs - 1}, as the "
            f"model has {n_outputs} outputs. Received: label "
            f"{labels[~valid][0]:g}"
        )
    rows = np.zeros((len(labels), n_outputs))
    rows[np.arange(len(labels)), labels.astype(np.intp)] = 1.0
    return rows


def distributions(labels: Array, n_outputs: int) -> Array:
    """Checks rows of class probabilities.

    Args:
        labels: Shape `(n, C)`.
        n_outputs: Number of classes, `C`.

    Returns:
        The labels.

    Raises:
        ValueError: If the shape is another one, a label is outside `[0, 1]`, or a row
            does not sum to 1.
    """
    if labels.shape[1:] != (n_outputs,):
        raise ValueError(
            f"One-hot or soft labels `y` must have shape (n, {n_outputs}), as the "
            f"model has {n_outputs} outputs. For class indices use `keras.losses."
            "SparseCategoricalCrossentropy(from_logits=True)`. "
            f"Received: labels.shape={labels.shape}"
        )
    check_unit_interval(labels)
    off = np.abs(labels.sum(axis=1) - 1.0)
    if off.size and off.max() > ROW_SUM_TOLERANCE:
        worst = int(off.argmax())
        raise ValueError(
            "Each row of one-hot or soft labels `y` must sum to 1. For several "
            "labels per sample use `keras.losses.BinaryCrossentropy(from_logits="
            "True)`. "
            f"Received: row {worst} with sum {labels[worst].sum():g}"
        )
    return labels
