"""The number of gated units, chosen by the loss on samples held out.

With an L2 term the optimum is certified at every width: nothing needs rank n. With `m`
random gates the head's kernel is a mean over `m`, so the optimum settles as `m` grows,
and the samples tell when. Widths are doubled, and nested: the function of the narrower
head is where the wider one starts.
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

# Where the doubling starts.
FIRST_WIDTH = 8


@dataclasses.dataclass(frozen=True)
class WidthTrial:
    """One width that was tried.

    Attributes:
        width: The width.
        held_out_loss: Loss of the samples held out, at the minimum.
        held_out_error: Fraction of them that are misclassified; None for squared error.
        change: How much lower the loss is than at half the width; NaN for the first.
        standard_error: Of the change, over the samples; NaN for the first.
    """

    width: int
    held_out_loss: float
    held_out_error: float | None
    change: float
    standard_error: float

    def __str__(self) -> str:
        text = f"width {self.width}: held-out loss {self.held_out_loss:.4g}"
        if np.isfinite(self.change):
            text += f" ({self.change:.2g} +- {self.standard_error:.2g} lower)"
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
        samples_at: The samples to train on and to judge by, for a head of a width.
            Gates are nested: the first ones are the same at every width.
        start: Parameters to start at, for the first width.
        first: The first width.
        largest: No wider head is tried.
        l2: Weight of the L2 term, positive.
        tol: Gap of each minimum, if it is more than a thousandth of the first loss.
        max_iterations: Most iterations for one width.
        on_trial: Called with each trial.

    Returns:
        The width before the doubling that did not help, or the largest.
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
            falls = before[2] - losses
            change = float(falls.mean())
            error = float(falls.std() / np.sqrt(len(falls)))
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
    """Parameters of a wider head whose function is the same.

    Args:
        theta: Those of the narrower one, shape `(d * units * m + units,)`.
        units: Number of outputs.
        narrow: Its output weights, shape `(units, m)` or `(1, m)`.
        wide: Those of the wider one, whose first gates are the same.

    Returns:
        Shape `(d * units * M + units,)`: output weights are smaller, so `q` is larger,
        and the new units start at 0.
    """
    m = narrow.shape[1]
    q = theta[:-units].reshape(-1, units, m)
    grown = np.zeros((len(q), units, wide.shape[1]))
    grown[..., :m] = q * (narrow / wide[:, :m])
    return np.concatenate([grown.ravel(), theta[-units:]])
