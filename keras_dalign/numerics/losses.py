"""Losses that are convex in the logits, in NumPy and float64.

The guarantees of this package need a loss that is convex in the model's outputs. Three
families of such losses are here. Each has its value, its derivatives in the logits, and
a lower bound: the least loss that any function of the inputs can have on samples with
identical inputs. `keras_losses.py` finds the family of a Keras loss.

The file is long because each family has the same nine short methods, one after the
other, so that a formula and its derivatives can be compared on one page.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.special
from keras import ops

from keras_dalign.numerics.labels import (
    ROW_SUM_TOLERANCE,
    as_matrix,
    check_unit_interval,
    distributions,
    finite_float64,
    one_hot,
)

if TYPE_CHECKING:
    from keras_dalign.numerics import Array, Indices

_REDUCTIONS = {
    "sum_over_batch_size": "mean over the samples",
    "mean": "mean over the samples",
    "mean_with_sample_weight": "weighted mean over the samples",
    "sum": "sum over the samples",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvexLoss(abc.ABC):
    """A loss that is convex in the logits.

    The empirical loss of `n` samples with weights `w` is
    `sum_i w_i * value_i / normalizer`.

    Args:
        reduction: How Keras reduces the samples' losses to one number:
            `"sum_over_batch_size"` or `"mean"` (divide the weighted sum by `n`),
            `"mean_with_sample_weight"` (divide by the sum of the weights) or `"sum"`.
    """

    reduction: str = "sum_over_batch_size"

    def __post_init__(self) -> None:
        if self.reduction not in _REDUCTIONS:
            raise ValueError(
                "The samples' losses must be reduced to one number, or the training "
                f"objective is undefined. Use one of {sorted(_REDUCTIONS)}. "
                f"Received: reduction={self.reduction!r}"
            )

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The loss in words."""

    @property
    def objective(self) -> str:
        """The loss and its reduction in words."""
        return f"{self.name}, {_REDUCTIONS[self.reduction]}"

    @abc.abstractmethod
    def targets(self, y: Any, n_outputs: int) -> Array:
        """Labels, in any form that the Keras loss accepts, as a target matrix.

        Args:
            y: Labels of `n` samples, in a form that the subclass documents.
            n_outputs: Number of the model's outputs, `C`.

        Returns:
            Targets, label smoothing applied, shape `(n, C)`, float64.

        Raises:
            ValueError: If the labels are not finite numbers, are out of range, or do
                not fit the outputs.
        """

    @abc.abstractmethod
    def value(self, logits: Array, targets: Array) -> Array:
        """Loss of each sample, averaged over the outputs as the Keras loss does.

        Args:
            logits: Model outputs, shape `(n, C)`.
            targets: From `targets`, shape `(n, C)`.

        Returns:
            Losses, shape `(n,)`, at least 0.
        """

    @abc.abstractmethod
    def gradient(self, logits: Array, targets: Array) -> Array:
        """Gradient of each sample's loss in its own logits.

        Args:
            logits: Model outputs, shape `(n, C)`.
            targets: From `targets`, shape `(n, C)`.

        Returns:
            Gradients, shape `(n, C)`.
        """

    def value_and_gradient(self, logits: Array, targets: Array) -> tuple[Array, Array]:
        """`value` and `gradient` together, `(n,)` and `(n, C)`."""
        return self.value(logits, targets), self.gradient(logits, targets)

    @abc.abstractmethod
    def value_and_gradient_on_device(
        self, logits: Any, targets: Any
    ) -> tuple[Any, Any]:
        """`value` and `gradient` for tensors of Keras's backend, in their dtype.

        Args:
            logits: Shape `(n, C)`.
            targets: Shape `(n, C)`.

        Returns:
            Tensors of shapes `(n,)` and `(n, C)`.
        """

    @abc.abstractmethod
    def curvature(self, logits: Array, targets: Array) -> tuple[Array, Array | None]:
        """Hessian of each sample's loss in its own logits.

        Args:
            logits: Model outputs, shape `(n, C)`.
            targets: From `targets`, shape `(n, C)`.

        Returns:
            Arrays `a` and `b` of shape `(n, C)`: the Hessians are
            `diag(a_i) - b_i b_i^T`; None for `b` of 0.
        """

    @abc.abstractmethod
    def max_curvature(self, n_outputs: int) -> float:
        """The largest eigenvalue that a sample's Hessian can have, for any logits.

        Args:
            n_outputs: Number of the model's outputs, `C`.

        Returns:
            1/2 for the softmax, `1 / (4 C)` for binary cross-entropy and `2 / C` for
            squared error.
        """

    def aligned_targets(self, targets: Array) -> Array:
        """The modified targets `Y_l` of the alignment condition (theory, section 2).

        Args:
            targets: From `targets`, shape `(n, C)`.

        Returns:
            `2 Y - 1` for the cross-entropies, `Y` for squared error; `(n, C)`.
        """
        return 2.0 * targets - 1.0

    def lower_bound(
        self,
        targets: Array,
        weights: Array,
        groups: Indices,
        n_groups: int,
    ) -> Array:
        """The infimum of the weighted loss of each group over one output per group.

        Any function gives samples with identical inputs identical outputs. The best
        constant output of a group has a closed form: its weighted mean target (squared
        error), or the logits of that mean (cross-entropies).

        Args:
            targets: From `targets`, shape `(n, C)`.
            weights: Sample weights, at least 0, shape `(n,)`.
            groups: Group of each sample, in `0..n_groups - 1`, shape `(n,)`.
            n_groups: Number of groups.

        Returns:
            The infimum over `z` of `sum_i w_i * value(z, target_i)` over the members
            `i` of each group, shape `(n_groups,)`; 0 for a group without weight.
        """
        totals = _group_sum(weights[:, None], groups, n_groups)
        # A group without weight has sums of 0; any divisor keeps them 0.
        divisors = np.where(totals > 0, totals, 1.0)
        return self._group_infimum(targets, weights[:, None], groups, divisors)

    @abc.abstractmethod
    def _group_infimum(
        self, targets: Array, weights: Array, groups: Indices, total: Array
    ) -> Array:
        """`lower_bound`, given weights `(n, 1)` and their sums `(n_groups, 1)`."""

    def normalizer(self, n_samples: int, total_weight: float) -> float:
        """The divisor of the weighted sum of the samples' losses.

        Args:
            n_samples: Number of samples.
            total_weight: Sum of their weights.

        Returns:
            The divisor, positive if the total weight is.
        """
        if self.reduction == "sum":
            return 1.0
        if self.reduction == "mean_with_sample_weight":
            return float(total_weight)
        return float(n_samples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxCrossEntropy(ConvexLoss):
    """Cross-entropy of a softmax over the logits.

    Args:
        sparse: Whether labels are class indices, shape `(n,)` or `(n, 1)`, or rows of
            class probabilities (one-hot or soft), shape `(n, C)`.
        label_smoothing: In `[0, 1]`: the share of each target that is spread evenly
            over the classes.
        reduction: See `ConvexLoss`.
    """

    sparse: bool = True
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_smoothing(self.label_smoothing)

    @property
    def name(self) -> str:
        """The loss in words."""
        return "softmax cross-entropy" + _smoothing_words(self.label_smoothing)

    def targets(self, y: Any, n_outputs: int) -> Array:
        """Labels as a target matrix; see `ConvexLoss`."""
        if n_outputs < 2:
            raise ValueError(
                "A softmax over one output is constant. Use `keras.losses."
                "BinaryCrossentropy(from_logits=True)` for two classes, or give the "
                f"model an output per class. Received: n_outputs={n_outputs}"
            )
        labels = finite_float64(y, "labels")
        targets = (
            one_hot(labels, n_outputs)
            if self.sparse
            else distributions(labels, n_outputs)
        )
        smoothing = self.label_smoothing
        return targets * (1.0 - smoothing) + smoothing / n_outputs

    def value(self, logits: Array, targets: Array) -> Array:
        """Loss of each sample; see `ConvexLoss`."""
        return self.value_and_gradient(logits, targets)[0]

    def gradient(self, logits: Array, targets: Array) -> Array:
        """Gradient of each sample's loss in its logits; see `ConvexLoss`."""
        return self.value_and_gradient(logits, targets)[1]

    def value_and_gradient(self, logits: Array, targets: Array) -> tuple[Array, Array]:
        """Both, from one exponential of each logit; see `ConvexLoss`."""
        top = logits.argmax(axis=1)[:, None]
        below = np.take_along_axis(logits, top, axis=1) - logits
        shares = np.exp(-below)
        np.put_along_axis(shares, top, 0.0, axis=1)
        # log(sum exp z) = max z + log1p(rest): with the largest term outside the sum,
        # losses far below the rounding of 1 stay accurate.
        rest = shares.sum(axis=1, keepdims=True)
        value = (targets * (below + np.log1p(rest))).sum(axis=1)
        np.put_along_axis(shares, top, 1.0, axis=1)
        shares *= targets.sum(axis=1, keepdims=True) / (1.0 + rest)
        shares -= targets
        return value, shares

    def value_and_gradient_on_device(
        self, logits: Any, targets: Any
    ) -> tuple[Any, Any]:
        """Both, for tensors; see `ConvexLoss`."""
        below = ops.max(logits, axis=1, keepdims=True) - logits
        top = ops.equal(below, 0.0)
        shares = ops.exp(-below)
        # Written so that small losses and gradients stay accurate in float32.
        others = ops.sum(ops.where(top, 0.0, shares), axis=1, keepdims=True)
        tied = ops.sum(ops.cast(top, shares.dtype), axis=1, keepdims=True)
        rest = (tied - 1.0) + others
        value = ops.sum(targets * (below + ops.log1p(rest)), axis=1)
        mass = ops.sum(targets, axis=1, keepdims=True)
        scale = mass / (1.0 + rest)
        return value, ops.where(
            top, (mass - targets) - scale * rest, scale * shares - targets
        )

    def curvature(self, logits: Array, targets: Array) -> tuple[Array, Array | None]:
        """`diag(p) - p p^T` for the probabilities `p`; see `ConvexLoss`."""
        mass = targets.sum(axis=1, keepdims=True)
        probabilities = scipy.special.softmax(logits, axis=1)
        return mass * probabilities, np.sqrt(mass) * probabilities

    def max_curvature(self, n_outputs: int) -> float:  # noqa: ARG002
        """1/2, up to the rounding of soft labels; see `ConvexLoss`."""
        return 0.5 * (1.0 if self.sparse else 1.0 + ROW_SUM_TOLERANCE)

    def _group_infimum(
        self, targets: Array, weights: Array, groups: Indices, total: Array
    ) -> Array:
        # Divided by the sum of the targets, not of the weights: exact also for rounded
        # soft labels, whose rows do not quite sum to 1.
        sums = _group_sum(weights * targets, groups, len(total))
        mass = sums.sum(axis=1, keepdims=True)
        return _entropy_terms(sums, mass).sum(axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinaryCrossEntropy(ConvexLoss):
    """Cross-entropy of a sigmoid of each logit, averaged over the outputs.

    Labels are in `[0, 1]`, of shape `(n, C)`, or `(n,)` for a single output.

    Args:
        label_smoothing: In `[0, 1]`: how far targets are moved towards 1/2.
        reduction: See `ConvexLoss`.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_smoothing(self.label_smoothing)

    @property
    def name(self) -> str:
        """The loss in words."""
        return "binary cross-entropy" + _smoothing_words(self.label_smoothing)

    def targets(self, y: Any, n_outputs: int) -> Array:
        """Labels as a target matrix; see `ConvexLoss`."""
        labels = as_matrix(finite_float64(y, "labels"), n_outputs, "Binary labels")
        check_unit_interval(labels)
        return labels * (1.0 - self.label_smoothing) + 0.5 * self.label_smoothing

    def value(self, logits: Array, targets: Array) -> Array:
        """Loss of each sample; see `ConvexLoss`."""
        losses = targets * np.logaddexp(0.0, -logits)
        losses += (1.0 - targets) * np.logaddexp(0.0, logits)
        return losses.mean(axis=1)

    def gradient(self, logits: Array, targets: Array) -> Array:
        """Gradient of each sample's loss in its logits; see `ConvexLoss`."""
        sigmoid = np.exp(-np.logaddexp(0.0, -logits))
        return (sigmoid - targets) / logits.shape[1]

    def value_and_gradient_on_device(
        self, logits: Any, targets: Any
    ) -> tuple[Any, Any]:
        """Both, for tensors; see `ConvexLoss`."""
        losses = targets * ops.softplus(-logits)
        losses = losses + (1.0 - targets) * ops.softplus(logits)
        # Equal to sigmoid - target, and accurate where that is small.
        slopes = (1.0 - targets) * ops.sigmoid(logits) - targets * ops.sigmoid(-logits)
        return ops.mean(losses, axis=1), slopes / logits.shape[1]

    def curvature(self, logits: Array, targets: Array) -> tuple[Array, Array | None]:  # noqa: ARG002
        """`p (1 - p) / C` for the probabilities `p`; see `ConvexLoss`."""
        slopes = scipy.special.expit(logits) * scipy.special.expit(-logits)
        return slopes / logits.shape[1], None

    def max_curvature(self, n_outputs: int) -> float:
        """`1 / (4 C)`; see `ConvexLoss`."""
        return 0.25 / n_outputs

    def _group_infimum(
        self, targets: Array, weights: Array, groups: Indices, total: Array
    ) -> Array:
        ones = _group_sum(weights * targets, groups, len(total))
        zeros = _group_sum(weights * (1.0 - targets), groups, len(total))
        entropies = _entropy_terms(ones, ones + zeros)
        return (entropies + _entropy_terms(zeros, ones + zeros)).mean(axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquaredError(ConvexLoss):
    """Squared error, averaged over the outputs.

    Targets have shape `(n, C)`, or `(n,)` for a single output.

    Args:
        reduction: See `ConvexLoss`.
    """

    @property
    def name(self) -> str:
        """The loss in words."""
        return "squared error"

    def targets(self, y: Any, n_outputs: int) -> Array:
        """Labels as a target matrix; see `ConvexLoss`."""
        return as_matrix(finite_float64(y, "targets"), n_outputs, "Targets")

    def value(self, logits: Array, targets: Array) -> Array:
        """Loss of each sample; see `ConvexLoss`."""
        return np.square(logits - targets).mean(axis=1)

    def gradient(self, logits: Array, targets: Array) -> Array:
        """Gradient of each sample's loss in its logits; see `ConvexLoss`."""
        return (logits - targets) * (2.0 / logits.shape[1])

    def value_and_gradient_on_device(
        self, logits: Any, targets: Any
    ) -> tuple[Any, Any]:
        """Both, for tensors; see `ConvexLoss`."""
        errors = logits - targets
        return ops.mean(ops.square(errors), axis=1), errors * (2.0 / logits.shape[1])

    def curvature(self, logits: Array, targets: Array) -> tuple[Array, Array | None]:  # noqa: ARG002
        """`2 / C`; see `ConvexLoss`."""
        return np.full(logits.shape, 2.0 / logits.shape[1]), None

    def max_curvature(self, n_outputs: int) -> float:
        """`2 / C`; see `ConvexLoss`."""
        return 2.0 / n_outputs

    def aligned_targets(self, targets: Array) -> Array:
        """The targets themselves; see `ConvexLoss`."""
        return targets

    def _group_infimum(
        self, targets: Array, weights: Array, groups: Indices, total: Array
    ) -> Array:
        means = _group_sum(weights * targets, groups, len(total)) / total
        squares = weights * np.square(targets - means[groups])
        return _group_sum(squares, groups, len(total)).mean(axis=1)


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(
            "`label_smoothing` must be between 0 and 1. "
            f"Received: label_smoothing={label_smoothing}"
        )


def _smoothing_words(label_smoothing: float) -> str:
    return f" with label smoothing {label_smoothing:g}" if label_smoothing else ""


def _group_sum(values: Array, groups: Indices, n_groups: int) -> Array:
    sums = np.zeros((n_groups, values.shape[1]))
    np.add.at(sums, groups, values)
    return sums


def _entropy_terms(parts: Array, totals: Array) -> Array:
    """`parts * log(totals / parts)`, with `0 log(.../0) = 0`."""
    shares = np.divide(parts, totals, out=np.ones_like(parts), where=parts > 0)
    return -parts * np.log(shares)
