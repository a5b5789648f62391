"""Steps of limited-memory BFGS."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from keras_dalign.solving.walk import EPS

if TYPE_CHECKING:
    from keras_dalign.numerics.gram import Array
    from keras_dalign.solving.walk import Walk

# Pairs of steps and gradient changes that are remembered.
_MIN_PAIRS, _MAX_PAIRS = 10, 30

# A line search ends where the slope has fallen to this part of its first value. A
# smaller one takes fewer iterations, but to a minimum that is farther away and
# generalises worse: it runs far along its poor first directions.
_SLOPE_LEFT = 0.9


class Lbfgs:
    """L-BFGS (Nocedal & Wright, Numerical Optimization, 2006, chapter 7).

    Args:
        walk: What it moves.
    """

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        problem = walk.problem
        # So many pairs are as large as the gates, whatever the size of the problem.
        pairs = problem.n // (2 * problem.d)
        self.pairs: deque[tuple[Array, Array, float]] = deque(
            maxlen=min(max(pairs, _MIN_PAIRS), _MAX_PAIRS)
        )

    def __call__(self) -> bool:
        """Takes a step; returns whether the value went down."""
        walk = self.walk
        gradient, theta = walk.gradient, walk.theta
        direction = self._direction(gradient)
        logits = walk.product(direction)
        if not walk.move(direction, logits, _SLOPE_LEFT):
            if not self.pairs:
                return False
            # Once more, down the gradient: rounding may have spoilt the memory.
            self.pairs.clear()
            return self()
        step, change = walk.theta - theta, walk.gradient - gradient
        curvature = float(step @ change)
        if curvature > EPS * float(change @ change):
            self.pairs.append((step, change, 1.0 / curvature))
        return True

    def _direction(self, gradient: Array) -> Array:
        direction = -gradient
        if not self.pairs:
            # To first order the loss can be lowered by as much as it is worth.
            value = self.walk.value - self.walk.lower_bound
            square = float(gradient @ gradient)
            return direction * (value / square) if square else direction
        parts = []
        for step, change, inverse in reversed(self.pairs):
            part = inverse * float(step @ direction)
            direction -= part * change
            parts.append(part)
        step, change, inverse = self.pairs[-1]
        direction *= 1.0 / (inverse * float(change @ change))
        for (step, change, inverse), part in zip(
            self.pairs, reversed(parts), strict=True
        ):
            direction += (part - inverse * float(change @ direction)) * step
        return direction
