"""The number of gated units, chosen by the loss on samples held out.

With an L2 term the optimum is certified at every width, without a need for rank `n`.
The kernel of a head with `m` random gates is a mean over the gates, so the optimum
converges as `m` grows. The width is doubled until held-out samples show no further
gain. Widths are nested: a wider head starts at the function of the narrower one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_dalign.solving.l2_path import PATH_TOLERANCE
from keras_dalign.solving.minimum import Iterate, minimize

if TYPE_CHECKING:
    from keras_dalign.numerics import Array
    from keras_dalign.solving.held_out import HeldOut

# The width before the first doubling.
FIRST_WIDTH = 8


@dataclasses.dataclass(frozen=True)
class WidthTrial:
    """One width that was tried.

    Attributes:
        width: The width.
        held_out_loss: Loss of the samples held out, at the minimum.
        held_out_error: Fraction of these that are misclassified; None for squared
            error.
        change: Decrease of the loss from half the width; NaN for the first width.
        standard_error: Standard error of the change, over the samples; NaN for the
            first width.
    """

    width: int
    held_out_loss: float
    held_out_error: float | None
    change: float
    standard_error: float

    def __str__(self) -> str:
        text = f"width {self.width}: held-out loss {self.held_out_loss:.4g}"
        if np.isfinite(self.change):
            side = "lower" if self.change >= 0 else "higher"
            text += f" ({abs(self.change):.2g} +- {self.standard_error:.2g} {side})"
        return text


@dataclasses.dataclass(frozen=True, eq=False)
class WidthChoice:
    """The width after which doubling no longer helps.

    Attributes:
        width: The width.
        theta: The minimum for it on the samples trained on, to start from.
        trials: Every width tried.
    """

    width: int
    theta: Array
    trials: tuple[WidthTrial, ...]


def choose_width(
    samples_at: Callable[[int], HeldOut],
    start: Array,
    *,
    first: int,
    largest: int,
    l2: float,
    tol: float,
    max_iterations: int = 1000,
    on_trial: Callable[[WidthTrial], Any] | None = None,
) -> WidthChoice:
    """Doubles the width until the held-out loss falls by less than its standard error.

    Args:
        samples_at: Returns the samples to train on, and the held-out ones, for a head
            of a given width. Gates are nested: the first ones are the same at every
            width.
        start: Parameters to start at, for the first width.
        first: The first width.
        largest: The largest width that is tried.
        l2: Weight of the L2 term, positive.
        tol: Gap of each minimum, if it exceeds a thousandth of the first loss.
        max_iterations: Largest number of iterations for one width.
        on_trial: Called with each trial.

    Returns:
        The width before the doubling that did not help, or the largest one.
    """
    trials: list[WidthTrial] = []
    width, theta = first, start
    before: tuple[int, Array, Array, Array] | None = None
    while True:
        samples = samples_at(width)
        if before is not None:
            units = samples.trained.units
            theta = nested(before[1], units, before[3], samples.trained.gates.w)
        last: Iterate = minimize(
            samples.trained,
            theta,
            method="lbfgs",
            tol=tol,
            part=PATH_TOLERANCE,
            l2=l2,
            max_iterations=max_iterations,
            exact=False,
        )
        losses = samples.losses(last)
        change = error = np.nan
        if before is not None:
            decreases = before[2] - losses
            change = float(decreases.mean())
            error = float(decreases.std() / np.sqrt(len(decreases)))
        trials.append(
            WidthTrial(width, float(losses.mean()), samples.error(last), change, error)
        )
        if on_trial is not None:
            on_trial(trials[-1])
        if before is not None and not change > error:
            return WidthChoice(before[0], before[1], tuple(trials))
        if 2 * width > largest:
            return WidthChoice(width, last.theta, tuple(trials))
        before = width, last.theta, losses, samples.trained.gates.w
        width *= 2


def nested(theta: Array, units: int, narrow: Array, wide: Array) -> Array:
    """Parameters of a wider head with the same function as a narrower one.

    Args:
        theta: Parameters of the narrower head, shape `(d * units * m + units,)`.
        units: Number of outputs.
        narrow: Its output weights, shape `(units, m)` or `(1, m)`.
        wide: Output weights of the wider head, whose first gates are the same.

    Returns:
        Shape `(d * units * M + units,)`. The wider head has smaller output weights, so
        `q` is larger. The new units start at 0.
    """
    m = narrow.shape[1]
    q = theta[:-units].reshape(-1, units, m)
    grown = np.zeros((len(q), units, wide.shape[1]))
    grown[..., :m] = q * (narrow / wide[:, :m])
    return np.concatenate([grown.ravel(), theta[-units:]])
