"""The message of a solve: how it ended and, after a failure, what to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from keras_dalign.numerics.rank import check_rank
from keras_dalign.numerics.rounding import rounded
from keras_dalign.numerics.subspace import first_equal

if TYPE_CHECKING:
    from keras_dalign.numerics.rank_check import RankCheck
    from keras_dalign.solving.head_solver import HeadSolver
    from keras_dalign.solving.minimum import Iterate

# Positions of samples that a message lists.
_MAX_LISTED = 10

# Rows in which the rank check looks for repetitions, and rows of its Gram matrix.
_ROWS_SEARCHED = 8192
_CHECKED_ROWS = 1024

_METHOD_NAMES = {"lbfgs": "L-BFGS", "direct": "the closed form"}
_ENDS = {
    "gap": "The gap is small enough",
    "stalled": "Progress stalled",
    "max_iterations": "The iterations were used up (max_iterations)",
    "stopped": "It was stopped",
    "rounding": "The rounding of the head's weights and outputs keeps the gap up",
}


def solve_message(
    solver: HeadSolver,
    last: Iterate,
    value: float,
    gap: float,
    reason: str,
    rank: RankCheck | None,
) -> str:
    """Describes how a solve ended and, after a failure, the likely cause and a remedy.

    Args:
        solver: The solver.
        last: The last point of the minimisation.
        value: The loss with the L2 term, of the head's own outputs.
        gap: Upper bound on the distance of `value` to its infimum.
        reason: Why the solve ended; see `Solution`.
        rank: The rank check of the switch; None to check the rank here if needed.

    Returns:
        The message.
    """
    with_l2 = f" with its L2 term ({solver.l2:.3g})" if solver.l2 else ""
    least = "minimum" if solver.l2 else "infimum"
    outcome = (
        f"{_ENDS[reason]} after {last.iteration} iterations of "
        f"{_METHOD_NAMES[solver.method]}: the loss{with_l2} is {value:.6g}, at most "
        f"{rounded(gap, up=True)} above its {least} (tol={solver.options.tol:.3g}), by "
        f"the model's own outputs in {solver.head.compute_dtype}."
    )
    if reason in {"gap", "stopped"}:
        return outcome
    return " ".join([outcome, *_remedies(solver, last, reason, rank)])


def _remedies(
    solver: HeadSolver, last: Iterate, reason: str, rank: RankCheck | None
) -> list[str]:
    """Sentences on the likely causes of a failure, and what to change."""
    if reason == "rounding":
        text = (
            f"In float64 the gap is {rounded(last.gap, up=True)}. Solve with a small "
            "`l2`, which bounds the weights, accept a larger `tol`, or make the model "
            "in float64."
        )
        return [text]
    remedies = []
    if last.dropped:
        counted = np.count_nonzero(solver.problem.weights)
        remedies.append(
            f"The Gram matrix of the head's features is singular: {last.dropped} "
            f"of {counted} eigenvalues count as zero, being at most "
            f"{last.cutoff:.2g} of the largest one. The solution is that of its "
            "pseudo-inverse: no number of iterations changes what it leaves."
        )
    if reason == "max_iterations":
        remedies.append("Raise `max_iterations`, or accept a larger `tol`.")
    if solver.l2:
        remedies.append("A larger `l2` makes the problem better conditioned.")
        return remedies
    so_far = len(remedies)
    remedies.extend(_equal_features(solver))
    problem = solver.problem
    if rank is None:
        rows = problem.rows.block(slice(_ROWS_SEARCHED))
        rank = check_rank(
            rows,
            problem.gates.r,
            problem.gates.w,
            problem.slope,
            n_samples=problem.n,
            max_rows=_CHECKED_ROWS,
        )
    if rank.reason is not None:
        remedies.append(f"The head may be unable to fit the labels. {rank}")
    if len(remedies) == so_far:
        remedies.append(
            "No sample was found that the head cannot fit, so the problem is "
            "probably ill-conditioned: align with a larger `width` or another "
            f"`slope` (it is {problem.slope:g}), or solve with a small `l2`, "
            "whose optimum is certified as well."
        )
    return remedies


def _equal_features(solver: HeadSolver) -> list[str]:
    """A sentence on samples with equal features, if their targets differ."""
    problem = solver.problem
    groups = first_equal(problem.rows.raw)
    members, index = np.unique(groups, return_inverse=True)
    bounds = problem.loss.lower_bound(
        problem.targets, problem.weights, index, len(members)
    )
    least = float(bounds.sum()) / problem.normalizer
    if least - solver.lower_bound <= solver.options.tol:
        return []
    # Groups whose bound is above the sum of the bounds of their samples alone.
    singles = np.arange(problem.n)
    alone = problem.loss.lower_bound(
        problem.targets, problem.weights, singles, problem.n
    )
    excess = bounds - np.bincount(index, alone, len(members))
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
