"""An upper bound on the distance of a loss with an L2 term to its minimum.

With the term the loss is strongly convex in the head's `q` and `b`, so its distance to
the minimum over them is at most `||gradient||^2 / (2 l2)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_dalign.certification.exploiting_head import exploiting_head
from keras_dalign.head import data
from keras_dalign.head.batch_predictor import BatchPredictor
from keras_dalign.head.features import FeatureSet
from keras_dalign.head.objective import sample_weights, single_array
from keras_dalign.numerics.arguments import number
from keras_dalign.numerics.rounding import EPS
from keras_dalign.solving.problem import ConvexProblem

if TYPE_CHECKING:
    from keras_dalign.numerics.losses import ConvexLoss


class L2Bound:
    """The gradient of the loss with an L2 term, summed batch by batch.

    Args:
        model: An `AlignedModel` that exploits.
        loss: The loss.
        l2: Weight of the L2 term, positive.

    Raises:
        ValueError: If the weight is not positive, or the model does not exploit.
    """

    def __init__(self, model: keras.Model, loss: ConvexLoss, l2: Any) -> None:
        wanted = (
            "positive and finite: without it the loss is not strongly convex, and this "
            "certificate says nothing"
        )
        self.l2 = number("l2", l2, wanted, lambda v: v > 0)
        self._head = exploiting_head(model, "A certificate with `l2`")
        self._trunk = BatchPredictor(model.trunk)
        self._loss = loss
        self._sum = 0.0
        self._gradient: Any = 0.0
        self._rounding = 0.0
        self._change: Any = 0.0

    def features(self, x: Any) -> Any:
        """The features that the trunk computes for a batch."""
        return self._trunk.features(x)

    def add(self, z: Any, y: Any, sample_weight: Any) -> None:
        """Adds a batch of features `z`, targets and weights."""
        n = data.n_samples(z)
        weights = sample_weights(sample_weight, n)
        if not weights.any():
            return
        features = FeatureSet(z, single_array(y, "y"), weights, n)
        self.add_problem(ConvexProblem.from_head(self._head, features, self._loss))

    def add_problem(self, problem: ConvexProblem) -> None:
        """Adds the samples of a problem on the head's features."""
        theta = problem.theta_of(self._head)
        found = problem.evaluate(theta)
        self._sum += found.value * problem.normalizer
        self._gradient += found.gradient * problem.normalizer
        self._rounding += problem.gradient_rounding(found) * problem.normalizer
        self._change = theta - problem.center

    def value_and_gap(self, normalizer: float) -> tuple[float, float]:
        """The loss with the L2 term, and a bound on its distance to its minimum.

        Args:
            normalizer: What sums over the samples are divided by.

        Returns:
            The loss, and the bound.

        Raises:
            ValueError: If the loss overflows.
        """
        change = self._change
        value = self._sum / normalizer + 0.5 * self.l2 * float(change @ change)
        gradient = self._gradient / normalizer + self.l2 * change
        norm = float(np.linalg.norm(gradient)) + self._rounding / normalizer
        norm += 4 * EPS * self.l2 * float(np.linalg.norm(change))
        gap = norm**2 / (2.0 * self.l2)
        if not np.isfinite(value + gap):
            raise ValueError(
                "The regularised loss overflows float64: weights, outputs or targets "
                f"are too large. Received: loss={value}, gap={gap}"
            )
        return value, gap
