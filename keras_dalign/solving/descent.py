"""Full-batch minimisation of a head's convex problem, until the gap is small.

Three methods, all in float64, but for the inner products of Newton's method, which are
in float32 where that takes less time: what a step comes to is measured in float64.

- `"lbfgs"`: limited-memory BFGS (Nocedal & Wright, Numerical Optimization, 2006,
  chapter 7);
- `"newton"`: Newton's method, its steps by conjugate gradients on products with the
  Hessian, to a forcing term (the same, algorithm 7.1);
- `"direct"`, for squared error: one Cholesky factorisation of the `n x n` Gram matrix
  per output.

The logits are linear in the parameters, so along a search direction they are known from
one product, and a line search costs no further one: that is what makes these methods
faster here than general ones, which know nothing of the structure.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.linalg

from keras_dalign.numerics.losses import SquaredError

if TYPE_CHECKING:
    from keras_dalign.numerics.gram import Array
    from keras_dalign.solving.problem import ConvexProblem

METHODS = ("auto", "lbfgs", "newton", "direct")
EPS = float(np.finfo(np.float64).eps)

# Up to so many samples one Cholesky factorisation per output costs less than the
# hundreds of products that conjugate gradients take.
_DIRECT_SAMPLES = 4096

# Pairs of steps and gradient changes that L-BFGS remembers.
_MIN_PAIRS, _MAX_PAIRS = 10, 30

# Conjugate-gradient steps within one Newton step, and for a quadratic, which has one.
_MAX_CG_STEPS = 250
_MAX_CG_STEPS_QUADRATIC = 10_000

# A line search ends where the slope has fallen to this part of its first value. For
# L-BFGS a smaller one takes fewer iterations, but to a minimum that is farther away and
# generalises worse: it runs far along its poor first directions.
_SLOPE_LEFT_LBFGS = 0.9
_SLOPE_LEFT_NEWTON = 0.3
_MAX_LINE_SEARCH = 40

# Eigenvalues of a singular Gram matrix that are used, as a part of the largest.
_REAL_EIGENVALUES = 1e-11

# It counts as a stall if so many iterations take less than this part off the gap.
_STALL_ITERATIONS = 100
_STALL_PART = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolveOptions:
    """What a full-batch solver is told.

    Args:
        tol: Positive float: the gap at which it stops.
        method: One of `METHODS`.
        l2: Weight of the L2 term, at least 0, or `"auto"`.
        max_iterations: Positive int.

    Raises:
        ValueError: If an argument is out of its range.
    """

    tol: float = 1e-6
    method: str = "auto"
    l2: float | str = 0.0
    max_iterations: int = 1000

    def __post_init__(self) -> None:
        if not (_is_number(self.tol) and EPS <= self.tol < math.inf):
            raise ValueError(
                "`tol` must be a positive number, not below the machine precision of "
                f"float64, {EPS:.2g}. Received: tol={self.tol!r}"
            )
        if self.method not in METHODS:
            raise ValueError(
                f"`method` must be one of {METHODS}. Received: method={self.method!r}"
            )
        auto = isinstance(self.l2, str) and self.l2 == "auto"
        if not (auto or (_is_number(self.l2) and 0 <= self.l2 < math.inf)):  # type: ignore[operator]
            raise ValueError(
                "`l2` must be a non-negative number or 'auto'. Received: "
                f"l2={self.l2!r}"
            )
        is_int = isinstance(self.max_iterations, (int, np.integer))
        if not is_int or self.max_iterations < 1:
            raise ValueError(
                "`max_iterations` must be a positive int. Received: "
                f"max_iterations={self.max_iterations!r}"
            )

    @classmethod
    def of(cls, options: dict[str, Any]) -> SolveOptions:
        """The options given as a dict.

        Args:
            options: Any of the arguments by name.

        Returns:
            The options.

        Raises:
            ValueError: If there is an unknown name, or a value is out of its range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"Options of the solver are {known}. Received: {unknown}")
        return cls(**options)


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


def choose_method(problem: ConvexProblem, method: str, l2: float) -> tuple[str, str]:
    """The method that suits a problem, and why.

    Args:
        problem: The problem.
        method: What was asked for, one of `METHODS`.
        l2: Weight of the L2 term.

    Returns:
        `"lbfgs"`, `"newton"` or `"direct"`, and the reason in words.

    Raises:
        ValueError: If `"direct"` is asked for and the loss is not the squared error.
    """
    quadratic = isinstance(problem.loss, SquaredError)
    if method == "direct" and not quadratic:
        raise ValueError(
            "There is a closed form for squared error alone. Received: "
            f"method='direct' with {problem.loss.name}. Use method='auto'."
        )
    if method != "auto":
        return method, "as asked for"
    if quadratic:
        if problem.n <= _DIRECT_SAMPLES:
            return "direct", f"squared error with {problem.n} samples: a closed form"
        return "newton", (
            f"squared error with {problem.n} samples: conjugate gradients, as the Gram "
            "matrices would take too long to factorise"
        )
    if l2:
        return "newton", "strongly convex by its L2 term: Newton's method"
    return "lbfgs", "no L2 term, so the minimum may lie at infinity: L-BFGS"


def descend(
    problem: ConvexProblem,
    start: Array,
    *,
    method: str,
    tol: float,
    lower_bound: float = 0.0,
    l2: float = 0.0,
    max_iterations: int = 1000,
) -> Iterator[Iterate]:
    """Goes down from a starting point until the gap is at most `tol`.

    The gap is the loss minus `lower_bound`; with an L2 term, which makes the problem
    strongly convex, it is `||gradient||^2 / (2 l2)` if that is smaller. Both are upper
    bounds on the distance to the infimum. The value never rises, but for rounding.
    Where Newton's steps are computed in float32, their iterates are measured as exactly
    as that; the last one is measured in float64, from its parameters.

    Args:
        problem: The problem.
        start: Parameters to start at, shape `(size,)`.
        method: `"lbfgs"`, `"newton"` or `"direct"`.
        tol: The gap to reach.
        lower_bound: A number that the loss cannot go below.
        l2: Weight of the L2 term.
        max_iterations: Most iterations.

    Yields:
        The starting point and every iterate; the last one has a `reason`.

    Raises:
        ValueError: If `tol` is below what float64 can tell at this lower bound, or the
            loss at the start is not finite.
    """
    if tol < 4 * EPS * lower_bound:
        raise ValueError(
            "The tolerance is below machine precision: the loss cannot go below "
            f"{lower_bound:.3g}, where float64 tells {EPS * lower_bound:.1g} apart. "
            f"Received: tol={tol}"
        )
    rule = _Direct if method == "direct" else _Newton if method == "newton" else _Lbfgs
    walk = _Walk(problem, start, tol, lower_bound, l2)
    if not math.isfinite(walk.value):
        raise ValueError(
            "The loss overflows float64 at the starting point: the outputs or targets "
            f"are too large. Received: loss={walk.loss}"
        )
    step = rule(walk)
    # The least gap so far: with an L2 term it need not fall at every step.
    gaps: deque[float] = deque(maxlen=_STALL_ITERATIONS + 1)
    for iteration in range(max_iterations + 1):
        gaps.append(min(walk.gap, gaps[-1] if gaps else math.inf))
        reason = None
        if walk.gap <= tol:
            # Logits were summed up along the way: the last word has the parameters.
            walk.recompute()
            reason = "gap" if walk.gap <= tol else None
        elif len(gaps) == gaps.maxlen and gaps[0] - gaps[-1] < _STALL_PART * gaps[-1]:
            reason = "stalled"
        if reason is None and iteration == max_iterations:
            reason = "max_iterations"
        if reason is not None:
            if reason != "gap":
                walk.recompute()
            yield walk.iterate(iteration, reason)
            return
        before = walk.iterate(iteration, None)
        yield before
        if not step():
            walk.restore(before)
            yield walk.iterate(iteration, "stalled")
            return


class _Walk:
    """The current point, and what it takes to move along a direction."""

    def __init__(
        self,
        problem: ConvexProblem,
        start: Array,
        tol: float,
        lower_bound: float,
        l2: float,
    ) -> None:
        self.problem = problem
        self.tol = tol
        self.lower_bound = lower_bound
        self.l2 = l2
        self.theta = np.array(start, dtype=np.float64)
        self.evaluations = 0
        self.hessian_products = 0
        self.recompute()

    def recompute(self) -> None:
        """Loss and gradient at the parameters as they are."""
        self.logits = self.problem.logits(self.theta)
        self._measure()

    def restore(self, iterate: Iterate) -> None:
        self.theta, self.logits = iterate.theta, iterate.logits
        self.loss, self.value, self.gap = iterate.loss, iterate.value, iterate.gap

    def _measure(self) -> None:
        problem = self.problem
        self.loss = problem.loss_of(self.logits)
        self.value = self.loss
        self.gradient = problem.transposed_product(problem.loss_gradient(self.logits))
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
        self._measure()
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


class _Lbfgs:
    """L-BFGS steps."""

    def __init__(self, walk: _Walk) -> None:
        self.walk = walk
        problem = walk.problem
        # So many pairs are as large as the gates, whatever the size of the problem.
        pairs = problem.n // (2 * problem.d)
        self.pairs: deque[tuple[Array, Array, float]] = deque(
            maxlen=min(max(pairs, _MIN_PAIRS), _MAX_PAIRS)
        )

    def __call__(self) -> bool:
        walk = self.walk
        gradient, theta = walk.gradient, walk.theta
        direction = self._direction(gradient)
        logits = walk.problem.product(direction)
        if not walk.move(direction, logits, _SLOPE_LEFT_LBFGS):
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


class _Newton:
    """Newton steps by conjugate gradients."""

    def __init__(self, walk: _Walk) -> None:
        self.walk = walk
        self.quadratic = isinstance(walk.problem.loss, SquaredError)
        self.first = math.sqrt(float(walk.gradient @ walk.gradient))

    def __call__(self) -> bool:
        direction, logits = self._direction()
        return self.walk.move(direction, logits, _SLOPE_LEFT_NEWTON)

    def _direction(self) -> tuple[Array, Array]:
        """An approximate Newton step and what it does to the logits."""
        walk = self.walk
        problem, l2 = walk.problem, walk.l2
        gradient = walk.gradient
        square = float(gradient @ gradient)
        enough = self._enough(square)
        # A step need not be exact: where it ends is measured in float64. A quadratic
        # has only one.
        dtype = np.dtype("float64") if self.quadratic else problem.rough_dtype
        x, logits_x = np.zeros_like(gradient), np.zeros_like(walk.logits)
        residual = -gradient
        d = residual.copy()
        for _ in range(_MAX_CG_STEPS_QUADRATIC if self.quadratic else _MAX_CG_STEPS):
            logits_d = problem.product(d, dtype)
            cotangents = problem.loss_curvature(walk.logits, logits_d)
            curvature = float(np.vdot(cotangents, logits_d)) + l2 * float(d @ d)
            if not curvature > EPS**2 * square:
                break
            length = square / curvature
            x += length * d
            logits_x += length * logits_d
            product = problem.transposed_product(cotangents, dtype)
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
            return d, problem.product(d)
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


class _Direct:
    """The minimum of the squared error at once."""

    def __init__(self, walk: _Walk) -> None:
        self.walk = walk
        self.newton: _Newton | None = None

    def __call__(self) -> bool:
        # A second step takes what rounding left of the first. Where a Gram matrix is
        # singular, that is more than a factorisation can give.
        if self.newton is not None:
            return self.newton()
        direction, regular = self._direction()
        if not regular:
            self.newton = _Newton(self.walk)
        logits = self.walk.problem.product(direction)
        return self.walk.move(direction, logits, _SLOPE_LEFT_NEWTON)

    def _direction(self) -> tuple[Array, bool]:
        """The step to the nearest minimum, and whether all matrices were regular."""
        # With weights rho of the squared residuals e of one output, the step is
        # Phi^T S a - shift where (S K S + l2) a = S e and S = sqrt(rho): the dual of
        # ridge regression, n x n whatever the number of parameters.
        walk = self.walk
        problem, l2 = walk.problem, walk.l2
        rho = problem.weights * (problem.loss.max_curvature(problem.units))
        rho = rho / problem.normalizer
        counted = np.flatnonzero(rho)
        scale = np.sqrt(rho[counted])
        shift = walk.theta - problem.center if l2 else None
        residuals = problem.targets - walk.logits
        if shift is not None:
            residuals += problem.product(shift)
        cotangents = np.zeros_like(residuals)
        all_regular = True
        for output in range(problem.units):
            gram = problem.gram(output)
            if len(counted) < problem.n:
                gram = gram[np.ix_(counted, counted)]
            gram *= scale[:, None]
            gram *= scale
            right = scale * residuals[counted, output]
            solved, regular = _solve_gram(gram, right, l2)
            all_regular &= regular
            cotangents[counted, output] = scale * solved
        direction = problem.transposed_product(cotangents)
        if shift is not None:
            direction -= shift
        return direction, all_regular


def _solve_gram(gram: Array, right: Array, l2: float) -> tuple[Array, bool]:
    """`(gram + l2)^-1 right`, and whether that exists; else of least squares and norm.

    Args:
        gram: Symmetric, positive semi-definite, `(n, n)`; is changed.
        right: Shape `(n,)`.
        l2: At least 0.

    Returns:
        Shape `(n,)`, and whether the matrix is regular in float64.
    """
    diagonal = np.einsum("ii->i", gram)
    diagonal += l2
    try:
        factor = scipy.linalg.cho_factor(gram, lower=True, check_finite=False)
    except np.linalg.LinAlgError:
        pass
    else:
        pivots = np.diagonal(factor[0])
        # Below this a pivot is rounding, and what is divided by it is noise.
        if pivots.min() > math.sqrt(len(gram) * EPS) * pivots.max():
            return scipy.linalg.cho_solve(factor, right, check_finite=False), True
    values, vectors = scipy.linalg.eigh(gram, check_finite=False)
    # Of smaller eigenvalues hardly a digit is right.
    real = values > _REAL_EIGENVALUES * values[-1]
    vectors = vectors[:, real]
    return vectors @ ((vectors.T @ right) / values[real]), False


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float, np.integer, np.floating))
    return is_number and not isinstance(value, (bool, np.bool_))
