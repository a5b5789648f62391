"""Measures of the probabilities of a classifier, in NumPy."""

from __future__ import annotations

import numpy as np


def nll(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log likelihood, the softmax cross-entropy, in float64.

    Computed from differences to the label's logit, so that a loss of 1e-12 has all
    its digits.

    Args:
        logits: Shape `(n, classes)`.
        labels: Int labels, shape `(n,)`.

    Returns:
        The loss, in nats.
    """
    logits = logits.astype("float64")
    rows = np.arange(len(labels))
    differences = logits - logits[rows, labels][:, None]
    differences[rows, labels] = -np.inf
    others = np.logaddexp.reduce(differences, axis=1)
    return float(np.mean(np.logaddexp(0.0, others)))


def ece(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error.

    The samples are grouped by their confidence, the largest probability, into bins of
    equal width. The error is the mean over samples of the distance between confidence
    and accuracy of their bin.

    Args:
        logits: Shape `(n, classes)`.
        labels: Int labels, shape `(n,)`.
        bins: Number of bins, which contain their upper edge.

    Returns:
        A number in [0, 1].
    """
    probabilities = softmax(logits)
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    found = np.clip(np.ceil(confidence * bins).astype("int64") - 1, 0, bins - 1)
    excess = np.bincount(found, weights=confidence - right, minlength=bins)
    return float(np.abs(excess).sum() / len(labels))


def brier(logits: np.ndarray, labels: np.ndarray) -> float:
    """Brier score: the squared distance of probabilities to one-hot labels.

    Args:
        logits: Shape `(n, classes)`.
        labels: Int labels, shape `(n,)`.

    Returns:
        The mean over samples of the sum over classes, in [0, 2].
    """
    difference = softmax(logits)
    difference[np.arange(len(labels)), labels] -= 1.0
    return float(np.mean(np.sum(difference**2, axis=1)))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities.

    Args:
        logits: Shape `(n, classes)`.

    Returns:
        Float64, shape `(n, classes)`; each row sums to 1.
    """
    shifted = logits.astype("float64")
    shifted -= shifted.max(axis=1, keepdims=True)
    powers = np.exp(shifted)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
