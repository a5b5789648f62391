"""Samples that judge an L2 weight or a width: some of the problem's own, or others."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from keras_dalign.numerics.losses import SoftmaxCrossEntropy, SquaredError

if TYPE_CHECKING:
    from keras_dalign.numerics import Array
    from keras_dalign.solving.minimum import Iterate
    from keras_dalign.solving.problem import ConvexProblem

_PART = 0.2
_FEWEST = 5


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
    """Samples to train on, and samples to judge by.

    Attributes:
        trained: The problem of the samples that are trained on.
        judges: The problem of the others. It has the features of all samples if these
            are the problem's own, with a weight of 0 for those that are trained on.
        own: Whether they are the problem's own: samples that the trunk has seen.
        mean_weight: Sum of the weights of all samples that will be trained on, over
            the normaliser: 1 for a mean, their number for a sum.
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
        """Holds out no sample of the problem: others judge.

        Args:
            problem: The problem of the samples that are trained on.
            judges: That of the others.

        Returns:
            The two problems.
        """
        total = float(problem.weights.sum()) / problem.normalizer
        return cls(problem, judges, own=False, mean_weight=total)

    def logits(self, iterate: Iterate) -> Array:
        """Logits of the samples that judge, `(k, C)`."""
        if self.own:
            return iterate.logits
        judges = self.judges
        return judges.offset + judges.fast.product(iterate.theta)

    def loss(self, iterate: Iterate) -> float:
        """Their loss."""
        return self.judges.loss_of(self.logits(iterate))

    def losses(self, iterate: Iterate) -> Array:
        """The loss of each, `(k,)`, times its weight: their mean is `loss`."""
        judges = self.judges
        counted = judges.weights > 0
        losses = judges.loss.value(
            self.logits(iterate)[counted], judges.targets[counted]
        )
        share = np.count_nonzero(counted) / judges.normalizer
        return losses * judges.weights[counted] * share

    def error(self, iterate: Iterate) -> float | None:
        """The fraction that is misclassified; None for squared error."""
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
    """Which samples to hold out: a fifth of every class, at random.

    Args:
        problem: The problem.
        seed: Seed of the choice.

    Returns:
        Shape `(n,)`, bool; samples of weight 0 are never held out. None if there are
        fewer than five samples.
    """
    counted = np.flatnonzero(problem.weights)
    if len(counted) < _FEWEST:
        return None
    order = np.random.default_rng(seed).permutation(counted)
    if not isinstance(problem.loss, SquaredError):
        # Sorted by class, every fifth one is a fifth of each.
        targets = problem.targets[order]
        softmax = isinstance(problem.loss, SoftmaxCrossEntropy)
        classes = -targets.argmax(axis=1)[None] if softmax else (targets > 0.5).T
        order = order[np.lexsort(classes[::-1])]
    held_out = np.zeros(problem.n, dtype=bool)
    held_out[order[2 :: round(1 / _PART)]] = True
    return held_out
