"""A point on the way down, and the steps that it takes along directions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from keras_dalign.numerics.gram import Array
    from keras_dalign.solving.problem import ConvexProblem

EPS = float(np.finfo(np.float64).eps)

_EXACT = np.dtype("float64")
_MAX_LINE_SEARCH = 40


@dataclasses.dataclass(frozen=True, eq=False)
class Iterate:
    """A point on the way to the minimum.

    Attributes:
        theta: Parameters, shape `(size,)`; never changed later.
        logits: `(n, C)`.
        loss: The loss there, without the L2 term.
        value: The loss with the L2 term.
        gap: Upper bound on the distance of `value` to its infimum.
        iteration: Number of iterations so far.
        evaluations: Gradients computed so far.
        hessian_products: Products with the Hessian so far.
        reason: Why the iteration ends here: `"gap"`, `"stalled"` or
            `"max_iterations"`; None if it goes on.
    """

    theta: Array
    logits: Array
    loss: float
    value: float
    gap: float
    iteration: int
    evaluations: int
    hessian_products: int
    reason: str | None = None


class Walk:
    """The current point, and what it takes to move along a direction.

    Args:
        problem: The problem.
        start: Parameters to start at, shape `(size,)`.
        tol: The gap to reach.
        lower_bound: A number that the loss cannot go below.
        l2: Weight of the L2 term.
        rough: Whether products may be in the problem's `rough_dtype`, until `sharpen`.
    """

    def __init__(
        self,
        problem: ConvexProblem,
        start: Array,
        tol: float,
        lower_bound: float,
        l2: float,
        rough: bool = False,
    ) -> None:
        self.problem = problem
        self.dtype = problem.rough_dtype if rough else _EXACT
        self.tol = tol
        self.lower_bound = lower_bound
        self.l2 = l2
        self.theta = np.array(start, dtype=np.float64)
        self.evaluations = 0
        self.hessian_products = 0
        self._recompute(self.dtype)

    def recompute(self) -> None:
        """Loss and gradient at the parameters as they are, in float64."""
        self._recompute(_EXACT)

    def sharpen(self) -> bool:
        """Computes in float64 from here on; returns whether that is new."""
        if self.dtype == _EXACT:
            return False
        self.dtype = _EXACT
        self.recompute()
        return True

    def product(self, direction: Array) -> Array:
        """`Phi direction`, `(n, C)`, in the precision of the moment."""
        return self.problem.product(direction, self.dtype)

    def _recompute(self, dtype: np.dtype[Any]) -> None:
        self.logits = self.problem.offset + self.problem.product(self.theta, dtype)
        self._measure(dtype)

    def _measure(self, dtype: np.dtype[Any]) -> None:
        problem = self.problem
        self.loss = problem.loss_of(self.logits)
        self.value = self.loss
        slopes = problem.loss_gradient(self.logits)
        self.gradient = problem.transposed_product(slopes, dtype)
        self.evaluations += 1
        if self.l2:
            change = self.theta - problem.center
            self.value += 0.5 * self.l2 * float(change @ change)
            self.gradient += self.l2 * change
        self.gap = max(self.value - self.lower_bound, 0.0)
        if self.l2:
            square = float(self.gradient @ self.gradient)
            self.gap = min(self.gap, square / (2.0 * self.l2))

    def iterate(self, iteration: int, reason: str | None) -> Iterate:
        """The point as it is now."""
        return Iterate(
            theta=self.theta,
            logits=self.logits,
            loss=self.loss,
            value=self.value,
            gap=self.gap,
            iteration=iteration,
            evaluations=self.evaluations,
            hessian_products=self.hessian_products,
            reason=reason,
        )

    def move(self, direction: Array, logits: Array, slope_left: float) -> bool:
        """Searches along a direction and takes the step found.

        Args:
            direction: In the parameters, shape `(size,)`.
            logits: What it does to the logits, `Phi direction`, `(n, C)`.
            slope_left: The part of the slope that may be left.

        Returns:
            Whether the value went down; if not, nothing has moved.
        """
        length = self._step_length(direction, logits, slope_left)
        if not length:
            return False
        self.theta = self.theta + length * direction
        self.logits = self.logits + length * logits
        self._measure(self.dtype)
        return True

    def _step_length(self, direction: Array, logits: Array, slope_left: float) -> float:
        """A length where the slope is small and the value lower, or 0."""
        # Along the line the value is convex, so its slope only rises: bisection between
        # a falling and a rising end, by the secant where that is safe.
        slope0 = float(self.gradient @ direction)
        if not slope0 < 0:
            return 0.0
        value = self._line(direction, logits)
        low, slope_low = 0.0, slope0
        high, slope_high = math.inf, math.inf
        best = 0.0
        length = 1.0
        for _ in range(_MAX_LINE_SEARCH):
            loss, total, slope = value(length)
            # Near the minimum rounding hides what the slope still tells.
            lower = total <= self.value + 2 * EPS * abs(self.value)
            if lower and slope <= 0:
                best = length
            if lower and abs(slope) <= -slope_left * slope0:
                return length
            if lower and not self.l2 and loss - self.lower_bound <= self.tol:
                return length
            if slope < 0 and math.isfinite(total):
                low, slope_low = length, slope
            else:
                high, slope_high = length, slope
            length = _between(low, slope_low, high, slope_high)
        return best

    def _line(
        self, direction: Array, logits: Array
    ) -> Callable[[float], tuple[float, float, float]]:
        """Loss, value and slope at a length along the direction."""
        problem, l2 = self.problem, self.l2
        here = self.logits
        if l2:
            change = self.theta - problem.center
            cross = l2 * float(change @ direction)
            square = l2 * float(direction @ direction)
            constant = self.value - self.loss
        else:
            cross = square = constant = 0.0

        def at(length: float) -> tuple[float, float, float]:
            there = here + length * logits
            loss = problem.loss_of(there)
            slope = float(np.vdot(problem.loss_gradient(there), logits))
            total = loss + constant + length * (cross + 0.5 * length * square)
            return loss, total, slope + cross + length * square

        return at


def _between(low: float, slope_low: float, high: float, slope_high: float) -> float:
    """Where to look for the zero of a rising slope: the secant's, kept well inside."""
    if math.isinf(high):
        return 4.0 * low if low else 1.0
    if not math.isfinite(slope_high):
        return 0.5 * (low + high)
    zero = low - slope_low * (high - low) / (slope_high - slope_low)
    margin = 0.1 * (high - low)
    return min(max(zero, low + margin), high - margin)
