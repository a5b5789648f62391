"""Full-batch minimisation of a head's convex problem, until the gap is small.

There are two methods: L-BFGS (SciPy's L-BFGS-B, with a preconditioner where there is an
L2 term) and, for squared error on few samples, a closed form. Large problems are
evaluated in float32 as long as this makes progress. The last iterate is measured in
float64.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.optimize

from keras_dalign.numerics.losses import SquaredError
from keras_dalign.numerics.rounding import EPS
from keras_dalign.numerics.threads import one_blas_thread
from keras_dalign.solving.closed_form import ClosedForm
from keras_dalign.solving.preconditioner import Preconditioner, iterations_before

if TYPE_CHECKING:
    from keras_dalign.numerics import Array
    from keras_dalign.solving.problem import ConvexProblem, Evaluation
    from keras_dalign.solving.products import Products


# Up to this number of samples, factorising the Gram matrix is faster than iterating.
_DIRECT_SAMPLES = 4096

# Progress has stalled if this number of iterations lowers the gap by less than this
# fraction.
_STALL_ITERATIONS = 100
_STALL_PART = 0.01

# Pairs of steps and gradient changes that L-BFGS stores. With a preconditioner: as many
# as take this part of the features' size, between these numbers.
_PAIRS = 10
_PAIRS_PART, _LEAST_PAIRS, _MOST_PAIRS = 0.1, 5, 20
_LINE_SEARCH_STEPS = 40
# In float32, a line search that takes more steps than this has reached rounding.
_LINE_SEARCH_STEPS_FLOAT32 = 8

# Steps of the closed form. Those after the first correct its rounding.
_CLOSED_FORM_STEPS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Iterate:
    """A point on the way to the minimum.

    Attributes:
        theta: Parameters, shape `(size,)`. The array is not changed later.
        logits: `(n, C)`.
        loss: The loss there, without the L2 term.
        value: The loss with the L2 term.
        gap: Upper bound on the distance of `value` to its infimum.
        iteration: Number of iterations so far.
        evaluations: Gradients computed so far.
        reason: Why the iteration ends here: `"gap"`, `"stalled"`, `"max_iterations"` or
            `"stopped"` (by the caller); None if it goes on.
        dropped: If the closed form stalled, the number of eigenvalues of the features'
            Gram matrix that it counted as zero; 0 if the matrix is not singular.
        cutoff: Eigenvalues count as zero up to this fraction of the largest one.
    """

    theta: Array
    logits: Array
    loss: float
    value: float
    gap: float
    iteration: int
    evaluations: int
    reason: str | None = None
    dropped: int = 0
    cutoff: float = 0.0

    @property
    def lower_bound(self) -> float:
        """Lower bound on the infimum of `value`."""
        return self.value - self.gap


# Called with an iterate. A true result stops the minimisation.
OnIterate = Callable[[Iterate], Any]


def choose_method(problem: ConvexProblem, method: str) -> tuple[str, str]:
    """The method that suits a problem, and why.

    Args:
        problem: The problem.
        method: The method given by the user, one of `METHODS`.

    Returns:
        `"lbfgs"` or `"direct"`, and the reason in words.

    Raises:
        ValueError: If the method is `"direct"` and the loss is not the squared error.
    """
    quadratic = isinstance(problem.loss, SquaredError)
    if method == "direct" and not quadratic:
        raise ValueError(
            "There is a closed form for squared error alone. Received: "
            f"method='direct' with {problem.loss.name}. Use method='auto'."
        )
    if method != "auto":
        return method, "as asked for"
    if quadratic and problem.n <= _DIRECT_SAMPLES:
        return "direct", f"squared error with {problem.n} samples: a closed form"
    return "lbfgs", "it takes any loss and any number of samples"


def minimize(
    problem: ConvexProblem,
    start: Array,
    *,
    method: str,
    tol: float,
    lower_bound: float = 0.0,
    l2: float = 0.0,
    max_iterations: int = 1000,
    on_iterate: OnIterate | None = None,
    part: float = 0.0,
    exact: bool = True,
) -> Iterate:
    """Minimises from a starting point until the gap is at most `tol`.

    The gap is the value minus `lower_bound`. An L2 term makes the problem strongly
    convex, and the gap is then `(||gradient|| + rounding)^2 / (2 l2)` if that is
    smaller, where `rounding` bounds the rounding error of the gradient. Both are upper
    bounds on the distance to the infimum.

    Args:
        problem: The problem.
        start: Parameters to start at, shape `(size,)`.
        method: `"lbfgs"` or `"direct"`.
        tol: The gap to reach.
        lower_bound: A number that the loss cannot go below.
        l2: Weight of the L2 term.
        max_iterations: Largest number of iterations.
        on_iterate: Called with the starting point and every further iterate, but not
            with the one that is returned.
        part: A gap of this fraction of the loss at the start is small enough, too.
        exact: Whether the last iterate is measured in float64. Otherwise it has the
            accuracy of the products used on the way.

    Returns:
        The last iterate. Its value is never above that of the start.

    Raises:
        ValueError: If `tol` is below the resolution of float64 at this lower bound, or
            the loss at the start is not finite.
    """
    if tol < 4 * EPS * lower_bound:
        raise ValueError(
            "The tolerance is below machine precision: the loss cannot go below "
            f"{lower_bound:.3g}, where float64 tells {EPS * lower_bound:.1g} apart. "
            f"Received: tol={tol}"
        )
    ends = problem.exact if exact else problem.fast
    products = ends if method == "direct" else problem.fast
    begin = problem.evaluate(np.array(start, dtype=np.float64), l2, products)
    if not math.isfinite(begin.value):
        products = problem.exact
        begin = problem.evaluate(begin.theta, l2)
    if not math.isfinite(begin.value):
        raise ValueError(
            "The loss overflows float64 at the starting point: the outputs or targets "
            f"are too large. Received: loss={begin.loss}"
        )
    tol = max(tol, part * begin.loss)
    run = _Minimisation(problem, tol, lower_bound, l2, max_iterations, on_iterate, ends)
    if run.iterate(begin, products).gap <= tol:
        begin = run.measured(begin, products)
        if run.iterate(begin, ends).gap <= tol:
            return run.iterate(begin, ends, "gap")
    if method == "direct":
        return run.by_closed_form(begin)
    return run.by_lbfgs(begin)


class _LineSearchError(Exception):
    """A line search in float32 has reached rounding."""


class _Minimisation:
    """One call of `minimize`: its options, counts and callbacks."""

    def __init__(
        self,
        problem: ConvexProblem,
        tol: float,
        lower_bound: float,
        l2: float,
        max_iterations: int,
        on_iterate: OnIterate | None,
        ends: Products,
    ) -> None:
        self.problem = problem
        self.tol = tol
        # A margin for the rounding of gradients and of the model's outputs in float32.
        self._aim = 0.9 * tol
        self.lower_bound = lower_bound
        self.l2 = l2
        self.max_iterations = max_iterations
        self.on_iterate = on_iterate
        self.ends = ends
        self.iterations = 0
        self.evaluations = 1
        # The least gap so far: with an L2 term it need not fall at every step.
        self.gaps: deque[float] = deque(maxlen=_STALL_ITERATIONS + 1)
        self.stopped = False

    def iterate(
        self, at: Evaluation, products: Products, reason: str | None = None
    ) -> Iterate:
        """An evaluation as an iterate, with its gap.

        Args:
            at: The evaluation.
            products: The products that computed it.
            reason: Why the iteration ends here, if it does.

        Returns:
            The iterate.
        """
        gap = max(at.value - self.lower_bound, 0.0)
        if self.l2:
            norm = math.sqrt(float(at.gradient @ at.gradient))
            if products is self.problem.exact:
                norm += self.problem.gradient_rounding(at, self.l2)
            gap = min(gap, norm**2 / (2.0 * self.l2))
        return Iterate(
            theta=at.theta,
            logits=at.logits,
            loss=at.loss,
            value=at.value,
            gap=gap,
            iteration=self.iterations,
            evaluations=self.evaluations,
            reason=reason,
        )

    def measured(self, at: Evaluation, products: Products) -> Evaluation:
        """An evaluation, repeated with the products that measure the last iterate."""
        if products is self.ends:
            return at
        self.evaluations += 1
        return self.problem.evaluate(at.theta, self.l2, self.ends)

    def by_lbfgs(self, begin: Evaluation) -> Iterate:
        """L-BFGS, in float32 as long as this makes progress if the problem is large."""
        products = self.problem.fast
        at = best = begin
        while True:
            at = self.measured(self._lbfgs(at, products), products)
            if at.value > best.value and best is begin:
                # Compare with the start as measured in float64.
                best = self.measured(begin, products)
            best = at if at.value <= best.value else best
            last = self.iterate(best, self.ends)
            if last.gap <= self.tol:
                return dataclasses.replace(last, reason="gap")
            if self.stopped:
                return dataclasses.replace(last, reason="stopped")
            if self.iterations >= self.max_iterations:
                return dataclasses.replace(last, reason="max_iterations")
            if products is self.problem.exact:
                return dataclasses.replace(last, reason="stalled")
            products = self.ends = self.problem.exact
            at = best
            self.gaps.clear()

    def _lbfgs(self, begin: Evaluation, products: Products) -> Evaluation:
        """The point at which L-BFGS with these products ends."""
        at = begin
        if self._report(self.iterate(begin, products)):
            return begin
        with one_blas_thread():
            limit = min(iterations_before(self.problem), self.max_iterations)
            if self.l2 and limit > self.iterations:
                at = self._descend(at, products, None, limit)
                small = self.iterate(at, products).gap <= self._aim
                if small or self.stopped or self.iterations >= self.max_iterations:
                    return at
            change = Preconditioner.at(self.problem, at, self.l2, products.dtype)
            return self._descend(at, products, change, self.max_iterations)

    def _descend(
        self,
        begin: Evaluation,
        products: Products,
        change: Preconditioner | None,
        limit: int,
    ) -> Evaluation:
        """L-BFGS from a point, until there have been `limit` iterations in all."""
        fast = products is not self.problem.exact
        most = _LINE_SEARCH_STEPS_FLOAT32 if fast else math.inf
        at = accepted = begin
        searched = 0
        start = asked = begin.theta if change is None else np.zeros_like(begin.theta)

        def value_and_gradient(variables: Array) -> tuple[float, Array]:
            nonlocal at, asked, searched
            searched += 1
            if searched > most:
                raise _LineSearchError
            asked = variables.copy()
            theta = asked if change is None else begin.theta + change.theta(asked)
            at = self.problem.evaluate(theta, self.l2, products)
            self.evaluations += 1
            if change is None:
                return at.value, at.gradient
            # CPUs may differ in the last bit, as in `ConvexProblem.evaluate`.
            gradient = change.gradient(at.gradient)
            return at.value, self.problem.replicas.from_first(gradient)

        def callback(intermediate_result: Any) -> None:
            nonlocal accepted, searched
            self.iterations += 1
            searched = 0
            if not np.array_equal(asked, intermediate_result.x):
                value_and_gradient(intermediate_result.x)
            accepted = at
            iterate = self.iterate(at, products)
            if iterate.gap <= self._aim or self.iterations >= self.max_iterations:
                raise StopIteration
            if self._report(iterate) or self.iterations >= limit:
                raise StopIteration

        with contextlib.suppress(_LineSearchError):
            scipy.optimize.minimize(
                value_and_gradient,
                start,
                jac=True,
                method="L-BFGS-B",
                callback=callback,
                options={
                    "maxcor": self._pairs(change),
                    "ftol": 0.0,
                    "gtol": 0.0,
                    "maxiter": self.max_iterations - self.iterations + 1,
                    "maxfun": 10**9,
                    "maxls": _LINE_SEARCH_STEPS,
                },
            )
        return accepted

    def _pairs(self, change: Preconditioner | None) -> int:
        """Number of pairs of vectors that L-BFGS keeps."""
        if change is None:
            return _PAIRS
        problem = self.problem
        pairs = _PAIRS_PART * problem.n * problem.d / (2 * problem.size)
        return int(min(max(pairs, _LEAST_PAIRS), _MOST_PAIRS))

    def by_closed_form(self, begin: Evaluation) -> Iterate:
        """The closed form of the squared error, and steps that refine it."""
        if self._report(self.iterate(begin, self.ends)):
            return self.iterate(begin, self.ends, "stopped")
        closed_form = ClosedForm(self.problem, self.l2)
        best = begin
        limit = min(_CLOSED_FORM_STEPS, self.max_iterations)
        while self.iterations < limit:
            step = closed_form.step_from(best)
            at = self.problem.evaluate(step, self.l2)
            self.evaluations += 1
            self.iterations += 1
            if not at.value < best.value:
                break
            best = at
            iterate = self.iterate(best, self.ends)
            if iterate.gap <= self.tol:
                return dataclasses.replace(iterate, reason="gap")
            if self.iterations < limit and self._report(iterate):
                return dataclasses.replace(iterate, reason="stopped")
        return dataclasses.replace(
            self.iterate(best, self.ends, "stalled"),
            dropped=closed_form.dropped,
            cutoff=closed_form.cutoff,
        )

    def _report(self, iterate: Iterate) -> bool:
        """Reports an iterate to the caller. Returns whether to stop there."""
        self.gaps.append(min(iterate.gap, self.gaps[-1] if self.gaps else math.inf))
        full = len(self.gaps) == self.gaps.maxlen
        if full and self.gaps[0] - self.gaps[-1] < _STALL_PART * self.gaps[-1]:
            return True
        stop = self.on_iterate is not None and self.on_iterate(iterate)
        if self.problem.replicas.any(stop):
            self.stopped = True
        return self.stopped
