"""A bound on the rounding error of the gradient of a head's convex problem.

To first order in the unit roundoff `eps`, by the standard bounds on inner products and
Cauchy-Schwarz, with `||phi_i||^2 <= ||v_i||^2 sum_k G_ik^2 + 1`:

- the error of a logit is at most `(d + m + 8) eps (|F0| + ||phi_i|| ||theta||)`;
- the error of its cotangent is at most the curvature of the loss times that, plus
  16 `eps` times the cotangent;
- the sum over samples adds `(n + d + m) eps` times the sum of the terms' sizes.

Cotangents are bounded by those at `F0` and the curvature, so the bound is linear in
`||theta||`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from keras_dalign.numerics.rounding import EPS

if TYPE_CHECKING:
    from keras_dalign.solving.problem import ConvexProblem


@dataclasses.dataclass(frozen=True)
class GradientRounding:
    """The bound `constant + slope * ||theta||`, for gradients without an L2 term.

    Attributes:
        constant: The bound at `theta = 0`.
        slope: Its increase per unit of `||theta||`.
    """

    constant: float
    slope: float

    @classmethod
    def of_problem(cls, problem: ConvexProblem) -> GradientRounding:
        """The bound for all samples of a problem.

        Args:
            problem: The problem.

        Returns:
            The bound.
        """
        curvature = problem.loss.max_curvature(problem.units)
        inner = (problem.d + problem.width + 12) * EPS
        summed = (problem.n + problem.d + problem.width + 16) * EPS
        lengths = problem.row_lengths()
        constant = slope = 0.0
        for part in problem.rows.blocks(64 * problem.units, 2**22):
            offset, targets = problem.offset[part], problem.targets[part]
            offsets = np.linalg.norm(offset, axis=1)
            # Where targets and logits cancel, each was still rounded at its own size.
            sizes = inner * offsets + 4 * EPS * np.linalg.norm(targets, axis=1)
            cotangents = np.linalg.norm(problem.loss.gradient(offset, targets), axis=1)
            shares = lengths[part] * problem.samples.shares[part]
            constant += float(shares @ (curvature * sizes + summed * cotangents))
            slope += float(shares @ lengths[part])
        return cls(constant, slope * curvature * (math.sqrt(2.0) * inner + summed))

    def bound(self, size: float) -> float:
        """The bound at parameters whose norm `||theta||` is `size`."""
        return self.constant + self.slope * size
