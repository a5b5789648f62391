"""Solves a head's convex problem to a certified gap.

The steps are: choose the L2 weight, choose the width, minimise, and measure the loss of
the head itself, with its weights and outputs in their own dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_dalign.numerics.repeats import Repeats
from keras_dalign.numerics.rounding import rounded
from keras_dalign.solving.held_out import HeldOut, hold_out
from keras_dalign.solving.l2_path import WEAKEST_BY_SEEN, L2Trial, choose_l2
from keras_dalign.solving.minimum import Iterate, OnIterate, choose_method, minimize
from keras_dalign.solving.own_loss import OwnLoss, OwnMeasure
from keras_dalign.solving.principal_components import principal_components
from keras_dalign.solving.problem import ConvexProblem
from keras_dalign.solving.solve_message import solve_message
from keras_dalign.solving.width import FIRST_WIDTH, WidthTrial, choose_width

if TYPE_CHECKING:
    from keras_dalign.head.alignment_head import AlignmentHead
    from keras_dalign.head.features import FeatureSet
    from keras_dalign.numerics import Array
    from keras_dalign.numerics.losses import ConvexLoss
    from keras_dalign.numerics.rank_check import RankCheck
    from keras_dalign.solving.feature_rows import FeatureRows
    from keras_dalign.solving.options import SolveOptions

# From this number of features on, L2 weights and widths are tried on principal
# components with this share of the sum of squares. The L2 weights that are tried on
# training samples keep parameters along the other directions small in any case.
_MANY_FEATURES = 256
_COMPONENTS_SHARE = 0.95

# Ridges tried if rounding spoils the solution, as fractions of the largest curvature.
_RIDGES = tuple(10.0**-k for k in range(2, 17))
_RIDGE_TOLERANCE = 1e-4
# Rounding spoils the solution if it costs this fraction of the decrease of the loss.
_SPOILT_SHARE = 1e-4
_RIDGE_ITERATIONS = 200


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """The result of a solve, measured on the head itself.

    Attributes:
        value: The loss of the head's own outputs, with its L2 term.
        gap: Upper bound on the distance of `value` to its infimum.
        converged: Whether the gap is at most the tolerance plus the rounding error of
            the outputs.
        last: The last point of the solver, measured in float64.
        reason: Why it ended; see `Iterate`, or `"rounding"`.
        message: How it ended and, after a failure, what to change.
        l2: Weight of the L2 term.
        path: Every weight tried, for `l2="auto"`.
        widths: Every width tried, if the width was chosen.
    """

    value: float
    gap: float
    converged: bool
    last: Iterate
    reason: str
    message: str
    l2: float
    path: tuple[L2Trial, ...] | None
    widths: tuple[WidthTrial, ...] | None


def first_width(head: AlignmentHead, options: SolveOptions) -> int | None:
    """The width at the switch of a head that the solver will train.

    Args:
        head: The head, which explores.
        options: Options of the solver.

    Returns:
        A small width if the solver chooses the width: with an L2 term and random gates,
        unless the user set a width. Otherwise None, for the default.
    """
    chosen = options.l2 != 0 and head.gates == "random"
    if not chosen or head.requested_width is not None:
        return None
    return min(FIRST_WIDTH, head.default_width())


class HeadSolver:
    """Solves the problem of one head.

    Args:
        head: The head, which exploits.
        features: Features, targets, weights and digests of the inputs. Identical inputs
            give a lower bound of the loss.
        loss: The loss.
        options: The options.
        validation: Samples for the choice of the L2 weight and the width; a fifth of
            the training samples by default.
        set_width: A function that sets the head's width, such as
            `AlignedModel.set_width`. With it, the width is chosen.
        say: Called with lines on what was tried and chosen.

    Raises:
        ValueError: If the method does not fit the loss, the data do not fit, or several
            processes have different data.
    """

    def __init__(
        self,
        head: AlignmentHead,
        features: FeatureSet,
        loss: ConvexLoss,
        options: SolveOptions,
        *,
        validation: FeatureSet | None = None,
        set_width: Callable[[int], None] | None = None,
        say: Callable[[object], Any] | None = None,
    ) -> None:
        self.head = head
        self.options = options
        self.problem = ConvexProblem.from_head(head, features, loss)
        self.problem.replicas.check_alike(
            {
                "samples": self.problem.n,
                "targets": self.problem.targets,
                "sample weights": self.problem.weights,
            }
        )
        self.validation = None
        if validation is not None:
            self.validation = ConvexProblem.from_head(head, validation, loss)
        self.set_width = set_width
        self.say = say
        repeats = Repeats()
        digests = features.digests or []
        repeats.add(digests, self.problem.targets, self.problem.weights, 0)
        self.lower_bound = repeats.lower_bound(loss) / self.problem.normalizer
        self.own_loss = OwnLoss(head, features)
        self.method, self.why = choose_method(self.problem, options.method)
        self.l2 = 0.0 if isinstance(options.l2, str) else float(options.l2)

    def solve(
        self, on_iterate: OnIterate | None = None, rank: RankCheck | None = None
    ) -> Solution:
        """Solves the problem and sets the head to the solution.

        The head ends at the point of least loss of its own outputs, which is never
        above the loss at the start. An interruption (Ctrl-C) leaves it at the last
        iterate, or at the start if that is better. If units that replace the output
        layer are not trained yet, the output layer is restored instead.

        Args:
            on_iterate: Called with each iterate of the last minimisation, to which the
                head is not set yet; True stops.
            rank: The rank check of the switch, for the message after a failure.

        Returns:
            The solution.

        Raises:
            KeyboardInterrupt: If it was interrupted.
        """
        start = self.problem.theta_of(self.head)
        # Units that have just replaced the output layer are still at 0.
        untrained = self.head.replaces_dense and not start.any()
        plain_start = self.own_loss.measure(self.problem).loss
        current: Iterate | None = None

        def watch(iterate: Iterate) -> Any:
            nonlocal current
            current = iterate
            return on_iterate(iterate) if on_iterate is not None else None

        try:
            path, widths, warm = self._choose(start)
            if self.problem.size != start.size:
                # The units have another width now, and start at 0.
                start = np.zeros(self.problem.size)
            own_start = plain_start + self._l2_term(start)
            last = minimize(
                self.problem,
                warm,
                method=self.method,
                tol=self.options.tol,
                lower_bound=self.lower_bound,
                l2=self.l2,
                max_iterations=self.options.max_iterations,
                on_iterate=watch,
            )
        except BaseException as error:
            if current is None:
                if untrained:
                    self.head.keep_dense()
            elif isinstance(error, KeyboardInterrupt):
                self._assign(current.theta)
                if self._measure(current.theta)[0] > own_start:
                    self._assign(start)
            raise
        return self._finish(last, start, own_start, path, widths, rank)

    def _finish(
        self,
        last: Iterate,
        start: Array,
        own_start: float,
        path: tuple[L2Trial, ...] | None,
        widths: tuple[WidthTrial, ...] | None,
        rank: RankCheck | None,
    ) -> Solution:
        """Sets the head to the point of least loss of its own outputs; measures it."""
        tol, bound = self.options.tol, last.lower_bound
        self._assign(last.theta)
        value, own = self._measure(last.theta)
        reason = last.reason or "stopped"
        excess = max(value - last.value - own.outputs, own.cancellation)
        spoilt = excess > max(tol, _SPOILT_SHARE * (own_start - last.value))
        if spoilt and not self.l2 and reason != "stopped":
            value, own = self._with_ridge(last, start, value, own)
        if value > own_start:
            self._assign(start)
            value, own = self._measure(start)
        gap = max(value - bound, 0.0)
        converged = gap <= tol + own.outputs
        if reason == "gap" and not converged:
            reason = "rounding"
        message = solve_message(self, last, value, gap, reason, rank)
        if self.l2:
            plain = rounded(max(own.loss - self.lower_bound, 0.0), up=True)
            message += (
                f" The plain loss is {own.loss:.6g}, at most {plain} above its infimum."
            )
        return Solution(
            value, gap, converged, last, reason, message, self.l2, path, widths
        )

    def _with_ridge(
        self, last: Iterate, start: Array, value: float, own: OwnMeasure
    ) -> tuple[float, OwnMeasure]:
        """Solves with a small ridge where large parameters make rounding too large.

        Adds `ridge / 2 * ||theta - start||^2` with smaller and smaller ridges. The head
        ends at the point with the least sum of its own loss and the estimated change of
        that loss with the order of sums.

        Returns:
            The loss there, and the measure of the head's own loss.
        """

        def cost(found: tuple[float, OwnMeasure]) -> float:
            return found[0] + found[1].cancellation + found[1].drift

        problem = self.problem.centred(start)
        # Bound on the curvature of the loss, for features of length sqrt(d).
        scale = problem.loss.max_curvature(problem.units) * problem.d
        scale *= float(problem.weights.sum()) / problem.normalizer
        best, best_theta = (value, own), last.theta
        theta, worse = start, 0
        for part in _RIDGES:
            theta = minimize(
                problem,
                theta,
                method=self.method,
                tol=self.options.tol,
                part=_RIDGE_TOLERANCE,
                lower_bound=self.lower_bound,
                l2=part * scale,
                max_iterations=_RIDGE_ITERATIONS,
            ).theta
            self._assign(theta)
            found = self._measure(theta)
            worse = 0 if cost(found) < cost(best) else worse + 1
            if worse == 0:
                best, best_theta = found, theta
            elif worse > 1 and best_theta is not last.theta:
                break
        self._assign(best_theta)
        return best

    def _choose(
        self, start: Array
    ) -> tuple[tuple[L2Trial, ...] | None, tuple[WidthTrial, ...] | None, Array]:
        """Chooses L2 weight and width; returns all trials and where to start."""
        options = self.options
        auto = options.l2 == "auto"
        if not auto and (self.set_width is None or not self.l2):
            return None, None, start
        problem = self.problem
        mask = basis = None
        if self.validation is None:
            mask = hold_out(problem, self.head.seed)
            if mask is None:
                self._without_held_out(auto)
                return None, None, start
            if problem.d >= _MANY_FEATURES and not start.any():
                basis = principal_components(problem.rows, _COMPONENTS_SHARE)
        path = None
        coordinates = None if basis is None else problem.coordinates(basis)
        first = self._held_out(problem, mask, coordinates)
        theta = first.trained.center if basis is not None else start
        if auto:
            choice = choose_l2(
                first,
                theta,
                tol=options.tol,
                max_iterations=options.max_iterations,
                on_trial=self.say,
            )
            self.l2, path, theta = choice.l2, choice.trials, choice.last.theta
        widths = None
        if self.set_width is not None:
            found = choose_width(
                lambda width: self._held_out(self._at_width(width), mask, coordinates),
                theta,
                first=problem.width,
                largest=self.head.default_width(),
                l2=self.l2,
                tol=options.tol,
                max_iterations=options.max_iterations,
                on_trial=self.say,
            )
            theta, widths = found.theta, found.trials
            if found.width != problem.width:
                self.set_width(found.width)
                self.problem = problem.with_gates(*self.head.gates_in_use())
        if basis is not None:
            theta = self.problem.unrestricted(basis, theta)
        return path, widths, theta

    def _without_held_out(self, auto: bool) -> None:
        """Sets the L2 weight if there are too few samples to hold some out."""
        if auto:
            total = float(self.problem.weights.sum())
            self.l2 = WEAKEST_BY_SEEN * total / self.problem.normalizer
        if self.say is not None:
            self.say(
                "There are too few samples to hold some out: the L2 weight is "
                f"{self.l2:.3g}, and the width {self.problem.width}."
            )

    def _at_width(self, width: int) -> ConvexProblem:
        if width == self.problem.width:
            return self.problem
        return self.problem.with_gates(*self.head.gates_at_switch(width=width))

    def _held_out(
        self,
        problem: ConvexProblem,
        mask: np.ndarray | None,
        coordinates: FeatureRows | None,
    ) -> HeldOut:
        if mask is None:
            judges = self.validation or problem
            if judges.width != problem.width:
                judges = judges.with_gates(problem.gates.r, problem.gates.w)
            return HeldOut.other(problem, judges)
        if coordinates is not None:
            problem = problem.restricted(coordinates)
        return HeldOut.part_of(problem, mask)

    def _assign(self, theta: Array) -> None:
        self.problem.assign(self.head, theta)

    def _measure(self, theta: Array) -> tuple[float, OwnMeasure]:
        """The head's own loss with the L2 term, and the measure of its own loss."""
        own = self.own_loss.measure(self.problem)
        return own.loss + self._l2_term(theta), own

    def _l2_term(self, theta: Array) -> float:
        change = theta - self.problem.center
        return 0.5 * self.l2 * float(change @ change)
