"""The result of `forecast`: a bound on the loss after any number of gradient steps."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from keras_dalign.numerics.arguments import number, shown
from keras_dalign.numerics.html_table import html_table
from keras_dalign.numerics.rounding import EPS, rounded

if TYPE_CHECKING:
    from keras_dalign.certification.forecast_candidates import Modes
    from keras_dalign.numerics import Array

# Float64 represents all integers up to this one.
_MAX_STEPS = 2**53


@dataclasses.dataclass(frozen=True, eq=False)
class Forecast:
    """A bound on the loss after any number of gradient steps in exploitation.

    The bound is proven, `exact` or not, and includes an allowance for rounding in
    float64. If `exact`, the smoothness and the distances to the logits `psi * Y_l` come
    from eigendecompositions. Otherwise the smoothness comes from a bound on the
    eigenvalues, and the parameters `theta*` from a few iterations of L-BFGS alone; the
    bound is then valid, but looser.

    Attributes:
        loss: The loss at the current weights.
        lower_bound: Loss that no function of the inputs can go below.
        step_size: The step `eta` of gradient descent.
        smoothness: `Ls`, an upper bound on the Lipschitz constant of the gradient.
        exact: Whether eigendecompositions were used.
        contraction: Upper bound on the factor by which a step multiplies `L - inf L`,
            where the problem is strongly convex in the logits (squared error, full
            rank); else None.
        rank: The smallest rank of the outputs' Gram matrices, bias included, in
            float64, or None if it was not computed.
        deficit: Number of distinct inputs with nonzero weight minus `rank`, at least 0,
            or None if it was not computed.
        n_samples: Number of samples.
        n_distinct: Number of distinct inputs among them.
        n_conflicts: Number of distinct inputs that came with conflicting targets.
        distance: Coefficients `(a, b, c)` of the squared distance
            `a psi^2 + b psi + c` to the parameters of least norm (to rounding) that
            reach `psi * Y_l` (plus the best logits where those are finite), or None
            if it was not computed.
        losses: Losses `L(theta*)` of the parameters that the bound uses, shape `(k,)`.
        squared_distances: `||theta_0 - theta*||^2` for each, shape `(k,)`.
        rounding: The most that rounding of the logits can add to the square root of the
            loss, for each, shape `(k,)`. It grows with the number `d + m` of terms in a
            sum and with their size: 2e-16 for one term of size 1.
        objective: The loss that is bounded, in words.
    """

    loss: float
    lower_bound: float
    step_size: float
    smoothness: float
    exact: bool
    contraction: float | None
    rank: int | None
    deficit: int | None
    n_samples: int
    n_distinct: int
    n_conflicts: int
    distance: tuple[float, float, float] | None
    losses: Array = dataclasses.field(repr=False)
    squared_distances: Array = dataclasses.field(repr=False)
    rounding: Array = dataclasses.field(repr=False)
    objective: str
    _modes: Modes | None = dataclasses.field(default=None, repr=False)

    def bound(self, steps: npt.ArrayLike) -> Array:
        """An upper bound on the loss after some numbers of steps.

        It holds for a loss that is computed in float64. With
        `B_k = losses_k + squared_distances_k / (2 step_size t)` it is the least of
        `(sqrt(B_k) + rounding_k)^2`, plus `n` units of rounding for a sum over `n`
        samples. For squared error and `exact`, `B_k` is the loss computed from the
        eigenvectors, where that is less; but it is at least `losses_k`.

        Args:
            steps: Numbers of steps, at least 0, of any shape.

        Returns:
            Bounds of that shape, `loss` itself for 0 steps. From the first step on they
            do not grow with the number of steps.

        Raises:
            ValueError: If a number is negative or not finite.
        """
        given = np.asarray(steps)
        is_real = given.dtype.kind in "iuf"
        t = given.astype(np.float64) if is_real else np.array(np.nan)
        if not (np.isfinite(t) & (t >= 0)).all():
            raise ValueError(
                "`steps` must be finite numbers, at least 0. Received: "
                f"steps={shown(steps)}"
            )
        flat = t.reshape(-1, 1)
        found = np.full(flat.shape[0], self.loss)
        later = flat[:, 0] > 0
        if later.any():
            slopes = self.squared_distances / (2.0 * self.step_size * flat[later])
            exact = self.losses + slopes
            if self._modes is not None:
                # The rounding allowance of theta* is valid at or above its loss only.
                modes = self._modes.after(flat[later, 0], self.step_size)[:, None]
                exact = np.minimum(exact, np.maximum(modes, self.losses))
            rounded_up = (np.sqrt(exact) + self.rounding) ** 2
            found[later] = rounded_up.min(axis=1) * (1.0 + self.n_samples * EPS)
        return found.reshape(t.shape)

    def steps_to(self, loss: float) -> int | None:
        """The number of steps after which the loss is at most `loss`.

        Args:
            loss: The wanted loss.

        Returns:
            The smallest `t` with `bound(t) <= loss`; None if there is none up to 2^53.
            The loss may be reached nevertheless.

        Raises:
            ValueError: If `loss` is not finite.
        """
        number("loss", loss, "finite: a number", lambda _: True)
        if loss >= self.loss:
            return 0
        high = 1
        while self.bound(high) > loss:
            high *= 2
            if high > _MAX_STEPS:
                return None
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            if self.bound(middle) > loss:
                low = middle
            else:
                high = middle
        return high

    def steps_to_gap(self, gap: float) -> int | None:
        """The number of steps after which the gap of `certify` is at most `gap`.

        Args:
            gap: The wanted distance of the loss to `lower_bound`, positive.

        Returns:
            As `steps_to`.

        Raises:
            ValueError: If `gap` is not positive, or so small that adding it to
                `lower_bound` changes nothing in float64.
        """
        number("gap", gap, "positive: a number above 0", lambda v: v > 0)
        if self.lower_bound + gap == self.lower_bound:
            raise ValueError(
                f"`gap` is below the rounding of the lower bound {self.lower_bound:.6g}"
                f" in float64. Received: gap={gap}"
            )
        return self.steps_to(self.lower_bound + gap)

    def to_dict(self) -> dict[str, Any]:
        """The forecast as a dict that `json.dumps` accepts."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if not field.name.startswith("_")
        }
        for name in ("losses", "squared_distances", "rounding"):
            fields[name] = fields[name].tolist()
        if self.distance is not None:
            fields["distance"] = list(self.distance)
        return fields

    def __str__(self) -> str:
        how = (
            "distances and smoothness from eigendecompositions in float64"
            if self.exact
            else "a sharper constant may exist: distances and smoothness are estimates "
            "from above"
        )
        milestones = ", ".join(
            f"{rounded(bound, up=True)} after {steps:,} steps"
            for steps, bound in self._milestones()
        )
        gap = self.steps_to_gap(1e-3)
        goal = (
            "no number of steps is known to bring it within 0.001 of "
            if gap is None
            else f"within {gap:,} steps it is at most 0.001 above "
        )
        rank = ""
        if self.deficit:
            rank = (
                f"; the features' rank of {self.rank} is {self.deficit} too small to "
                "separate all inputs, so that the infimum may be out of reach"
            )
        return (
            f"Full-batch gradient descent on the head with step {self.step_size:.3g} "
            f"brings the loss from {self.loss:.3g} to at most {milestones}; {goal}"
            f"{self.lower_bound:.3g}, below which no function of the inputs can go"
            f"{rank}; {how}; objective: {self.objective}."
        )

    def _repr_html_(self) -> str:
        rows = {
            "loss": f"{self.loss:.6g}",
            **{
                f"after {steps:,} steps, at most": f"<b>{rounded(bound, up=True)}</b>"
                for steps, bound in self._milestones()
            },
            "lower bound": f"{self.lower_bound:.6g}",
            "step": f"{self.step_size:.4g}",
            "smoothness": f"{self.smoothness:.4g}",
            "exact": str(self.exact),
            "objective": html.escape(self.objective),
        }
        return html_table(rows)

    def _milestones(self) -> Iterator[tuple[int, float]]:
        return ((steps, float(self.bound(steps))) for steps in (100, 10_000, 1_000_000))
