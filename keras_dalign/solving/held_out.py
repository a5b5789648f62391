"""Held-out samples, on which L2 weights and widths are compared."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from keras_dalign.numerics.losses import SoftmaxCrossEntropy, SquaredError

if TYPE_CHECKING:
    from keras_dalign.numerics import Array
    from keras_dalign.solving.minimum import Iterate
    from keras_dalign.solving.problem import ConvexProblem

# The share of the samples that is held out, and the least number of samples for that.
_SHARE = 0.2
_LEAST_SAMPLES = 5


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
    """Samples to train on, and held-out samples to compare on.

    Attributes:
        trained: The problem of the samples that are trained on.
        judges: The problem of the held-out samples. If they are training samples, it
            has the features of all training samples, with a weight of 0 for those that
            are trained on.
        own: Whether the held-out samples are training samples, which the trunk has
            seen.
        mean_weight: Sum of the weights of all training samples divided by the
            normaliser: 1 for a mean, their number for a sum.
    """

    trained: ConvexProblem
    judges: ConvexProblem
    own: bool
    mean_weight: float

    @classmethod
    def part_of(cls, problem: ConvexProblem, mask: np.ndarray) -> HeldOut:
        """Holds out the samples where `mask` is true.

        Args:
            problem: The problem of all samples.
            mask: From `hold_out`, shape `(n,)`, bool.

        Returns:
            The two problems; features and gates are shared.
        """
        return cls(
            problem.reweighted((~mask).astype(np.float64)),
            problem.reweighted(mask.astype(np.float64)),
            own=True,
            mean_weight=float(problem.weights.sum()) / problem.normalizer,
        )

    @classmethod
    def other(cls, problem: ConvexProblem, judges: ConvexProblem) -> HeldOut:
        """Trains on all samples of a problem, and compares on other samples.

        Args:
            problem: The problem of the samples that are trained on.
            judges: The problem of the other samples.

        Returns:
            The two problems.
        """
        total = float(problem.weights.sum()) / problem.normalizer
        return cls(problem, judges, own=False, mean_weight=total)

    def logits(self, iterate: Iterate) -> Array:
        """Logits of the samples of `judges`, `(k, C)`."""
        if self.own:
            return iterate.logits
        judges = self.judges
        return judges.offset + judges.fast.product(iterate.theta)

    def loss(self, iterate: Iterate) -> float:
        """The held-out loss."""
        return self.judges.loss_of(self.logits(iterate))

    def losses(self, iterate: Iterate) -> Array:
        """The weighted loss of each held-out sample, `(k,)`. Their mean is `loss`."""
        judges = self.judges
        counted = judges.weights > 0
        losses = judges.loss.value(
            self.logits(iterate)[counted], judges.targets[counted]
        )
        share = np.count_nonzero(counted) / judges.normalizer
        return losses * judges.weights[counted] * share

    def error(self, iterate: Iterate) -> float | None:
        """The fraction of held-out samples misclassified; None for squared error."""
        judges = self.judges
        if isinstance(judges.loss, SquaredError):
            return None
        logits = self.logits(iterate)
        if judges.units == 1:
            wrong = ((logits > 0) != (judges.targets > 0.5)).ravel()
        else:
            wrong = logits.argmax(axis=1) != judges.targets.argmax(axis=1)
        return float(judges.weights @ wrong / judges.weights.sum())


def hold_out(problem: ConvexProblem, seed: int) -> np.ndarray | None:
    """Chooses the samples to hold out: a fifth of every class, at random.

    Args:
        problem: The problem.
        seed: Seed of the choice.

    Returns:
        Shape `(n,)`, bool; samples of weight 0 are never held out. None if there are
        fewer than five samples.
    """
    counted = np.flatnonzero(problem.weights)
    if len(counted) < _LEAST_SAMPLES:
        return None
    order = np.random.default_rng(seed).permutation(counted)
    if not isinstance(problem.loss, SquaredError):
        # After sorting by class, every fifth sample gives a fifth of each class.
        targets = problem.targets[order]
        softmax = isinstance(problem.loss, SoftmaxCrossEntropy)
        classes = -targets.argmax(axis=1)[None] if softmax else (targets > 0.5).T
        order = order[np.lexsort(classes[::-1])]
    held_out = np.zeros(problem.n, dtype=bool)
    held_out[order[2 :: round(1 / _SHARE)]] = True
    return held_out
