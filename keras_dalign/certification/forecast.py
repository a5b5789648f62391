"""How fast first-order exploitation will bring the loss down, at least.

The exploitation problem is convex and smooth. For full-batch gradient descent with a
step `eta <= 1 / Ls`, `Ls` the Lipschitz constant of the gradient, and *any* parameters
`theta*`,

    L_t <= L(theta*) + ||theta_0 - theta*||^2 / (2 eta t).

A forecast holds several `theta*`, each with its loss and its distance, and takes the
one that makes the right side smallest for each `t`.

The inequality is exact, and losses are computed in float64. So the bound that is
reported is `(sqrt(B) + rho)^2`, slightly above the exact bound `B`, with an allowance
`rho` for the rounding of the logits; see `rounding_allowances` in
`forecast_candidates.py`.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import numpy.typing as npt

from keras_dalign.certification.exploiting_head import exploiting_head
from keras_dalign.certification.forecast_candidates import (
    Modes,
    envelope,
    path_candidates,
    rounding_allowances,
    smoothness_bound,
    spectra_of,
)
from keras_dalign.head import data
from keras_dalign.head.batch_predictor import BatchPredictor
from keras_dalign.head.features import FeatureSet
from keras_dalign.head.objective import (
    check_some_weight,
    check_targets,
    loss_of,
    sample_weights,
    single_array,
)
from keras_dalign.numerics.arguments import flag, integer, number, shown
from keras_dalign.numerics.html_table import html_table
from keras_dalign.numerics.repeats import Repeats, digests
from keras_dalign.numerics.rounding import EPS, rounded
from keras_dalign.solving.problem import ConvexProblem

if TYPE_CHECKING:
    from keras_dalign.numerics import Array, Indices
    from keras_dalign.training.aligned_model import AlignedModel

# Eigendecompositions of one n x n matrix per output: seconds on two cores.
_EXACT_SAMPLES = 1500

# Beyond so many steps a double no longer counts them.
_MAX_STEPS = 2**53


@dataclasses.dataclass(frozen=True, eq=False)
class Forecast:
    """A bound on the loss after any number of gradient steps in exploitation.

    It is a proven bound whether it is exact or not, with an allowance for rounding in
    float64 on top. `exact` says that the smoothness, and distances to the logits
    `psi * Y_l`, come from eigendecompositions; otherwise the smoothness comes from a
    bound on the eigenvalues, and the parameters from a few iterations of L-BFGS alone,
    so that the constants are estimates of the best ones.

    Attributes:
        loss: The loss at the current weights.
        lower_bound: Loss below which no function of the inputs can go.
        step_size: The step `eta` of gradient descent.
        smoothness: `Ls`, an upper bound on the Lipschitz constant of the gradient.
        exact: Whether it rests on eigendecompositions.
        contraction: Factor by which each step shrinks `L - inf L` at least, where the
            problem is strongly convex in the logits (squared error, full rank);
            else None.
        rank: The smallest rank of the outputs' Gram matrices, bias included, in
            float64, or None if it was not computed.
        deficit: By how much the rank is below the number of distinct inputs that have
            weight, or None if it was not computed.
        n_samples: Number of samples.
        n_distinct: Number of distinct inputs among them.
        n_conflicts: Number of distinct inputs that came with conflicting targets.
        distance: Coefficients `(a, b, c)` of the squared distance
            `a psi^2 + b psi + c` to the parameters of least norm (to rounding) that
            reach `psi * Y_l` (plus the best logits where those are finite), or None
            if it was not computed.
        losses: Losses `L(theta*)` of the parameters that the bound uses, shape `(k,)`.
        squared_distances: `||theta_0 - theta*||^2` for each, shape `(k,)`.
        rounding: What rounding of the logits may add to the square root of the loss,
            for each, shape `(k,)`. It grows with the number `d + m` of terms that are
            summed and with their size: 2e-16 for one term of size 1.
        objective: The loss that the forecast speaks of, in words.
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
        """An upper bound on the loss after so many steps.

        It holds for a loss that is computed in float64: with
        `B_k = losses_k + squared_distances_k / (2 step_size t)` it is the least of
        `(sqrt(B_k) + rounding_k)^2`, plus `n` units of rounding for a sum over `n`
        samples. For squared error and `exact`, `B_k` is the loss that the eigenvectors
        foretell where that is less, and at least `losses_k`.

        Args:
            steps: Numbers of steps, at least 0, of any shape.

        Returns:
            Bounds of that shape. After 0 steps it is the loss itself. From the first
            step on bounds do not grow with the number of steps.

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
                # The allowance of theta* is for losses that are not below its own.
                modes = self._modes.after(flat[later, 0], self.step_size)[:, None]
                exact = np.minimum(exact, np.maximum(modes, self.losses))
            rounded_up = (np.sqrt(exact) + self.rounding) ** 2
            found[later] = rounded_up.min(axis=1) * (1.0 + self.n_samples * EPS)
        return found.reshape(t.shape)

    def steps_to(self, loss: float) -> int | None:
        """The number of steps after which the loss is at most this one.

        Args:
            loss: The wanted loss.

        Returns:
            The smallest `t` with `bound(t) <= loss`; None if there is none, which does
            not say that the loss is out of reach.

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
        """The number of steps after which `certify` will find at most this gap.

        Args:
            gap: The wanted distance of the loss to `lower_bound`, positive.

        Returns:
            As `steps_to`.

        Raises:
            ValueError: If `gap` is not positive, or vanishes beside `lower_bound` in
                float64.
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


def forecast(
    model: AlignedModel,
    x: Any,
    y: Any = None,
    *,
    loss: Any = None,
    sample_weight: Any = None,
    step_size: float | None = None,
    exact: bool | None = None,
    iterations: int = 60,
    batch_size: int = 256,
    steps: int | None = None,
) -> Forecast:
    """Bounds the loss after any number of first-order exploitation steps.

    It speaks of full-batch gradient descent on the head's `q` and `b`, from where they
    are. The bound holds for that method with any step up to `step_size`'s limit; other
    optimizers are usually faster, and have no such bound. Features are computed once
    and kept; everything behind them is in float64.

    For squared error and `exact`, the bound is the loss itself, to rounding: each
    eigenvector of the Gram matrix contracts at a rate of its own.

    Args:
        model: An `AlignedModel` that exploits: before the switch there are no gates,
            and so nothing to forecast.
        x: Inputs: arrays, or any stream that `keras.Model.fit` accepts, finite.
        y: Targets, for arrays.
        loss: A loss as in `keras.Model.compile`, if not the one that the model was
            compiled with.
        sample_weight: Sample weights of shape `(n,)`, for arrays.
        step_size: The step of gradient descent, at most `1 / Ls`, which is the
            default.
        exact: Whether to use eigendecompositions of one `n x n` matrix per output.
            The default is to do so up to 1,500 samples.
        iterations: Iterations of L-BFGS that may be spent on good `theta*`.
        batch_size: Samples per prediction, for arrays.
        steps: Number of batches to read; a generator needs it.

    Returns:
        The forecast.

    Raises:
        ValueError: If the model does not exploit, the step is too long, or anything
            that `keras_dalign.certify` refuses.

    Example:

    ```python
    prospect = keras_dalign.forecast(model, x, y)
    prospect.bound([100, 1000])  # the loss after so many steps, at most
    prospect.steps_to_gap(1e-3)  # steps to within 0.001 of the global minimum
    ```
    """
    _check_arguments(step_size, exact, iterations)
    head = exploiting_head(model, "A forecast")
    convex = loss_of(model, loss)
    trunk = BatchPredictor(model.trunk)
    numbers: dict[bytes, int] = {}
    kept: list[tuple[Any, Any, Array, list[int]]] = []
    weighted = False
    for x_batch, y_batch, w_batch in data.batches(
        x, y, sample_weight, batch_size=batch_size, steps=steps, model=model
    ):
        check_targets(y_batch)
        groups = [numbers.setdefault(name, len(numbers)) for name in digests(x_batch)]
        labels = single_array(y_batch, "y")
        convex.targets(labels, head.units)
        weights = sample_weights(w_batch, len(groups))
        kept.append((trunk.features(x_batch), labels, weights, groups))
        weighted |= w_batch is not None
    features, all_labels, all_weights, all_groups = zip(*kept, strict=True)
    joined = keras.tree.map_structure(lambda *parts: np.concatenate(parts), *features)
    weights = np.concatenate(all_weights)
    check_some_weight(len(weights), float(weights.sum()))
    labels = np.concatenate(all_labels)
    problem = ConvexProblem.from_head(
        head, FeatureSet(joined, labels, weights, batch_size), convex
    )
    weighting = ", with sample weights" if weighted else ""
    return forecast_problem(
        problem,
        problem.theta_of(head),
        np.concatenate(all_groups),
        step_size=step_size,
        exact=exact,
        iterations=iterations,
        objective=(
            f"{convex.objective} as given{weighting}, in inference mode, without "
            "regularisation or augmentation"
        ),
    )


def _check_arguments(step_size: Any, exact: Any, iterations: Any) -> None:
    if step_size is not None:
        number("step_size", step_size, "positive and finite", lambda v: v > 0)
    if exact is not None:
        flag("exact", exact)
    integer("iterations", iterations)


def forecast_problem(
    problem: ConvexProblem,
    theta: Array,
    groups: Indices,
    *,
    objective: str,
    step_size: float | None = None,
    exact: bool | None = None,
    iterations: int = 60,
) -> Forecast:
    """`forecast` for a convex problem that is at hand.

    Args:
        problem: The problem.
        theta: Where gradient descent starts, shape `(size,)`.
        groups: Number of each sample's input, shape `(n,)`.
        objective: The loss in words.
        step_size: See `forecast`.
        exact: See `forecast`.
        iterations: See `forecast`.

    Returns:
        The forecast.

    Raises:
        ValueError: If an argument is out of its range.
    """
    _check_arguments(step_size, exact, iterations)
    if exact is None:
        exact = problem.n <= _EXACT_SAMPLES
    loss = problem.loss_of(problem.logits(theta))
    if not math.isfinite(loss):
        raise ValueError(
            "The loss is not finite, so there is nothing to forecast: training has "
            f"probably diverged. Received: loss={loss}"
        )
    spectra = spectra_of(problem, theta, groups) if exact else None
    smoothness = smoothness_bound(problem) if spectra is None else spectra.smoothness
    if step_size is None:
        step_size = 1.0 / smoothness
    elif step_size * smoothness > 1.0 + 1e-12:
        raise ValueError(
            "Gradient descent is only known to converge with steps of at most 1 / Ls = "
            f"{1 / smoothness:.6g}. Received: step_size={step_size}. Leave it out to "
            "use the longest."
        )
    candidates = path_candidates(problem, theta, smoothness, iterations)
    if spectra is not None:
        candidates += spectra.candidates
    candidates = [candidates[i] for i in envelope(candidates)]
    squared_distances = np.array([distance for _, distance in candidates])
    repeats = Repeats()
    names = [int(group).to_bytes(8, "little") for group in groups]
    repeats.add(names, problem.targets, problem.weights, 0)
    seen = len(np.unique(groups[problem.weights > 0]))
    return Forecast(
        loss=loss,
        lower_bound=repeats.lower_bound(problem.loss) / problem.normalizer,
        step_size=step_size,
        smoothness=smoothness,
        exact=exact,
        contraction=None if spectra is None else spectra.contraction(step_size),
        rank=None if spectra is None else spectra.rank,
        deficit=None if spectra is None else max(seen - spectra.rank, 0),
        n_samples=problem.n,
        n_distinct=repeats.n_distinct,
        n_conflicts=repeats.conflicts()[0],
        distance=None if spectra is None else spectra.distance,
        losses=np.array([loss for loss, _ in candidates]),
        squared_distances=squared_distances,
        rounding=rounding_allowances(problem, theta, squared_distances),
        objective=objective,
        _modes=None if spectra is None else spectra.modes,
    )
