"""Bounds the distance of a quadratic head's objective to its global minimum.

The objective is not convex in the head's weights, but its relaxation is. The tangent of
the loss at the outputs gives a lower bound on the relaxation (`numerics/quadratic.py`),
and so on the objective for any weights. It is sharp for many units. An allowance for
the rounding of the bound is added, to first order in the unit roundoff.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_dalign import compat
from keras_dalign.head.batch_predictor import BatchPredictor
from keras_dalign.head.objective import sample_weights, single_array
from keras_dalign.head.quadratic_head import QuadraticHead
from keras_dalign.numerics import quadratic
from keras_dalign.numerics.memory import free_gib
from keras_dalign.numerics.rounding import EPS, rounded

if TYPE_CHECKING:
    from keras_dalign.numerics import Array
    from keras_dalign.numerics.losses import ConvexLoss


@dataclasses.dataclass(frozen=True)
class QuadraticBound:
    """An upper bound on the distance of a quadratic head's objective to its minimum.

    With trunk and gates fixed, no weights `w` of the head have an objective below
    `value - gap`. The trunk computes features in its own dtype; all that follows is in
    float64, the gates included.

    Attributes:
        gap: The bound, `rounding` included.
        value: The objective: `loss + penalty * sum_cr |w_cr|^4`.
        loss: The loss.
        penalty: The head's `penalty`.
        rounding: The allowance for the rounding of the bound, a part of `gap`.
    """

    gap: float
    value: float
    loss: float
    penalty: float
    rounding: float

    @property
    def lower_bound(self) -> float:
        """Lower bound on the objective over all weights of the head."""
        return self.value - self.gap

    def to_dict(self) -> dict[str, Any]:
        """The bound as a dict that `json.dumps` accepts."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"With the penalty {self.penalty:g} of its quadratic head, the objective "
            f"is {self.value:.6g}, at most {rounded(self.gap, up=True)} above its "
            "global minimum over the head's weights; from the features on in float64, "
            f"{rounded(self.rounding, up=True)} of it for rounding."
        )


def quadratic_parts(model: keras.Model) -> tuple[keras.Model, QuadraticHead] | None:
    """Splits a model that ends in a quadratic head.

    Args:
        model: Any model.

    Returns:
        The model of the head's features and the head; None if the last layer of the
        graph is another one, or there is no graph.
    """
    ends = compat.graph_ends(model)
    if ends is None or len(ends[1]) != 1:
        return None
    inputs, (output,) = ends
    call, _ = compat.producer(output)
    if not isinstance(call.operation, QuadraticHead):
        return None
    return keras.Model(inputs, call.inputs[0]), call.operation


class QuadraticTally:
    """Sums over the samples, batch by batch, that the bound is computed from.

    Args:
        trunk: The model of the head's features.
        head: The head.
        loss: The loss.

    Raises:
        MemoryError: If one matrix for each unit does not fit into memory.
    """

    def __init__(
        self, trunk: keras.Model, head: QuadraticHead, loss: ConvexLoss
    ) -> None:
        self._trunk = BatchPredictor(trunk)
        self._head = head
        self._loss = loss
        self._w = weights_of(head)
        d, C, m = self._w.shape
        _check_memory(d, C, m)
        self._squared_lengths = np.square(self._w).sum(axis=0)
        self._moments = np.zeros((C, m, d, d))
        # For the rounding of the moments: the sum of the sizes of all terms, and the
        # most that rounding of the cotangents can have changed.
        self._sizes = np.zeros((C, m))
        self._errors = np.zeros((C, m))
        self._n = 0
        self._loss_sum = 0.0
        self._slope = 0.0
        self._slope_size = 0.0
        self._output_errors = 0.0

    @np.errstate(over="ignore", invalid="ignore")  # `bound` raises for overflows.
    def add(self, x: Any, y: Any, sample_weight: Any) -> None:
        """Adds a batch of inputs, targets and weights."""
        u = self._trunk.features(x).astype(np.float64)
        d, C, m = self._w.shape
        weights = sample_weights(sample_weight, len(u))
        targets = self._loss.targets(single_array(y, "y"), C)
        gates = self._head.gates_exactly(u)
        f = quadratic.outputs(u, gates, self._w)
        values, slopes = self._loss.value_and_gradient(f, targets)
        cotangents = weights[:, None] * slopes
        self._n += len(u)
        self._loss_sum += float(weights @ values)
        self._slope += float((cotangents * f).sum())
        self._slope_size += float(np.abs(cotangents * f).sum())
        self._moments += quadratic.moments(u, gates, cotangents)
        # Rounding, by the standard bounds on inner products, and Cauchy-Schwarz.
        curvature = self._loss.max_curvature(C)
        sizes = np.abs(f).max(axis=1) + np.abs(targets).max(axis=1) + C + 1.0
        cotangent_errors = 16 * EPS * np.abs(cotangents)
        cotangent_errors += (8 * EPS * curvature * weights * sizes)[:, None]
        reach = np.square(u).sum(axis=1)[:, None] * np.abs(gates)
        self._sizes += np.abs(cotangents).T @ reach
        self._errors += cotangent_errors.T @ reach
        output_errors = (2 * d + m + 8) * EPS * (reach @ self._squared_lengths.T)
        self._output_errors += float((np.abs(cotangents) * output_errors).sum())
        squares = np.square(output_errors).sum(axis=1)
        self._output_errors += 0.5 * curvature * float(weights @ squares)

    @np.errstate(over="ignore", invalid="ignore")
    def bound(self, normalizer: float, lower_bound: float) -> QuadraticBound:
        """The bound for all samples that were added.

        Args:
            normalizer: What the weighted sum of the losses is divided by.
            lower_bound: Loss that no function of the inputs can go below.

        Returns:
            The bound.

        Raises:
            ValueError: If it overflows float64.
        """
        d, C, m = self._w.shape
        penalty = self._head.penalty
        loss = self._loss_sum / normalizer
        quartic = penalty * float(np.square(self._squared_lengths).sum())
        moments = self._moments / normalizer
        if not np.isfinite(moments).all():
            raise ValueError(
                "The bound of the quadratic head overflows float64: features, weights "
                f"or targets are too large. Received: loss={loss}"
            )
        smallest = quadratic.smallest_eigenvalues(moments)
        # Rounding of the sums over samples, the cotangents, and the eigenvalue solver.
        allowance = (self._n + 8) * EPS * self._sizes / normalizer
        allowance += self._errors / normalizer
        allowance += 8 * d * EPS * np.linalg.norm(moments, axis=(2, 3))
        sharp, safe = (
            float(np.square(np.minimum(mu, 0.0)).sum()) / (4.0 * penalty)
            for mu in (smallest, smallest - allowance)
        )
        gap = quartic + self._slope / normalizer + sharp
        rounding = safe - sharp + self._output_errors / normalizer
        rounding += (self._n + C + 8) * EPS * self._slope_size / normalizer
        rounding += (d + C * m + 8) * EPS * (quartic + safe)
        value = loss + quartic
        if not np.isfinite(value + gap + rounding):
            raise ValueError(
                "The bound of the quadratic head overflows float64: features, weights "
                f"or targets are too large. Received: loss={loss}, gap={gap}"
            )
        gap = max(gap, 0.0)
        # The trivial bound: penalties are at least 0, losses at least `lower_bound`.
        trivial = max(value - lower_bound, 0.0)
        trivial_rounding = self._output_errors / normalizer
        trivial_rounding += (self._n + d + C * m + 16) * EPS * value
        if trivial + trivial_rounding < gap + rounding:
            gap, rounding = trivial, trivial_rounding
        return QuadraticBound(
            gap=gap + rounding,
            value=value,
            loss=loss,
            penalty=penalty,
            rounding=rounding,
        )


def weights_of(head: QuadraticHead) -> Array:
    """The trained weights of a head, shape `(d, C, m)`, float64."""
    return keras.ops.convert_to_numpy(head.w).astype(np.float64)


def _check_memory(d: int, C: int, m: int) -> None:
    gib = 3 * 8 * C * m * d * d / 2**30
    free = free_gib()
    if free is not None and gib > free:
        raise MemoryError(
            f"The certificate of a quadratic head would take {gib:.3g} GiB, of "
            f"{free:.3g} GiB that are free: three times units * width * d * d = {C} * "
            f"{m} * {d} * {d} numbers. Use fewer units or features."
        )
