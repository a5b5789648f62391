"""The weight of the L2 term, chosen by the loss on samples held out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from keras_dalign.solving.minimum import Iterate, minimize

if TYPE_CHECKING:
    from keras_dalign.numerics import Array
    from keras_dalign.solving.held_out import HeldOut

# The weights tried, from strong to weak, for a loss that is a mean. For a sum they are
# multiplied by the number of samples.
_WEIGHTS = tuple(10.0**-k for k in range(8))
# The weakest weight that is tried on held-out samples that the trunk was trained on.
# Below it, their loss still falls while that of new samples rises
# (`benchmarks.solve_tradeoff` shows test losses).
WEAKEST_BY_SEEN = 1e-3
# The gap of a minimum on the path, as a fraction of the first loss. The final minimum
# is more accurate.
PATH_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class L2Trial:
    """One weight that was tried.

    Attributes:
        l2: The weight.
        train_loss: Loss of the samples trained on, without the L2 term.
        held_out_loss: Loss of the samples held out.
        held_out_error: Fraction of these that are misclassified; None for squared
            error.
        iterations: Number of iterations, from the minimum of the weight before.

    Losses and error are those of the minimum, or of the last iterate if the weight was
    given up before.
    """

    l2: float
    train_loss: float
    held_out_loss: float
    held_out_error: float | None
    iterations: int

    def __str__(self) -> str:
        error = (
            ""
            if self.held_out_error is None
            else f", error {100 * self.held_out_error:.2f} %"
        )
        return f"l2={self.l2:.0e}: held-out loss {self.held_out_loss:.4g}{error}"


@dataclasses.dataclass(frozen=True, eq=False)
class L2Choice:
    """The weight of the least held-out loss.

    Attributes:
        l2: The weight.
        last: The minimum for it on the samples trained on.
        trials: Every weight tried, from strong to weak.
    """

    l2: float
    last: Iterate
    trials: tuple[L2Trial, ...]


def choose_l2(
    samples: HeldOut,
    start: Array,
    *,
    tol: float,
    max_iterations: int = 1000,
    on_trial: Callable[[L2Trial], Any] | None = None,
) -> L2Choice:
    """Tries a path of L2 weights, from strong to weak, and takes the best one.

    Each weight starts at the minimum of the weight before. It is given up as soon as
    the held-out loss is above the best one by more than the gap. If the trunk was
    trained on the held-out samples, their loss is too low for weak weights, so the path
    ends at 1e-3. Otherwise it ends at 1e-7. (For a loss that is a sum, these are
    multiplied by the number of samples.)

    Args:
        samples: The samples to train on, and the held-out ones.
        start: Parameters to start at, shape `(size,)`.
        tol: Gap of each minimum, if it exceeds a thousandth of the first loss.
        max_iterations: Largest number of iterations for one weight.
        on_trial: Called with each trial.

    Returns:
        The weight, its minimum, and all trials.
    """
    trained = samples.trained
    unit = samples.mean_weight
    weakest = WEAKEST_BY_SEEN if samples.own else 0.0
    trials: list[L2Trial] = []
    best: tuple[int, Iterate] | None = None
    theta = start
    for weight in (w for w in _WEIGHTS if w >= weakest):
        least = trials[best[0]].held_out_loss if best else None

        def cannot_win(iterate: Iterate, least: float | None = least) -> bool:
            # The loss that can still be gained is less than the distance to the best
            # held-out loss.
            return least is not None and iterate.gap < samples.loss(iterate) - least

        last = minimize(
            trained,
            theta,
            method="lbfgs",
            tol=tol,
            part=PATH_TOLERANCE,
            l2=weight * unit,
            max_iterations=max_iterations,
            on_iterate=cannot_win,
            exact=False,
        )
        theta = last.theta
        trials.append(
            L2Trial(
                l2=weight * unit,
                train_loss=last.loss,
                held_out_loss=samples.loss(last),
                held_out_error=samples.error(last),
                iterations=last.iteration,
            )
        )
        if on_trial is not None:
            on_trial(trials[-1])
        if best and trials[-1].held_out_loss > trials[best[0]].held_out_loss:
            # Weaker weights take more iterations, and their held-out loss rises.
            break
        best = len(trials) - 1, last
    index, last = best or (0, last)
    return L2Choice(trials[index].l2, last, tuple(trials))
