"""A head's convex problem, solved to a certified gap, and what to say about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_dalign.numerics.rank import RankCheck, check_rank
from keras_dalign.numerics.repeats import Repeats
from keras_dalign.numerics.subspace import first_equal
from keras_dalign.solving.descent import choose_method, descend
from keras_dalign.solving.l2_path import L2Trial, choose_l2

if TYPE_CHECKING:
    from keras_dalign.numerics.gram import Array
    from keras_dalign.solving.options import SolveOptions
    from keras_dalign.solving.problem import ConvexProblem
    from keras_dalign.solving.walk import Iterate

_MAX_LISTED = 10
_CHECKED_ROWS = 1024

_METHOD_NAMES = {
    "lbfgs": "L-BFGS",
    "newton": "Newton's method",
    "direct": "the closed form",
}


class HeadSolver:
    """Options, lower bound and outcome of solving one problem.

    Args:
        problem: The problem.
        options: The options.
        digests: Of the inputs, `n` of them: identical ones bound the loss from below.
        validation: Samples for the choice of the L2 weight, if it is `"auto"`.
        seed: Seed of the samples held out for it otherwise.

    Raises:
        ValueError: If the method does not fit the loss.
    """

    def __init__(
        self,
        problem: ConvexProblem,
        options: SolveOptions,
        digests: list[bytes],
        validation: ConvexProblem | None = None,
        seed: int = 0,
    ) -> None:
        self.problem = problem
        self.options = options
        self.validation = validation
        self.seed = seed
        repeats = Repeats()
        repeats.add(digests, problem.targets, problem.weights, 0)
        self.lower_bound = repeats.lower_bound(problem.loss) / problem.normalizer
        self.l2 = 0.0 if isinstance(options.l2, str) else float(options.l2)
        self.path: tuple[L2Trial, ...] | None = None
        # Now, as a method that does not fit must not cost a path first.
        l2 = 1.0 if isinstance(options.l2, str) else self.l2
        self.method, self.why = choose_method(problem, options.method, l2)

    def iterates(
        self, start: Array, watch: Callable[[L2Trial], Any] | None = None
    ) -> Iterator[Iterate]:
        """The way from a starting point; the last iterate has a `reason`.

        Args:
            start: Parameters, shape `(size,)`.
            watch: Called with each L2 weight tried.

        Returns:
            An iterator, as `descend`.
        """
        options = self.options
        if options.l2 == "auto":
            choice = choose_l2(
                self.problem,
                start,
                tol=options.tol,
                max_iterations=options.max_iterations,
                validation=self.validation,
                seed=self.seed,
                watch=watch,
            )
            self.l2, start, self.path = choice.l2, choice.theta, choice.trials
        return descend(
            self.problem,
            start,
            method=self.method,
            tol=options.tol,
            lower_bound=self.lower_bound,
            l2=self.l2,
            max_iterations=options.max_iterations,
        )

    def message(self, last: Iterate, rank: RankCheck | None = None) -> str:
        """How it ended, and if it failed, what probably happened and what to change.

        Args:
            last: The last iterate.
            rank: A rank check of the head on these samples, if there was one.

        Returns:
            A few sentences.
        """
        with_l2 = f" with its L2 term ({self.l2:.3g})" if self.l2 else ""
        end = {
            "gap": "The gap is small enough",
            "stalled": "Progress stalled",
            "max_iterations": "The iterations were used up (max_iterations)",
            None: "It was stopped",
        }[last.reason]
        head = (
            f"{end} after {last.iteration} iterations of "
            f"{_METHOD_NAMES[self.method]} ({self.why}): the loss{with_l2} is "
            f"{last.value:.6g}, at most {last.gap:.3g} above its infimum (asked for: "
            f"{self.options.tol:.3g}; in float64)."
        )
        if last.reason in {"gap", None}:
            return head
        return " ".join([head, *self._remedies(last, rank)])

    def _remedies(self, last: Iterate, rank: RankCheck | None) -> list[str]:
        remedies = []
        if last.reason == "max_iterations":
            remedies.append("Raise `max_iterations`, or accept a larger `tol`.")
        if self.l2:
            remedies.append(
                "A larger `l2` makes the problem better conditioned, and method="
                "'newton' needs fewer iterations."
            )
            return remedies
        remedies.extend(self._coinciding())
        problem = self.problem
        if rank is None:
            rank = check_rank(
                problem.features,
                problem.r[:, 0],
                problem.w[0],
                problem.slope,
                max_rows=_CHECKED_ROWS,
            )
        if rank.reason is not None:
            remedies.append(f"The head may be unable to fit the labels. {rank}")
        if len(remedies) == (last.reason == "max_iterations"):
            remedies.append(
                "No sample was found that the head cannot fit, so the problem is "
                "probably ill-conditioned: align with a larger `width` or another "
                f"`slope` (it is {problem.slope:g}), or solve with a small `l2`, "
                "whose optimum is certified as well."
            )
        return remedies

    def _coinciding(self) -> list[str]:
        """Samples whose features are equal, although their inputs differ."""
        problem = self.problem
        groups = first_equal(problem.features)
        members, index = np.unique(groups, return_inverse=True)
        bounds = problem.loss.lower_bound(
            problem.targets, problem.weights, index, len(members)
        )
        least = float(bounds.sum()) / problem.normalizer
        if least - self.lower_bound <= self.options.tol:
            return []
        # A group of several whose bound is above what its samples have each on its own.
        own = np.arange(problem.n)
        each = problem.loss.lower_bound(
            problem.targets, problem.weights, own, problem.n
        )
        excess = bounds - np.bincount(index, each, len(members))
        worst = members[excess > 1e-12 * max(float(excess.max()), 1e-300)]
        listed = np.flatnonzero(np.isin(groups, worst))
        shown = ", ".join(str(i) for i in listed[:_MAX_LISTED])
        more = ", ..." if len(listed) > _MAX_LISTED else ""
        text = (
            f"The trunk gives {len(listed)} samples features that coincide with those "
            f"of another one with another target (positions {shown}{more}), so no head "
            f"can bring the loss below {least:.3g}. Train the trunk for longer, or "
            "feed the head other features (`align(features=...)`)."
        )
        return [text]
