"""Full-batch minimisation of a head's convex problem, until the gap is small.

Three rules give the steps: `Lbfgs`, `Newton` and, for squared error, `Direct`. The
logits are linear in the parameters, so along a search direction they are known from one
product, and a line search costs no further one: that is what makes these methods faster
here than general ones, which know nothing of the structure.

Where features are many, products are in float32, which takes half the time, as long as
that gets anywhere; losses are summed in float64, and the last iterate is measured in
float64 from its parameters.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from keras_dalign.numerics.losses import SquaredError
from keras_dalign.solving.direct import Direct
from keras_dalign.solving.lbfgs import Lbfgs
from keras_dalign.solving.newton import Newton
from keras_dalign.solving.walk import EPS, Iterate, Walk

if TYPE_CHECKING:
    from keras_dalign.numerics.gram import Array
    from keras_dalign.solving.problem import ConvexProblem

# Up to so many samples one Cholesky factorisation per output costs less than the
# hundreds of products that conjugate gradients take.
_DIRECT_SAMPLES = 4096

# It counts as a stall if so many iterations take less than this part off the gap.
_STALL_ITERATIONS = 100
_STALL_PART = 0.01


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
    Iterates are measured as exactly as their logits and gradients were computed, the
    last one in float64.

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
    rule = Direct if method == "direct" else Newton if method == "newton" else Lbfgs
    # A quadratic takes one step, which has to be exact.
    rough = not isinstance(problem.loss, SquaredError)
    walk = Walk(problem, start, tol, lower_bound, l2, rough=rough)
    if not math.isfinite(walk.value):
        walk.sharpen()
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
        if reason is None:
            yield walk.iterate(iteration, None)
            if step() or (walk.sharpen() and step()):
                continue
            reason = "stalled"
        if reason != "gap":
            walk.recompute()
            reason = "gap" if walk.gap <= tol else reason
        yield walk.iterate(iteration, reason)
        return
