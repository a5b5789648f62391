"""Steps of Newton's method, by conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from keras_dalign.numerics.losses import SquaredError
from keras_dalign.solving.walk import EPS

if TYPE_CHECKING:
    from keras_dalign.numerics.gram import Array
    from keras_dalign.solving.walk import Walk

# Conjugate-gradient steps within one Newton step, and for a quadratic, which has one.
_MAX_CG_STEPS = 250
_MAX_CG_STEPS_QUADRATIC = 10_000

# A line search ends where the slope has fallen to this part of its first value.
SLOPE_LEFT = 0.3


class Newton:
    """Newton's method (Nocedal & Wright, Numerical Optimization, 2006, algorithm 7.1).

    Its steps are computed by conjugate gradients on products with the Hessian, to a
    forcing term.

    Args:
        walk: What it moves.
    """

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self.quadratic = isinstance(walk.problem.loss, SquaredError)
        self.first = math.sqrt(float(walk.gradient @ walk.gradient))

    def __call__(self) -> bool:
        """Takes a step; returns whether the value went down."""
        direction, logits = self._direction()
        return self.walk.move(direction, logits, SLOPE_LEFT)

    def _direction(self) -> tuple[Array, Array]:
        """An approximate Newton step and what it does to the logits."""
        walk = self.walk
        problem, l2 = walk.problem, walk.l2
        gradient = walk.gradient
        square = float(gradient @ gradient)
        enough = self._enough(square)
        x, logits_x = np.zeros_like(gradient), np.zeros_like(walk.logits)
        residual = -gradient
        d = residual.copy()
        for _ in range(_MAX_CG_STEPS_QUADRATIC if self.quadratic else _MAX_CG_STEPS):
            logits_d = walk.product(d)
            cotangents = problem.loss_curvature(walk.logits, logits_d)
            curvature = float(np.vdot(cotangents, logits_d)) + l2 * float(d @ d)
            if not curvature > EPS**2 * square:
                break
            length = square / curvature
            x += length * d
            logits_x += length * logits_d
            product = problem.transposed_product(cotangents, walk.dtype)
            if l2:
                product += l2 * d
            walk.hessian_products += 1
            residual -= length * product
            new = float(residual @ residual)
            if enough(new, x):
                break
            d *= new / square
            d += residual
            square = new
        if not x.any():
            return d, walk.product(d)
        return x, logits_x

    def _enough(self, square: float) -> Callable[[float, Array], bool]:
        """Whether a squared residual is small enough, for a squared gradient."""
        walk = self.walk
        if not self.quadratic:
            norm = math.sqrt(square)
            part = min(0.5, math.sqrt(norm / self.first)) if self.first else 0.5
            # With an L2 term no step has to go farther than to a gap of `tol / 2`.
            limit = max((part * norm) ** 2, walk.l2 * walk.tol)
            return lambda new, _: new <= limit
        # One Newton step is all there is to do: the residual is the gradient behind it,
        # and the value falls by half of `- gradient . x`.
        excess = walk.value - walk.lower_bound - 0.5 * walk.tol
        gradient = walk.gradient
        floor = (EPS * 8) ** 2 * square

        def enough(new: float, x: Array) -> bool:
            if new <= floor or (walk.l2 and new <= walk.l2 * walk.tol):
                return True
            return excess + 0.5 * float(gradient @ x) <= 0

        return enough
