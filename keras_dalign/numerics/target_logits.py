"""Logits that bring the loss to its infimum: the outputs that a model should learn.

For squared error the best outputs are the targets themselves. A cross-entropy reaches
its infimum only in the limit, along `psi * Y_l` as `psi` grows, with the modified
targets `Y_l = 2 Y - 1` of the alignment condition (Kawaguchi, Zhang & Deng 2022). For
soft, smoothed or conflicting targets the best logits are finite instead. `TargetLogits`
holds both parts, as a linear family with two parameters.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from keras_dalign.numerics.losses import BinaryCrossEntropy, SoftmaxCrossEntropy

if TYPE_CHECKING:
    from keras_dalign.numerics import Array, Indices
    from keras_dalign.numerics.losses import ConvexLoss


@dataclasses.dataclass(frozen=True, eq=False)
class TargetLogits:
    """The logits `scale * finite + psi * direction`.

    The loss at `scale = 1` falls to its infimum over all functions of the inputs as
    `psi` grows.

    Attributes:
        finite: The best outputs where they are finite, 0 elsewhere, shape `(n, C)`.
        direction: The direction of best logits that are infinite, 0 elsewhere, shape
            `(n, C)`; `Y_l` for labels that are not smoothed.
    """

    finite: Array
    direction: Array

    def at(self, scale: float, psi: float) -> Array:
        """The logits `(n, C)` at the given parameters."""
        return scale * self.finite + psi * self.direction


def target_logits(
    loss: ConvexLoss, targets: Array, weights: Array, groups: Indices
) -> TargetLogits:
    """The best logits of samples, some of which have identical inputs.

    Samples with identical inputs get the logits of their weighted mean target.

    Args:
        loss: The loss.
        targets: From `ConvexLoss.targets`, shape `(n, C)`.
        weights: Sample weights, at least 0, shape `(n,)`.
        groups: Group number of each sample's input, shape `(n,)`.

    Returns:
        The family.
    """
    means = _group_means(targets, weights, groups)
    if isinstance(loss, SoftmaxCrossEntropy):
        return _softmax(means)
    if isinstance(loss, BinaryCrossEntropy):
        return _sigmoid(means)
    return TargetLogits(means, np.zeros_like(means))


def _softmax(means: Array) -> TargetLogits:
    possible = means > 0
    logs = np.log(means, out=np.zeros_like(means), where=possible)
    centre = logs.sum(axis=1, keepdims=True) / possible.sum(axis=1, keepdims=True)
    direction = np.where(possible, 1.0, -1.0)
    # Adding one number to all logits of a sample does not change the loss.
    direction[possible.all(axis=1)] = 0.0
    return TargetLogits(np.where(possible, logs - centre, 0.0), direction)


def _sigmoid(means: Array) -> TargetLogits:
    inside = (means > 0) & (means < 1)
    odds = np.divide(means, 1.0 - means, out=np.ones_like(means), where=inside)
    return TargetLogits(np.log(odds), np.where(inside, 0.0, 2.0 * means - 1.0))


def _group_means(targets: Array, weights: Array, groups: Indices) -> Array:
    found, members = np.unique(groups, return_inverse=True)
    totals = np.bincount(members, weights, len(found))
    # The mean of a group without weight is arbitrary: take the unweighted one.
    weights = np.where(totals[members] > 0, weights, 1.0)
    totals = np.bincount(members, weights, len(found))
    sums = np.zeros((len(found), targets.shape[1]))
    np.add.at(sums, members, weights[:, None] * targets)
    means = sums[members] / totals[members, None]
    # If all targets of a group agree, use that target, without rounding.
    order = np.argsort(members, kind="stable")
    starts = np.searchsorted(members[order], np.arange(len(found)))
    lowest = np.minimum.reduceat(targets[order], starts)[members]
    highest = np.maximum.reduceat(targets[order], starts)[members]
    return np.clip(means, lowest, highest)
