"""The last layer of slimTrain: iterative sampled Tikhonov regularisation.

A network `f(x) = [z(x), 1] W` with squared loss is separable: for fixed features `z`
the best `W` has a closed form. slimTrain (Newman, Chung, Chung, Ruthotto, SIAM J. Sci.
Comput. 2022) takes one step of an iterative closed form for every batch, and no step of
gradient descent. A batch `k` of `b` samples has

    Z_k = [z, 1] / sqrt(b),  C_k = targets / sqrt(b),  R = Z_k W_{k-1} - C_k,
    G_k = the sum of Z_j^T Z_j over the last `memory + 1` batches,
    Lambda_k = Lambda_{k-1} + lam,
    W_k = W_{k-1} - (G_k + Lambda_k I)^{-1} (Z_k^T R + lam W_{k-1}),

where the features of earlier batches are kept as they were. With a `lam` chosen for
each batch this is sampled Tikhonov (Slagel et al., Inverse Problems 2019); `lam = 0`
holds `Lambda` at what it was.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt
import scipy.linalg

Array = npt.NDArray[np.float64]

# Changes of Lambda that are tried at every batch, of either sign, and their range.
_CHANGES = 30
_SMALLEST, _LARGEST = float(np.finfo(np.float64).eps), 1e3
# Lambda is never below this.
LEAST_STRENGTH = 1e-7


class LastLayer:
    """A linear layer with a bias, trained batch by batch in closed form.

    Args:
        weights: `W_0`, shape `(p + 1, C)`, the bias last.
        strength: `Lambda_0`, at least `LEAST_STRENGTH`.
        chosen: Whether `lam` is chosen for every batch by sampled generalised
            cross-validation. Otherwise it is 0, and `Lambda` stays.
        memory: Number of earlier batches whose features count, at least 0; None for
            all of them.

    Attributes:
        weights: `W_k`, shape `(p + 1, C)`, float64.
        strength: `Lambda_k`.

    Raises:
        ValueError: If the strength or the memory is out of its range.
    """

    def __init__(
        self,
        weights: npt.ArrayLike,
        *,
        strength: float,
        chosen: bool,
        memory: int | None,
    ) -> None:
        if not strength >= LEAST_STRENGTH:
            raise ValueError(
                f"`strength` must be at least {LEAST_STRENGTH:g}: without it the Gram "
                f"matrix of a few batches is singular. Received: strength={strength}"
            )
        if memory is not None and memory < 0:
            raise ValueError(
                f"`memory` must be at least 0, or None. Received: memory={memory}"
            )
        self.weights = np.array(weights, dtype=np.float64)
        self.strength = float(strength)
        self.chosen = chosen
        self._grams: deque[Array] = deque(maxlen=None if memory is None else memory + 1)

    def step(self, features: npt.ArrayLike, targets: npt.ArrayLike) -> None:
        """Takes one batch.

        Args:
            features: `(b, p)`.
            targets: `(b, C)`.
        """
        features, targets = np.asarray(features), np.asarray(targets, dtype=np.float64)
        root = np.sqrt(len(features))
        rows = np.c_[features, np.ones(len(features))].astype(np.float64) / root
        batch = Batch(rows, targets / root, self.weights, self._with(rows.T @ rows))
        change = 0.0
        if self.chosen:
            tried = changes(self.strength)
            change = float(tried[np.argmin(batch.scores(tried, self.strength))])
        self.strength += change
        self.weights = batch.updated(change, self.strength)

    def _with(self, gram: Array) -> Array:
        """The Gram matrix `G_k`, after one more batch."""
        self._grams.append(gram)
        total: Array = np.sum(self._grams, axis=0)
        return total


class Batch:
    """The step of one batch as a function of `lam`.

    One eigendecomposition of `G` serves every `lam`.

    Args:
        rows: `Z`, shape `(b, p + 1)`.
        targets: `C`, shape `(b, C)`.
        weights: `W` before the step, shape `(p + 1, C)`.
        gram: `G`, shape `(p + 1, p + 1)`.
    """

    def __init__(
        self, rows: Array, targets: Array, weights: Array, gram: Array
    ) -> None:
        self.weights = weights
        self._values, self._vectors = scipy.linalg.eigh(gram, check_finite=False)
        self._rows = rows @ self._vectors
        self._residuals = rows @ weights - targets
        self._slope = self._rows.T @ self._residuals
        self._turned = self._vectors.T @ weights

    def updated(self, change: float, strength: float) -> Array:
        """`W` after the step with `lam = change`, which makes `Lambda = strength`."""
        step = (self._slope + change * self._turned) / (self._values + strength)[
            :, None
        ]
        new: Array = self.weights - self._vectors @ step
        return new

    def scores(self, changes: Array, strength: float) -> Array:
        """Sampled generalised cross-validation of several `lam`.

        `|Z W(lam) - C|^2 / (b C - C tr(Z (G + Lambda I)^{-1} Z^T))^2`: the squared
        residuals of the batch after the step, over the squared number of residuals that
        the step did not use up.

        Args:
            changes: The values of `lam`, shape `(k,)`.
            strength: `Lambda` before the step.

        Returns:
            One score for each, shape `(k,)`; the least is best.
        """
        inverse = 1.0 / (self._values + strength + changes[:, None])
        steps = self._slope + changes[:, None, None] * self._turned
        residuals = self._residuals - self._rows @ (inverse[:, :, None] * steps)
        traces = inverse @ np.square(self._rows).sum(axis=0)
        samples, outputs = self._residuals.shape
        free = outputs * (samples - traces)
        scores: Array = np.square(residuals).sum(axis=(1, 2)) / np.square(free)
        return scores


def changes(strength: float) -> Array:
    """The values of `lam` that are tried where `Lambda` is `strength`.

    Returns:
        Numbers of both signs, evenly spaced in their logarithms, without those that
        bring `Lambda` below `LEAST_STRENGTH`.
    """
    up = np.geomspace(_SMALLEST, _LARGEST, _CHANGES)
    down = -np.geomspace(_SMALLEST, strength, _CHANGES)
    tried = np.concatenate([up, down])
    return tried[strength + tried >= LEAST_STRENGTH]
